"""Statistics over channels of which some go: they keep the original count.

With r = kept / original, and every removed channel exactly zero,
    mean = r·mean(kept),   var = r·mean((kept − mean)²) + (1 − r)·mean².
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from pipeline.channels.operators.cut import Cut
from pipeline.channels.operators.trace import Trace
from pipeline.channels.operators.values import Value

aten = torch.ops.aten


def over_channels(t: Trace, node: fx.Node, source: fx.Node, dims: Sequence[int]) -> None:
    """Ask for a statistic of `source` over `dims` with the original count."""
    x = t.value(source)
    free = [d for d in dims if x.atoms[d] is not None]
    if free and x.derived:
        t.frozen.add(node)
        return
    if free and not t.policy.residual:
        t.pin_value(x, node, "normalised over, and the recipe keeps such streams", free)
        return
    for d in free:
        t.role("residual", x.atoms[d])
        t.contract(node, [(source, d)], "what is removed would not be zero under the norm")


def kept_share(c: Cut, x: Value, dims: Sequence[int]) -> float:
    """The share r of what lies in `dims` that is left."""
    return math.prod(c.count(x.atoms[d], x.shape[d]) for d in dims) / math.prod(x.shape[d] for d in dims)


def centre_and_scale(c: Cut, source: Any, dims: list[int], ratio: float, eps: float) -> fx.Node:
    """(x − mean)/√(var + eps) over `dims`, of which the share `ratio` is left and the rest was zero."""
    mean = c.call(aten.mul.Tensor, c.call(aten.mean.dim, source, dims, True), ratio)
    centred = c.call(aten.sub.Tensor, source, mean)
    return c.call(aten.mul.Tensor, centred, c.call(aten.rsqrt.default, variance(c, centred, mean, dims, ratio, eps)))


def variance(c: Cut, centred: fx.Node, mean: fx.Node, dims: list[int], ratio: float, eps: float) -> fx.Node:
    """The variance over `dims`, plus eps, from what is left minus the mean."""
    var = with_absent(c, c.call(aten.mean.dim, c.call(aten.mul.Tensor, centred, centred), dims, True), mean, ratio)
    return c.call(aten.add.Tensor, var, eps) if eps else var


def with_absent(c: Cut, square: fx.Node, mean: fx.Node, ratio: float) -> fx.Node:
    """The mean of squared deviations over all channels, from that of the kept ones, `square`.

    A channel that went was zero, so it deviates from the mean by the mean itself: r·square + (1 − r)·mean².
    """
    absent = c.call(aten.mul.Tensor, c.call(aten.mul.Tensor, mean, mean), 1.0 - ratio)
    return c.call(aten.add.Tensor, c.call(aten.mul.Tensor, square, ratio), absent)
