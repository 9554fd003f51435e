"""The shift of a norm takes what a channel's mean lacks: no fit, but the sum of what went, taken where it shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pipeline.recovery import residuals, sums
from pipeline.recovery.behind import Behind, behind
from pipeline.recovery.networks import Networks
from pipeline.recovery.weights import Weights

aten = torch.ops.aten

NORMS: dict[Any, int] = {
    aten.batch_norm.default: 1, aten.layer_norm.default: 2, aten.group_norm.default: 2, aten.instance_norm.default: 1,
}  # fmt: skip
"""Norms with a shift -> the position of their scale; the shift comes next."""
_CENTRING = (aten.batch_norm.default, aten.instance_norm.default)
"""Norms that take a wrong mean of a channel for what their own shift can mend."""

ROWS = 4096
"""Places that a shift is found on: one number a channel needs fewer than a weight does. Four times as many leave the
same divergence (ResNet-18, MobileNetV2), in four times as long.
"""
STEPS = 6
"""Of Newton, for a shift; behind a cut the loss is made of pieces of parabolas, and few of them lie in between."""


def norm_follows(node: fx.Node, weights: Weights) -> bool:
    """Whether a norm whose shift mends a wrong mean is all that reads `node`."""
    users = list(node.users)
    return len(users) == 1 and users[0].target in _CENTRING and _shift_of(users[0], weights) is not None


def mend(node: fx.Node, networks: Networks) -> None:
    """Give a norm's shift what its output's mean lacks, per channel, or the sum's at the end of a residual branch; the
    pruned values move along.
    """
    weights = networks.weights
    shift = _shift_of(node, weights)
    if shift is None:
        return
    dense, pruned = networks.values[node]
    wanted = residuals.wanted(node, dense, networks)
    axis = -1 if node.target is aten.layer_norm.default else 1
    size = weights.dense[shift.name].shape
    if dense[0].shape[axis] != size[0]:
        return
    lack = torch.zeros(size[0], dtype=torch.float64)
    for a, b in zip(wanted, pruned, strict=True):
        rest = [d for d in range(a.dim()) if d != axis % a.dim()]
        lack += sums.over(a - b, rest) * (len(a) * len(lack) / a.numel())  # of each sample, the mean over its places
        networks.shelf.rest(a)
        networks.shelf.rest(b)
    together = networks.samples.together
    lack = together.added(lack) / together.sum(sum(len(a) for a in dense))[0]
    after = behind(node, dense, networks) if axis == 1 else None
    if after is not None:
        lack = _by_what_shows(node.name, lack, after, wanted, pruned, networks)
    if not bool(lack.isfinite().all()):
        return
    lack[~weights.kept(shift)] = 0
    lack = lack.to(weights.dense[shift.name].dtype)
    networks.put_weight(shift, networks.fixed[shift][1] + lack)
    shape = [1] * dense[0].dim()
    shape[axis] = -1
    for value in pruned:
        value += lack.reshape(shape)
        networks.shelf.rest(value)


def _by_what_shows(
    name: str, lack: Tensor, after: Behind, wanted: Sequence[Any], pruned: list[Any], networks: Networks
) -> Tensor:
    """Per channel, the shift of the norm `name` with which what shows behind the activation comes nearest to what is
    wanted: Gauss and Newton's steps from `lack` on.
    """
    shape, samples = pruned[0].shape, networks.samples
    places = math.prod(shape[2:])
    draw = samples.drawing(name, places)
    each = min(places, -(-ROWS // samples.entries(pruned)))
    moved, facts = [], []
    for at, (a, b) in enumerate(zip(wanted, pruned, strict=True)):
        chosen = torch.randperm(places, generator=draw)[:each]

        def drawn(value: Tensor, chosen: Tensor = chosen) -> Tensor:
            return value.flatten(2)[:, :, chosen].movedim(1, 2).flatten(0, 1) if value.dim() > 2 else value

        moved.append(drawn(b) - drawn(a))
        facts.append(after.facts(at, drawn))
        networks.shelf.rest(a)
        networks.shelf.rest(b)
    off, shown = torch.cat(moved), after.shown(torch.cat(facts))
    together = samples.together
    best, least = lack, torch.full_like(lack, math.inf)
    for _ in range(STEPS):
        left, slope = shown.gap_and_slope(off + lack.float())
        loss, total, count = (together.added(sums.over(v, 0)) for v in (left.square(), left * slope, slope.square()))
        best, least = torch.where(loss < least, lack, best), torch.minimum(loss, least)
        lack = lack - total / count.clamp_min(1.0)
    return best


def _shift_of(norm: fx.Node, weights: Weights) -> fx.Node | None:
    """The shift of a norm where it can take what a channel's mean lacks."""
    at = NORMS[norm.target] + 1
    shift = norm.args[at] if len(norm.args) > at else None
    if not isinstance(shift, fx.Node) or shift.name not in weights.dense:
        return None
    return shift if weights.is_own_shift(shift, weights.dense[shift.name].numel()) else None
