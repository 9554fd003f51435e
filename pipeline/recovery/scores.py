"""Queries and keys of both networks, fitted where their scores are formed: to these, not to what each layer gave.

By then each layer has been fitted by itself; what `attention` finds for both together stays where the scores of the
samples held back come nearer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from foundation.editor import writes
from pipeline.recovery import attention, regression
from pipeline.recovery.contractions import Contraction, contraction, weight_of, whole_channels
from pipeline.recovery.fitted import Fitted, not_real
from pipeline.recovery.networks import Networks
from pipeline.recovery.weights import Weights


def find(weights: Weights) -> dict[fx.Node, attention.Scores]:
    """The scores that can be fitted, by the node that forms them."""
    nodes = list(weights.graph.nodes)
    found = (attention.scores(node) for node in nodes) if weights.masks else ()
    return {one.node: one for one in found if one and _positions_gone(one, weights) and _unwritten(one, nodes)}


def _positions_gone(one: attention.Scores, weights: Weights) -> bool:
    """Whether rows of the layers behind queries and keys are masked."""
    held = [weight_of(path.start) for path in (one.queries, one.keys)]
    return all(node is not None and node.name in weights.masks for node in held)


def _unwritten(one: attention.Scores, nodes: list[fx.Node]) -> bool:
    """Whether nothing is written in place until the scores are formed: what the layers read is read again then."""
    first = min(nodes.index(path.start) for path in (one.queries, one.keys))
    return not any(writes(node) for node in nodes[first : nodes.index(one.node)])


@dataclass(frozen=True)
class _Side:
    """Queries or keys of scores, and the layer behind them, by chunk where a list.

    `x`: what the layer reads; `dense`: (matrices, tokens, positions) of the dense network; `places`: where in the flat
    output of the layer the numbers of the path's end are; `of`: the sample of each matrix. `kept`, `columns`: bool, of
    the weight.
    """

    path: attention.Path
    found: Contraction
    held: fx.Node
    bias: fx.Node | None
    x: list[Tensor]
    dense: list[Tensor]
    places: list[Tensor]
    heads: list[attention.Heads]
    label: list[Tensor]
    of: list[Tensor]
    kept: Tensor
    columns: Tensor

    def _given(self, weights: Mapping[fx.Node, Tensor], where: Sequence[Tensor]) -> list[Tensor]:
        matrix = self.found.to_matrix(weights[self.held])[0]
        bias = None if self.bias is None else weights[self.bias]
        return [
            (torch.nn.functional.linear(x, matrix, bias).flatten()[place] * self.path.factor)
            for x, place in zip(self.x, where, strict=True)
        ]

    def reached(self, weights: Mapping[fx.Node, Tensor]) -> list[Tensor]:
        """What they are with these weights: (matrices, tokens, positions)."""
        return [v.float() for v in self._given(weights, [layout.place for layout in self.heads])]

    def ends(self, weights: Mapping[fx.Node, Tensor]) -> list[Tensor]:
        """The same as the path ends in."""
        return self._given(weights, self.places)


@dataclass(frozen=True)
class _Task:
    """Queries and keys that can be fitted. `kept`: (matrices, positions), which positions both have; `judges`, `learn`:
    (matrices,), which judge the fit, and which are looked at.
    """

    sides: tuple[_Side, _Side]
    kept: list[Tensor]
    judges: list[Tensor]
    learn: list[Tensor]


@dataclass(frozen=True)
class _Best:
    """The weights that came nearest, with the scores' lack before and after; `strength`, `rows` as in `Fitted`."""

    weights: dict[fx.Node, Tensor]
    before: float
    after: float
    strength: float
    rows: int


