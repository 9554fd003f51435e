"""The shift of a norm takes what a channel's mean lacks: no fit, but the sum of what went, taken where it shows."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from pipeline.recovery import residuals
from pipeline.recovery.networks import Networks
from pipeline.recovery.weights import Weights

aten = torch.ops.aten

NORMS: dict[Any, int] = {
    aten.batch_norm.default: 1, aten.layer_norm.default: 2, aten.group_norm.default: 2, aten.instance_norm.default: 1,
}  # fmt: skip
"""Norms with a shift -> the position of their scale; the shift comes next."""
_CENTRING = (aten.batch_norm.default, aten.instance_norm.default)
"""Norms that take a wrong mean of a channel for what their own shift can mend."""


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
        lack += (a - b).mean(rest, dtype=torch.float64) * len(a)
        networks.shelf.rest(a)
        networks.shelf.rest(b)
    together = networks.samples.together
    lack = together.added(lack) / together.sum(sum(len(a) for a in dense))[0]
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


def _shift_of(norm: fx.Node, weights: Weights) -> fx.Node | None:
    """The shift of a norm where it can take what a channel's mean lacks."""
    at = NORMS[norm.target] + 1
    shift = norm.args[at] if len(norm.args) > at else None
    if not isinstance(shift, fx.Node) or shift.name not in weights.dense:
        return None
    return shift if weights.is_own_shift(shift, weights.dense[shift.name].numel()) else None
