"""Pooling, reductions over axes, and resizing."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.onnx_reading.linear import window_ends
from pipeline.models.onnx_reading.node import Node
from pipeline.models.onnx_reading.shaping import padded
from pipeline.models.onnx_reading.values import (
    Given,
    Known,
    Value,
    applied,
    axes,
    numbers,
    one_number,
    rank,
    sizes,
    tensor,
)

_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE: Mapping[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_ADAPTIVE_AVERAGE: Mapping[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}
_ADAPTIVE_MAX = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}


def _window(node: Node, x: Tensor) -> tuple[list[int], list[int], list[int], list[tuple[int, int]]]:
    """Kernel, strides, dilations, and what is added at both ends of each axis."""
    kernel = node.get("kernel_shape")
    if len(kernel) not in _MAX or any(node.outputs[1:]):
        node.refuse("its number of axes, or its second output, is not read")
    strides, dilations = node.get("strides", [1] * len(kernel)), node.get("dilations", [1] * len(kernel))
    return kernel, strides, dilations, window_ends(node, x, kernel, strides, dilations)


def _max_pool(node: Node, x: Value) -> Tensor:
    x = tensor(x)
    kernel, strides, dilations, ends = _window(node, x)
    padding = [before for before, _ in ends]
    if any(before != after or 2 * before > width for (before, after), width in zip(ends, kernel, strict=True)):
        x, padding = padded(node, x, [(0, 0), (0, 0), *ends], fill=-math.inf), [0] * len(kernel)
    return _MAX[len(kernel)](x, kernel, strides, padding, dilations, bool(node.get("ceil_mode", 0)))


def _average_pool(node: Node, x: Value) -> Tensor:
    x = tensor(x)
    kernel, strides, dilations, ends = _window(node, x)
    if any(one != 1 for one in dilations):
        node.refuse("an average over a dilated window is not read")
    form, ceil, counted = _AVERAGE[len(kernel)], bool(node.get("ceil_mode", 0)), bool(node.get("count_include_pad", 0))
    if all(before == after and 2 * before <= width for (before, after), width in zip(ends, kernel, strict=True)):
        return form(x, kernel, strides, [before for before, _ in ends], ceil, counted)
    around: list[tuple[int, int]] = [(0, 0), (0, 0), *ends]
    whole = form(padded(node, x, around), kernel, strides, 0, ceil)
    if counted:
        return whole
    share = form(padded(node, torch.ones_like(x[:1, :1]), around), kernel, strides, 0, ceil)
    return whole / share


def _global(table: Mapping[int, Callable[..., Tensor]]) -> Callable[..., Tensor]:
    def read(node: Node, x: Value) -> Tensor:
        x = tensor(x)
        if x.ndim - 2 not in table:
            node.refuse(f"pooling over {x.ndim - 2} axes is not read")
        return table[x.ndim - 2](x, 1)

    return read


def _reduction(
    form: Callable[[Tensor, list[int], bool], Tensor], on_numbers: Callable[[Any, Any], Any] | None = None
) -> Callable[..., Value]:
    def read(node: Node, x: Value, given: Given = None) -> Value:
        wanted = axes(node, given, rank(x))
        keep = bool(node.get("keepdims", 1))
        if not wanted:
            if node.get("noop_with_empty_axes", 0):
                return x
            wanted = list(range(rank(x)))
        if isinstance(x, Known) and on_numbers is not None and len(wanted) == rank(x) and x.array.size:
            made = applied(lambda one: one, np.asarray(reduce(on_numbers, x.array.flat), dtype=object))
            return Known(made.reshape([1] * rank(x) if keep else ()), x.dtype)
        return form(tensor(x), wanted, keep) if wanted else tensor(x)

    return read


def _product(x: Tensor, along: list[int], keep: bool) -> Tensor:
    for at in sorted(along, reverse=True):
        x = torch.prod(x, at, keep)
    return x


def _argument(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def read(node: Node, x: Value) -> Tensor:
        if node.get("select_last_index", 0):
            node.refuse("the last of equal elements is not read")
        return form(tensor(x), node.get("axis", 0), bool(node.get("keepdims", 1)))

    return read


def _top_k(node: Node, x: Value, count: Given = None) -> tuple[Tensor, Tensor]:
    k = node.get("k") if count is None else int(one_number(node, count, "count"))
    found = torch.topk(tensor(x), k, node.get("axis", -1), bool(node.get("largest", 1)), bool(node.get("sorted", 1)))
    return found[0], found[1]


def _resize(node: Node, x: Value, *given: Given) -> Tensor:
    x = tensor(x)
    if node.operator == "Upsample":  # until opset 9
        scales, wanted = node.get("scales") or numbers(node, given[0], "scales"), []
        mapped = "asymmetric"
    else:
        given = (None, *given) if node.opset < 11 else given
        scales = numbers(node, given[1], "scales") if len(given) > 1 else []
        wanted = sizes(node, given[2], "sizes") if len(given) > 2 else []
        mapped = "asymmetric" if node.opset < 11 else node.get("coordinate_transformation_mode", "half_pixel")
    places = [at % x.ndim for at in node.get("axes", range(x.ndim))]
    if node.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        node.refuse("keeping the aspect ratio is not read")
    target = list(x.shape)
    for at, place in enumerate(places):
        target[place] = (
            wanted[at] if wanted else math.floor(x.shape[place] * scales[at]) if scales[at] != 1 else x.shape[place]
        )
    if any(not isinstance(a, torch.SymInt) and a != b for a, b in zip(target[:2], x.shape[:2], strict=True)):
        node.refuse("resizing the batch or the channels is not read")
    spatial = target[2:]
    mode = node.get("mode", "nearest")
    if mode == "nearest":
        return _nearest(node, x, spatial, mapped)
    names = {"linear": {3: "linear", 4: "bilinear", 5: "trilinear"}, "cubic": {4: "bicubic"}}
    name = names.get(mode, {}).get(x.ndim)
    if (
        name is None
        or mapped not in ("half_pixel", "pytorch_half_pixel", "align_corners")
        or node.get("exclude_outside", 0)
    ):
        node.refuse(f"mode {mode} with coordinates {mapped} is not read")
    if mode == "cubic" and node.get("cubic_coeff_a", -0.75) != -0.75:
        node.refuse("its cubic_coeff_a is not read")
    if mapped == "pytorch_half_pixel" and any(isinstance(one, int) and one == 1 for one in spatial):
        node.refuse(f"coordinates {mapped} of a side of 1 are not read")
    aligned, smooth = mapped == "align_corners", bool(node.get("antialias", 0))
    if wanted or aligned:
        return F.interpolate(x, spatial, mode=name, align_corners=aligned, antialias=smooth)
    # By the scale that is given, not by what the sizes come to where it is no whole one.
    factors = dict(zip(places, scales, strict=True))
    by = [float(factors.get(place, 1.0)) for place in range(2, x.ndim)]
    return F.interpolate(x, scale_factor=by, mode=name, align_corners=False, antialias=smooth)


def _nearest(node: Node, x: Tensor, spatial: list[Any], mapped: str) -> Tensor:
    rounding = node.get("nearest_mode", "round_prefer_floor" if node.opset >= 11 else "floor")
    whole = _multiples(spatial, x.shape[2:])
    if mapped == "asymmetric" and (rounding == "floor" or (whole and _rounds_down(rounding, spatial, x))):
        return F.interpolate(x, spatial, mode="nearest")
    if mapped in ("half_pixel", "pytorch_half_pixel") and rounding.startswith("round_prefer"):
        if _multiples(x.shape[2:], spatial):
            for at, (before, after) in enumerate(zip(x.shape[2:], spatial, strict=True), start=2):
                step = before // after  # an even one puts every place midway between two elements
                first = (step - 1) // 2 if rounding == "round_prefer_floor" else step // 2
                x = x[(slice(None),) * at + (slice(first, None, step),)]
            return x
        return F.interpolate(x, spatial, mode="nearest" if whole else "nearest-exact")
    return node.refuse(f"mode nearest with coordinates {mapped} and rounding {rounding} is not read")


def _multiples(sides: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether each of `sides` is known to be a whole number of times the one of `others`."""
    pairs = zip(sides, others, strict=True)
    return all(isinstance(a, int) and isinstance(b, int) and b > 0 and a % b == 0 for a, b in pairs)


