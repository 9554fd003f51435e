"""What an activation that cuts (ReLU, ReLU6, clamp) leaves free in a layer before it: beyond the cut, one value is as
good as another.

So a layer whose output ends in such a cut is fitted to the values that get through, and of the others only to the side
of the cut on which they lie (Zhang et al. 2015, arXiv:1411.4229, who fit responses behind a ReLU).
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
from pipeline.recovery.residuals import Back, other_side, shape_of, step_back
from pipeline.recovery.rows import Gather

aten = torch.ops.aten

_FROM_ZERO = (aten.relu.default, aten.relu_.default)
_BETWEEN = {
    aten.hardtanh.default: (-1.0, 1.0), aten.hardtanh_.default: (-1.0, 1.0), aten.relu6.default: (0.0, 6.0),
    aten.clamp.default: (None, None), aten.clamp_.default: (None, None), aten.clamp_min.default: (None, None),
}  # fmt: skip
"""Operators that let through what lies between their next two arguments -> what these are where they are not given."""


class Cut:
    """The cut behind a node. `dense`: what the node gives in the dense network, by chunk; `path`: the nodes from it to
    the cut, `back`: how a difference at the cut goes back to it.
    """

    def __init__(
        self,
        dense: Sequence[Any],
        path: Sequence[fx.Node],
        limits: tuple[float, float],
        back: Sequence[Back],
        networks: Networks,
    ) -> None:
        self.dense, self.path, self.limits, self.back, self.networks = dense, path, limits, back, networks
        # Nothing here looks at other places, or puts them elsewhere.
        self._by_row = all(node.target in (*ADDITIONS, aten.batch_norm.default) for node in path[1:])

    def room(self, at: int, gather: Gather) -> Tensor:
        """How far the values of chunk `at` that are gathered may move in the pruned network until they get through.

        A value that may rise has a positive number and may fall as far as it likes, one that may fall a negative one
        and may rise; 0 is a value that gets through.
        """
        rows = gather(self.dense[at])
        if self._by_row:
            return self._room(rows.flatten(1), at, lambda value: gather(value).flatten(1)).reshape(rows.shape)
        return gather(self._room(self.dense[at], at, lambda value: value))

    def _room(self, value: Tensor, at: int, take: Gather) -> Tensor:
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
        low, high = self.limits
        left = (low - value).clamp_min(0.0) + (high - value).clamp_max(0.0)
        for one in self.back:
            left = one(left)
        return left


def cut_behind(node: fx.Node, dense: Sequence[Any], networks: Networks) -> Cut | None:
    """The cut that all of `node` ends in, None where there is none: between them lie norms with fixed statistics,
    scales, other orders of dimensions, and sums whose other side is known by now.
    """
    if not isinstance(dense[0], Tensor) or not dense[0].is_floating_point():
        return None
    path, back = [node], list[Back]()
    while len(path[-1].users) == 1:
        read = path[-1]
        (user,) = read.users
        limits = _limits(user)
        if limits is not None:
            return Cut(dense, path, limits, back, networks)
        if user.target in ADDITIONS:
            other = other_side(user, read)
            if other is None or other not in networks.values or shape_of(other) != shape_of(read):
                return None
        else:
            step = step_back(user, read, networks)
            if step is None:
                return None
            back.insert(0, step)
        path.append(user)
    return None


def _limits(node: fx.Node) -> tuple[float, float] | None:
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