def fit(one: attention.Scores, networks: Networks) -> tuple[list[Fitted], bool]:
    """Fit queries and keys to the scores, in turns: what became of their weights, and whether the scores came nearer
    than layer by layer; only then the weights and the values of both are others.
    """
    task = _task(one, networks)
    best = _in_turns(task, networks) if task else None
    if task is None or best is None:
        return [], False
    nearer = best.after < best.before
    if nearer:
        for node, value in best.weights.items():
            networks.put_weight(node, value)
        for side in task.sides:
            networks.put_pruned(side.path.end, side.ends(best.weights))
    names = {networks.weights.names[side.held.name]: side for side in task.sides}
    return [
        Fitted(name, best.rows, int(side.columns.sum()), best.strength, best.before, best.after)
        for name, side in names.items()
    ], nearer


def _task(one: attention.Scores, networks: Networks) -> _Task | None:
    """What there is to fit; None where nothing is, or it cannot be."""
    queries, keys = (_side(one, path, networks) for path in (one.queries, one.keys))
    if queries is None or keys is None:
        return None
    pairs = list(zip(queries.heads, keys.heads, strict=True))
    channels = [set(torch.cat([h.channel.flatten() for h in side.heads]).tolist()) for side in (queries, keys)]
    if any(a.channel.shape != b.channel.shape for a, b in pairs) or (
        queries.held is keys.held and channels[0] & channels[1]
    ):
        return None
    kept = [queries.kept[a.channel] & keys.kept[b.channel] for a, b in pairs]
    judges = [networks.samples.held_back[of] for of in queries.of]
    learn = [~use for use in judges]
    if (
        all(bool((mask.all(1) | ~mask.any(1)).all()) for mask in kept)  # whole heads are gone at the most
        or not networks.samples.usable(torch.cat(judges))
        or not networks.samples.finite(*(v for side in (queries, keys) for v in (*side.dense, *side.x)))
    ):
        return None
    return _Task((queries, keys), kept, judges, learn)


def _in_turns(task: _Task, networks: Networks) -> _Best | None:
    """Fit the queries, then the keys, and so on; None where what they are now is not finite."""
    weights = {node: networks.fixed[node][1] for side in task.sides for node in (side.held, side.bias) if node}
    reached = [side.reached(weights) for side in task.sides]
    together = networks.samples.together
    if not networks.samples.finite(*(v for given in reached for v in given)):
        return None
    wanted = [side.dense for side in task.sides]
    before = best = attention.lack(wanted, reached, task.judges, together)
    rows, strength = 0, 0.0
    for _ in range(attention.TURNS):
        for at, side in enumerate(task.sides):
            other = 1 - at
            targets = attention.wanted(
                wanted[at], wanted[other], reached[other], side.label, task.kept, task.learn, together, centred=at == 0
            )
            refit = _refit(side, targets, weights, networks)
            if refit is None:
                continue
            changed, made, rows = refit
            given = side.reached(weights | changed)
            now = [given, reached[1]] if at == 0 else [reached[0], given]
            left = attention.lack(wanted, now, task.judges, together)
            if left < best:
                best, reached[at], strength = left, given, max(strength, made)
                weights |= changed
    return _Best(weights, before, best, strength, rows)


