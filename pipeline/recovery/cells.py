"""Recurrent operators of both networks, fitted cell by cell: what one gives is what those of the next layer read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pipeline.recovery import recurrent
from pipeline.recovery.fitted import NOT_FINITE, NOTHING_KEPT, TOO_FEW, Fitted, not_real, too_sparse
from pipeline.recovery.networks import Networks
from pipeline.recovery.weights import same

Given = tuple[list[Tensor], list[Tensor]]
"""What a cell gives in the dense and in the pruned network at every step, by chunk."""


def fit(node: fx.Node, networks: Networks) -> list[Fitted]:
    """Fit every cell of a recurrent operator, before the operator itself is computed."""
    args: Any = node.args
    values, fixed = networks.values, networks.fixed
    source, given = args[0], args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
    layers = recurrent.layers(node)
    reason = _obstacle(node, layers, networks)
    if reason:
        names = networks.weights.names
        return [
            Fitted(names.get(cell.nodes[at].name, cell.nodes[at].name), reason=reason)
            for layer in layers for cell in layer for at in cell.matrices
        ]  # fmt: skip
    sides = [[x.transpose(0, 1) if args[8] else x for x in column] for column in values[source]]
    initial = [
        [[(values[s][side][at] if s in values else fixed[s][side]) for s in given] for at in range(len(sides[0]))]
        for side in (0, 1)
    ]
    fitted: list[Fitted] = []
    for layer in layers:
        made = []
        for cell in layer:
            states, told = _fit_cell(cell, sides, initial, networks)
            made.append(states)
            fitted += told
        sides = [[torch.cat(parts, -1) for parts in zip(*(one[side] for one in made), strict=True)] for side in (0, 1)]
    return fitted


def _obstacle(node: fx.Node, layers: Sequence[Sequence[recurrent.Cell]], networks: Networks) -> str:
    """Why no cell of the operator can be fitted; "" where all can."""
    args: Any = node.args
    if args[0] not in networks.values:
        return f"what {node.name} reads does not depend on the samples"
    if args[5] and args[6]:
        return f"{node.name} drops some of what its layers give at random"
    for layer in layers:
        for cell in layer:
            reason = _not_free(node, cell, networks)
            if reason:
                return reason
    return not_real(*(side[0] for side in networks.values[args[0]]))


def _not_free(node: fx.Node, cell: recurrent.Cell, networks: Networks) -> str:
    """Why a matrix of a recurrent cell cannot be fitted; "" where all can."""
    weights = networks.weights
    for at in cell.matrices:
        held = cell.nodes[at]
        reason = weights.not_free(held, f"a weight of {node.name}") or weights.read_by_several(held)
        reason = reason or too_sparse(weights.kept(held).unsqueeze(0))
        if reason:
            return reason
    return not_real(*(networks.fixed[cell.nodes[at]][0] for at in cell.matrices))


def _fit_cell(
    cell: recurrent.Cell, sides: list[list[Tensor]], initial: list[list[list[Tensor]]], networks: Networks
) -> tuple[Given, list[Fitted]]:
    """Fit one layer in one direction. `sides`, `initial`: what it reads and starts from in both networks, by chunk."""
    weights, fixed = networks.weights, networks.fixed
    starts = [[[s[cell.number : cell.number + 1] for s in chunk] for chunk in side] for side in initial]
    held = [tuple(fixed[node][side] for node in cell.nodes) for side in (0, 1)]
    dense, pruned = (recurrent.Side(*side) for side in zip(sides, starts, held, strict=True))
    same_input = all(map(same, dense.x, pruned.x)) and all(
        same(a, b) for old, new in zip(*starts, strict=True) for a, b in zip(old, new, strict=True)
    )
    same_input = networks.samples.together.every(same_input)
    if same_input and all(map(same, dense.weights, pruned.weights)):
        given = recurrent.states(cell, dense)
        return (given, given), []
    names = [weights.names[cell.nodes[at].name] for at in cell.matrices]
    kept = [_kept(node, weight, networks) for node, weight in zip(cell.nodes, dense.weights, strict=True)]
    made = _refit(cell, dense, pruned, kept, networks)
    if isinstance(made, str):
        told = [Fitted(name, reason=made) for name in names]
        return (recurrent.states(cell, dense), recurrent.states(cell, pruned)), told
    for node, value, old in zip(cell.nodes, made.weights, pruned.weights, strict=True):
        if not torch.equal(value, old):
            networks.put_weight(node, value)
    fit = (made.rows, made.columns, made.strength, made.error_before, made.error_after)
    return (made.dense, made.pruned), [Fitted(name, *fit) for name in names]


def _kept(node: fx.Node, weight: Tensor, networks: Networks) -> Tensor:
    """The mask of a cell's weight; a bias may be computed from others."""
    masks = networks.weights.masks
    return masks[node.name] if node.name in masks else torch.ones_like(weight, dtype=torch.bool)


def _refit(
    cell: recurrent.Cell, dense: recurrent.Side, pruned: recurrent.Side, kept: list[Tensor], networks: Networks
) -> recurrent.CellFit | str:
    """The fit of a cell, or the reason why there is none."""
    weights = networks.weights
    if not all(bool(kept[at].any()) for at in cell.matrices):
        return NOTHING_KEPT
    name = weights.names[cell.nodes[0].name]
    drawn = networks.samples.sequences(name, dense.x, sum(kept[at].shape[1] for at in (0, 1)))
    if drawn is None:
        return TOO_FEW
    units = dense.weights[0].shape[0]
    free = [at in cell.matrices or weights.is_own_shift(node, units) for at, node in enumerate(cell.nodes)]
    return recurrent.fit(cell, dense, pruned, kept, free, drawn, networks.samples.together) or NOT_FINITE