def _rounds_down(rounding: str, spatial: list[int], x: Tensor) -> bool:
    """Whether rounding to the nearest, ties down, gives what rounding down does: for twice the size it does."""
    return rounding == "round_prefer_floor" and all(a <= 2 * b for a, b in zip(spatial, x.shape[2:], strict=True))


TABLE: Mapping[str, Callable[..., Any]] = {
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global(_ADAPTIVE_AVERAGE),
    "GlobalMaxPool": _global(_ADAPTIVE_MAX),
    "ReduceMean": _reduction(lambda x, along, keep: x.mean(along, keep)),
    "ReduceSum": _reduction(lambda x, along, keep: x.sum(along, keep), operator.add),
    "ReduceMax": _reduction(lambda x, along, keep: x.amax(along, keep), max),
    "ReduceMin": _reduction(lambda x, along, keep: x.amin(along, keep), min),
    "ReduceProd": _reduction(_product, operator.mul),
    "ReduceL1": _reduction(lambda x, along, keep: x.abs().sum(along, keep)),
    "ReduceL2": _reduction(lambda x, along, keep: torch.linalg.vector_norm(x, 2, along, keep)),
    "ReduceSumSquare": _reduction(lambda x, along, keep: x.square().sum(along, keep)),
    "ReduceLogSum": _reduction(lambda x, along, keep: x.sum(along, keep).log()),
    "ReduceLogSumExp": _reduction(lambda x, along, keep: torch.logsumexp(x, along, keep)),
    "ArgMax": _argument(torch.argmax),
    "ArgMin": _argument(torch.argmin),
    "TopK": _top_k,
    "Resize": _resize,
    "Upsample": _resize,
}