def _side(one: attention.Scores, path: attention.Path, networks: Networks) -> _Side | None:
    """Queries or keys of scores; None where the layer behind them cannot be fitted to these alone."""
    weights, samples, values = networks.weights, networks.samples, networks.values
    held = weight_of(path.start)
    if held is None or held.name not in weights.parameters or path.start in weights.together:
        return None
    found = contraction(path.start, weights.dense[held.name])
    if found is None or not found.matrix or found.x not in values or weights.read_by_several(held):
        return None
    bias, mask = found.bias, found.to_matrix(weights.masks[held.name])
    outputs = mask.shape[1]
    if not whole_channels(mask) or (bias is not None and not weights.is_own_shift(bias, outputs)):
        return None
    xs = values[found.x][1]
    if not_real(xs[0], networks.fixed[held][1]) or xs[0].dim() < 2 or values[path.end][0][0].dim() < 3:
        return None
    axis, keys = samples.axis(found.x), path is one.keys
    dense, places, heads, of = [], [], [], []
    # Where numbers are depends on sizes alone.
    layouts: dict[torch.Size, tuple[Tensor, attention.Heads | None]] = {}
    for at, x in enumerate(xs):
        end = values[path.end][0][at]
        repeats = values[one.queries.end][0][at].shape[-3] // end.shape[-3] if keys and one.shared else 1
        turned = keys and one.turned
        if x.shape not in layouts:
            place = _place(path, (*x.shape[:-1], outputs), at, networks)
            made = attention.heads(_as_matrices(place, turned=turned, repeats=repeats), outputs)
            layouts[x.shape] = place, made
        place, layout = layouts[x.shape]
        if layout is None:
            return None
        sizes = [1] * (x.dim() - 1)
        sizes[axis] = -1
        sample = samples.of(at, x.shape[axis]).reshape(sizes).expand(x.shape[:-1]).flatten()
        of.append(sample[layout.place[:, 0, 0] // outputs])
        places.append(place)
        heads.append(layout)
        dense.append(_as_matrices(end, turned=turned, repeats=repeats).flatten(0, -3).float())
    return _Side(path, found, held, bias, xs, dense, places, heads, attention.labels(heads), of,
                 mask[0].any(1), mask[0].any(0))  # fmt: skip


def _place(path: attention.Path, shape: tuple[int, ...], at: int, networks: Networks) -> Tensor:
    """Where in the layer's flat output of this shape the numbers of the path's end are, for the chunk `at`."""
    values, fixed = networks.values, networks.fixed
    made: dict[fx.Node, Any] = {path.start: torch.arange(math.prod(shape)).reshape(shape)}
    for node in path.nodes:
        source = node.all_input_nodes[0]
        known = {
            s: made[s] if s in made else values[s][1][at] if s in values else fixed[s][1] for s in node.all_input_nodes
        }
        made[node] = made[source] if attention.scales(node) else networks.call(node, known)
    place: Tensor = made[path.end]
    return place


def _as_matrices(value: Tensor, *, turned: bool, repeats: int) -> Tensor:
    """(..., tokens, positions) of queries or keys; each head `repeats` times."""
    value = value.mT if turned else value
    return value.repeat_interleave(repeats, -3) if repeats > 1 else value


def _refit(
    side: _Side, targets: list[Tensor], weights: Mapping[fx.Node, Tensor], networks: Networks
) -> tuple[dict[fx.Node, Tensor], float, int] | None:
    """Weight and bias fitted to give these queries or keys, the strength of it, and how many rows say so; None
    where they cannot be fitted.
    """
    ys = []
    for x, layout, target in zip(side.x, side.heads, targets, strict=True):
        y = x.new_zeros(math.prod(x.shape[:-1]) * len(side.kept))
        y[layout.place.flatten()] = (target / side.path.factor).flatten().to(y.dtype)
        ys.append(y.reshape(*x.shape[:-1], -1))
    outputs = torch.zeros_like(side.kept)
    outputs[torch.cat([layout.channel.flatten() for layout in side.heads])] = True
    outputs &= side.kept
    matrix = side.found.to_matrix(weights[side.held])
    samples = networks.samples
    x, y, of, _ = samples.rows(side.path.start, side.found, side.x, ys, matrix, networks.shelf)
    learn = ~samples.held_back[of]
    chooses = samples.choosing[of][learn]
    if not samples.finite(x, y) or not samples.usable(chooses):
        return None
    made = regression.fit(
        x[learn][:, :, side.columns], y[learn][:, :, outputs], matrix[:, outputs][:, :, side.columns],
        chooses, intercept=side.bias is not None, together=samples.together,
    )  # fmt: skip
    new = matrix.clone()
    new[0, outputs.nonzero(), side.columns.nonzero().flatten()] = made.weight[0].to(new.dtype)
    changed = {side.held: side.found.from_matrix(new)}
    if side.bias is not None and made.bias is not None:
        bias = weights[side.bias].clone()
        bias[outputs] = made.bias[0].to(bias.dtype)
        changed[side.bias] = networks.weights.masked(side.bias, bias)
    return changed, made.strength, int(samples.together.sum(int(learn.sum()))[0])
