"""The activation that a layer's outputs end in, and what of them shows behind it.

Beyond the cut of a ReLU one value is as good as another, and where a SiLU is flat hardly any shows. So a layer is
fitted to what its activation gives in the dense network, by way of all that lies in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from foundation.editor import writes
from pipeline.channels.dead.branches import ADDITIONS
from pipeline.recovery.networks import Networks
from pipeline.recovery.residuals import Back, onward, other_side, shape_of
from pipeline.recovery.rows import Gather
from pipeline.recovery.shown import Curved, Cut, Shown

aten = torch.ops.aten

_FROM_ZERO = (aten.relu.default, aten.relu_.default)
_BETWEEN = {
    aten.hardtanh.default: (-1.0, 1.0), aten.hardtanh_.default: (-1.0, 1.0), aten.relu6.default: (0.0, 6.0),
    aten.clamp.default: (None, None), aten.clamp_.default: (None, None), aten.clamp_min.default: (None, None),
}  # fmt: skip
"""Operators that let through what lies between their next two arguments -> what these are where they are not given."""
_SMOOTH = (
    aten.silu.default, aten.silu_.default, aten.mish.default, aten.mish_.default, aten.hardswish.default,
    aten.hardswish_.default, aten.elu.default, aten.elu_.default, aten.leaky_relu.default, aten.leaky_relu_.default,
    aten.softplus.default, aten.sigmoid.default, aten.sigmoid_.default, aten.hardsigmoid.default,
    aten.hardsigmoid_.default, aten.tanh.default, aten.tanh_.default,
)  # fmt: skip
"""Operators of one tensor and numbers, each value by itself, with a slope that has a bound. Not the GELU: on a BERT of
four layers the fit came no nearer by it, and one of six takes 121 s instead of 93.
"""


class Behind:
    """The `activation` behind a node. `dense`: what the node gives in the dense network, by chunk; `path`: the nodes
    from it to the one that the activation reads, `back`: how a difference there goes back to the node.
    """

    def __init__(
        self,
        dense: Sequence[Any],
        path: Sequence[fx.Node],
        activation: fx.Node,
        back: Sequence[Back],
        networks: Networks,
    ) -> None:
        self.dense, self.path, self.activation, self.back, self.networks = dense, path, activation, back, networks
        self.limits = limits_of(activation)
        # Nothing here looks at other places, or puts them elsewhere.
        self._by_row = all(node.target in (*ADDITIONS, aten.batch_norm.default) for node in path[1:])

    def facts(self, at: int, gather: Gather) -> Tensor:
        """What `shown` has to know of the values of chunk `at` that are gathered: (their shape, facts of each)."""
        rows = gather(self.dense[at])
        if self._by_row:
            found = self._of(self._read(rows.flatten(1), at, lambda value: gather(value).flatten(1)))
            return torch.stack([fact.reshape(rows.shape) for fact in found], -1)
        return torch.stack([gather(fact) for fact in self._of(self._read(self.dense[at], at, lambda value: value))], -1)

    def shown(self, facts: Tensor) -> Shown:
        """What shows of values with these facts, in the order in which they are."""
        if self.limits is not None:
            return Cut.of(facts[..., 0])
        return Curved.of(self._activation, facts[..., 0], facts[..., 1] if self.back else None)

    def _of(self, value: Tensor) -> list[Tensor]:
        """The facts, of what the activation reads."""
        if self.limits is not None:
            low, high = self.limits
            return [self._taken_back((low - value).clamp_min(0.0) + (high - value).clamp_max(0.0))]
        return [self._taken_back(one) for one in ((value, torch.ones_like(value)) if self.back else (value,))]

    def _read(self, value: Tensor, at: int, take: Gather) -> Tensor:
        """What the activation reads in the dense network, of what the node gives there."""
        networks = self.networks
        for read, node in zip(self.path, self.path[1:], strict=False):
            args = {read: value}
            for source in node.all_input_nodes:
                if source in networks.values and source is not read:
                    other = networks.values[source][0][at]
                    args[source] = take(other)
                    networks.shelf.rest(other)
                elif source is not read:
                    args[source] = networks.fixed[source][0]
            if writes(node):
                args[node.all_input_nodes[0]] = args[node.all_input_nodes[0]].clone()
            value = networks.call(node, args)
        return value

    def _taken_back(self, difference: Tensor) -> Tensor:
        for one in self.back:
            difference = one(difference)
        return difference

    def _activation(self, value: Tensor) -> Tensor:
        read, node = self.path[-1], self.activation
        given: Tensor = self.networks.call(node, {read: value.clone() if writes(node) else value})
        return given


def behind(node: fx.Node, dense: Sequence[Any], networks: Networks) -> Behind | None:
    """The activation that all of `node` ends in, None where there is none: between them lie norms with fixed
    statistics, scales, other orders of dimensions, and sums whose other side is known by now.
    """
    if not isinstance(dense[0], Tensor) or not dense[0].is_floating_point():
        return None
    path, back = [node], list[Back]()
    for user, read, step in onward(node, networks):
        if limits_of(user) is not None or (user.target in _SMOOTH and user.all_input_nodes == [read]):
            return Behind(dense, path, user, back, networks)
        if user.target in ADDITIONS:
            other = other_side(user, read)
            if other is None or other not in networks.values or shape_of(other) != shape_of(read):
                return None
        elif step is None:
            return None
        else:
            back.insert(0, step)
        path.append(user)
    return None


def limits_of(node: fx.Node) -> tuple[float, float] | None:
    """Between which values `node` lets through what it reads, None where it is no such operator."""
    if node.target in _FROM_ZERO:
        return 0.0, math.inf
    if node.target not in _BETWEEN:
        return None
    given: list[Any] = [*node.args[1:3], *_BETWEEN[node.target][len(node.args) - 1 :]]
    low, high = (node.kwargs.get(name, value) for name, value in zip(("min", "max"), given, strict=True))
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return None
    return -math.inf if low is None else float(low), math.inf if high is None else float(high)
