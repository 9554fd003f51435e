"""A weight that one operator reads, fitted where that operator stands: to what it gives in the dense network, and
at the end of a residual branch to what makes the sum right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from pipeline.recovery import recurrent, regression, residuals
from pipeline.recovery.behind import behind
from pipeline.recovery.contractions import Contraction, contraction, weight_of, whole_channels
from pipeline.recovery.fitted import (
    NOT_FINITE,
    NOTHING_KEPT,
    TOO_FEW,
    Fitted,
    not_real,
    of_groups,
    too_sparse,
    without_samples,
)
from pipeline.recovery.networks import Networks
from pipeline.recovery.shifts import norm_follows
from pipeline.recovery.shown import Shown
from pipeline.training.devices import Together

aten = torch.ops.aten

_ELEMENTWISE = (
    aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor, aten.mul.Tensor, aten.mul_.Tensor,
    aten.div.Tensor, aten.div_.Tensor,
)  # fmt: skip
"""Scales and positions that are learnt: no weights in the sense of a fit."""


def fit(node: fx.Node, dense: list[Any], networks: Networks) -> list[Fitted]:
    """Fit the weight of `node`, and its bias, to what `node` gives in the dense network, by chunk, or has to give at
    the end of a residual branch; nothing where its weight is fitted elsewhere: with other readers, or cell by cell.
    """
    weights, fixed = networks.weights, networks.fixed
    if node in weights.together or node.target in recurrent.GATES:
        return []
    held = weight_of(node)
    if held is None or held not in fixed:
        return _without_rule(node, networks)
    reason = weights.not_free(held, f"the weight of {node.name}")
    name = weights.names.get(held.name, held.name)
    found = contraction(node, fixed[held][0])
    if not reason and (found is None or found.x not in networks.values):
        reason = f"there is no rule for {node.target} of such operands ({node.name})"
    if reason or found is None:
        return [Fitted(name, reason=reason)]
    inputs = networks.values[found.x][1]
    reason = weights.read_by_several(found.weight) or not_real(inputs[0], dense[0], fixed[held][1])
    reason = reason or without_samples(node, inputs[0], fixed[held][1])
    if reason:
        return [Fitted(name, reason=reason)]
    return [_fit(name, node, found, inputs, dense, networks)]


def _without_rule(node: fx.Node, networks: Networks) -> list[Fitted]:
    """Of an operator that contracts nothing: the weights that it reads all the same."""
    weights = networks.weights
    return [
        Fitted(weights.names[source.name], reason=f"there is no rule for {node.target} ({node.name})")
        for source in (node.all_input_nodes if node.target not in _ELEMENTWISE else ())
        if source.name in weights.parameters and weights.dense[source.name].dim() > 1
    ]


def _fit(
    name: str, node: fx.Node, found: Contraction, inputs: list[Any], dense: list[Any], networks: Networks
) -> Fitted:
    """Fit a weight that nothing but its values can keep from it."""
    weights, samples, held = networks.weights, networks.samples, found.weight
    matrix, kept = found.to_matrix(networks.fixed[held][1]), found.to_matrix(weights.kept(held))
    outputs, columns = kept.any(2), kept.any(1)
    reason = too_sparse(kept)
    if reason or not bool(kept.any()):
        return Fitted(name, reason=reason or NOTHING_KEPT)
    after = behind(node, dense, networks)
    x, y, of, facts = samples.rows(
        node, found, inputs, residuals.wanted(node, dense, networks), matrix, networks.shelf,
        facts=after.facts if after else None,
    )  # fmt: skip
    held_back = samples.held_back[of]
    if not samples.usable(held_back):
        return Fitted(name, reason=TOO_FEW)
    if not samples.finite(x, y):
        return Fitted(name, reason=NOT_FINITE)
    shown = None
    if after is not None and facts is not None and samples.finite(facts):  # the other side of a sum may be anything
        shown = after.shown(facts)
    bias = found.bias
    own_bias = bias is not None and weights.is_own_shift(bias, matrix.shape[0] * matrix.shape[1])
    intercept = own_bias or norm_follows(node, weights)
    if whole_channels(kept):
        new, made = _solve(x, y, shown, matrix, outputs, columns, held_back, intercept, samples.together)
    else:
        made = [
            regression.fit(
                x, y, matrix, held_back, intercept=intercept, kept=kept, shown=shown, together=samples.together
            )
        ]
        new, outputs = made[0].weight, torch.ones_like(outputs)
    networks.put_weight(held, found.from_matrix(new))
    if own_bias and bias is not None:
        whole = networks.fixed[bias][1].clone()
        new_bias = torch.cat([fit.bias.flatten() for fit in made if fit.bias is not None])
        whole[outputs.flatten()] = new_bias.to(whole.dtype)
        networks.put_weight(bias, whole)
    return of_groups(name, int(samples.together.sum(len(x))[0]), columns, made)


def _solve(
    x: Tensor,
    y: Tensor,
    shown: Shown | None,
    matrix: Tensor,
    outputs: Tensor,
    columns: Tensor,
    held_back: Tensor,
    intercept: bool,
    together: Together,
) -> tuple[Tensor, list[regression.Fit]]:
    """All groups at once where all of them keep all columns and outputs that they have, else one by one."""
    new = matrix.clone()
    alive = outputs.any(1)
    if bool(columns[alive].all()) and bool(outputs[alive].all()):
        made = regression.fit(
            x[:, alive], y[:, alive], matrix[alive], held_back, intercept=intercept, together=together,
            shown=shown and shown.map(lambda v: v[:, alive]),
        )  # fmt: skip
        new[alive] = made.weight
        return new, [made]
    fits = []
    for group in alive.nonzero().flatten().tolist():
        rows, cols = outputs[group].nonzero().flatten(), columns[group].nonzero().flatten()
        part = matrix[group][rows][:, cols].unsqueeze(0)
        made = regression.fit(
            x[:, group : group + 1, cols], y[:, group : group + 1, rows], part, held_back, intercept=intercept,
            together=together, shown=shown and shown.map(_part_of(group, rows)),
        )  # fmt: skip
        new[group, rows.unsqueeze(1), cols] = made.weight[0]
        fits.append(made)
    return new, fits


def _part_of(group: int, outputs: Tensor) -> Callable[[Tensor], Tensor]:
    """From (rows, groups, outputs) those of one group."""
    return lambda value: value[:, group : group + 1, outputs]


def thinned(node: fx.Node, networks: Networks) -> bool:
    """Whether single weights of `node` are masked: then what is left of an output can make up for them."""
    held = weight_of(node)
    if held is None or held not in networks.fixed or held.name not in networks.weights.masks:
        return False
    found = contraction(node, networks.fixed[held][0])
    return found is not None and not whole_channels(found.to_matrix(networks.weights.masks[held.name]))
