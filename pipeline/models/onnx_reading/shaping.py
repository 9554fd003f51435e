"""Operators that move or copy elements, and what computes sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.onnx_reading.node import DTYPES, Node
from pipeline.models.onnx_reading.values import (
    Given,
    Known,
    Value,
    axes,
    axis,
    known,
    one_number,
    rank,
    shape,
    sizes,
    tensor,
)

MOST_ELEMENTS = 1 << 28
"""Of a tensor that a file makes out of a shape alone: a gibibyte of floats."""


def checked(node: Node, wanted: Sequence[Any]) -> list[Any]:
    """`wanted`, sizes of a tensor; the node is refused where these are more elements than `MOST_ELEMENTS`."""
    if all(isinstance(one, int) for one in wanted) and math.prod(wanted) > MOST_ELEMENTS:
        node.refuse(f"it makes a tensor of {math.prod(wanted)} elements")
    return list(wanted)


def _shape(node: Node, x: Value) -> Known:
    found = list(shape(x))
    return known(found[slice(node.get("start", 0), node.get("end"))])


def _size(node: Node, x: Value) -> Known:
    return known(math.prod(shape(x)))


def _reshape(node: Node, x: Value, wanted: Value) -> Value:
    target = sizes(node, wanted, "sizes")
    if not node.get("allowzero", 0):
        here = shape(x)
        target = [
            here[at] if isinstance(one, int) and one == 0 and at < len(here) else one for at, one in enumerate(target)
        ]
    if isinstance(x, Known):
        return Known(x.array.reshape(target), x.dtype)
    return x.reshape(target)


def _flatten(node: Node, x: Value) -> Value:
    at = node.get("axis", 1)
    x = tensor(x)
    at = at + x.ndim if at < 0 else at
    if at == 0:
        return x.reshape(1, -1)
    if at == 1:
        return x.flatten(1) if x.ndim > 1 else x.unsqueeze(1)
    return x.flatten(0, at - 1).flatten(1) if at < x.ndim else x.flatten().unsqueeze(1)


def _transpose(node: Node, x: Value) -> Value:
    order = node.get("perm", list(range(rank(x)))[::-1])
    if isinstance(x, Known):
        return Known(x.array.transpose(order), x.dtype)
    return x if order == list(range(x.ndim)) else x.permute(order)


def _squeeze(node: Node, x: Value, given: Given = None) -> Value:
    wanted = axes(node, given, rank(x))
    if wanted is None:
        wanted = [at for at, one in enumerate(shape(x)) if isinstance(one, int) and one == 1]
    if isinstance(x, Known):
        return Known(np.squeeze(x.array, tuple(wanted)), x.dtype)
    for at in wanted:
        if x.shape[at] != 1:
            node.refuse(f"axis {at} is of size {x.shape[at]}, not 1")
    return x.squeeze(wanted) if wanted else x


def _unsqueeze(node: Node, x: Value, given: Given = None) -> Value:
    held = node.get("axes")
    wanted = sizes(node, given, "axes") if held is None else held
    total = rank(x) + len(wanted)
    places = sorted(axis(node, one, total) for one in wanted)
    if isinstance(x, Known):
        return Known(np.expand_dims(x.array, tuple(places)), x.dtype)
    for at in places:
        x = x.unsqueeze(at)
    return x


def _concat(node: Node, *values: Value) -> Value:
    at = node.get("axis", 1)
    if all(isinstance(one, Known) for one in values):
        return Known(np.concatenate([one.array for one in values], at), values[0].dtype)  # type: ignore[union-attr]
    tensors = [tensor(one) for one in values]
    return torch.cat(tensors, at) if len(tensors) > 1 else tensors[0]


def _concat_repeated(node: Node, *values: Value) -> Value:
    """Concat of samples and of constants that stand for each of them."""
    tensors = [tensor(one) for one in values]
    batch = next((one.shape[0] for one in tensors if not isinstance(one.shape[0], int) or one.shape[0] != 1), 1)
    repeated = [one.expand(batch, *one.shape[1:]) for one in tensors]
    return torch.cat(repeated, node.get("axis", 1))


def _split(node: Node, x: Value, given: Given = None) -> tuple[Value, ...]:
    at = axis(node, node.get("axis", 0), rank(x))
    parts = node.get("split") or sizes(node, given, "parts")
    total, count = shape(x)[at], len(node.outputs)
    if not parts:
        step = -(-total // count)
        parts = [step] * (count - 1) + [total - step * (count - 1)]
    if isinstance(x, Known):
        ends = np.cumsum(parts)[:-1]
        return tuple(Known(one, x.dtype) for one in np.split(x.array, ends, at))
    return tuple(torch.split(x, parts, at))


def _split_to_sequence(node: Node, x: Tensor, given: Given = None) -> list[Tensor]:
    at = axis(node, node.get("axis", 0), x.ndim)
    if given is None:
        parts = list(torch.split(x, 1, at))
        return parts if node.get("keepdims", 1) else [one.squeeze(at) for one in parts]
    wanted = sizes(node, given, "parts")
    return list(torch.split(x, wanted[0] if rank(given) == 0 else wanted, at))


def _sequence_at(node: Node, parts: list[Tensor], at: Value) -> Tensor:
    return parts[int(one_number(node, at, "place"))]


def _sequence_construct(node: Node, *parts: Value) -> list[Tensor]:
    return [tensor(one) for one in parts]


def _concat_from_sequence(node: Node, parts: list[Tensor]) -> Tensor:
    return (torch.stack if node.get("new_axis", 0) else torch.cat)(parts, node.get("axis"))


def _sequence_length(node: Node, parts: list[Tensor]) -> Known:
    return known(len(parts))


def _slice(
    node: Node, x: Value, starts: Given = None, ends: Given = None, along: Given = None, steps: Given = None
) -> Value:
    first = node.get("starts") if starts is None else sizes(node, starts, "bounds")
    last = node.get("ends") if ends is None else sizes(node, ends, "bounds")
    places = axes(node, along, rank(x))
    places = list(range(len(first))) if places is None else places
    strides = [1] * len(first) if steps is None else sizes(node, steps, "steps")
    for start, end, at, step in zip(first, last, places, strides, strict=True):
        if isinstance(x, Known):
            held: list[Any] = [slice(None)] * x.array.ndim
            held[at] = slice(start, None if step < 0 and end < -x.array.shape[at] else end, step)
            x = Known(x.array[tuple(held)], x.dtype)
        elif step < 0:
            x = _backwards(x, at, start, end, step)
        elif not (isinstance(start, int) and start == 0 and isinstance(end, int) and end >= 2**31 - 1 and step == 1):
            x = _forwards(x, at, start, end, step)
    return x


def _forwards(x: Tensor, at: int, start: Any, end: Any, step: int) -> Tensor:
    # Indexing would write a slice of every axis before this one into a captured graph.
    made: Tensor = torch.ops.aten.slice.Tensor(x, at, start, end, step)
    return made


def _backwards(x: Tensor, at: int, start: Any, end: Any, step: int) -> Tensor:
    """torch has no slices with a negative step: those elements in order, then turned round."""
    size = x.shape[at]
    start = min(start + size if start < 0 else start, size - 1)
    end = max(end + size if end < 0 else end, -1)
    count = max(0, -(-(start - end) // -step))
    if count == 0:
        return x.narrow(at, 0, 0)
    lowest = start + step * (count - 1)
    return torch.flip(_forwards(x, at, lowest, start + 1, -step), [at])


def _expand(node: Node, x: Value, wanted: Value) -> Value:
    target = sizes(node, wanted, "sizes")
    here: list[Any] = list(shape(x))
    full = max(len(target), len(here))
    here, target = [1] * (full - len(here)) + here, [1] * (full - len(target)) + target
    made = [theirs if isinstance(one, int) and one == 1 else one for one, theirs in zip(here, target, strict=True)]
    checked(node, made)
    return Known(np.broadcast_to(x.array, made), x.dtype) if isinstance(x, Known) else x.expand(made)


def _tile(node: Node, x: Value, times: Value) -> Value:
    counts = sizes(node, times, "repeats")
    checked(node, [one * count for one, count in zip(shape(x), counts, strict=False)])
    return Known(np.tile(x.array, counts), x.dtype) if isinstance(x, Known) else x.repeat(counts)


def _constant_of_shape(node: Node, wanted: Value) -> Value:
    target = checked(node, sizes(node, wanted, "sizes"))
    fill, dtype = node.get("value") or (0.0, torch.float32)
    if (
        rank(wanted) == 1
        and len(target) <= 1
        and all(isinstance(one, int) for one in target)
        and math.prod(target) < 1024
    ):
        return known([fill] * target[0], dtype) if target else known(fill, dtype)
    return torch.full(target, fill, dtype=dtype)


def _range(node: Node, start: Value, limit: Value, step: Value) -> Value:
    first, last, by = (one_number(node, one, "bounds") for one in (start, limit, step))
    dtype = start.dtype
    if all(isinstance(one, int) for one in (first, last, by)) and by and (last - first) // by < 64:
        return known(list(range(first, last, by)), dtype)
    if all(isinstance(one, int | float) and math.isfinite(one) for one in (first, last, by)):
        checked(node, [math.ceil((last - first) / (by or 1))])
    return torch.arange(first, last, by, dtype=dtype)


def _pad(node: Node, x: Tensor, pads: Given = None, value: Given = None, along: Given = None) -> Tensor:
    amounts = node.get("pads") or node.get("paddings") or sizes(node, pads, "amounts")
    fill = node.get("value", 0.0) if value is None else one_number(node, value, "value")
    mode = node.get("mode", "constant")
    places = axes(node, along, x.ndim)
    places = list(range(x.ndim)) if places is None else places
    ends = [(0, 0)] * x.ndim
    for at, place in enumerate(places):
        ends[place] = (amounts[at], amounts[at + len(places)])
    return padded(node, x, ends, mode, fill)


def padded(node: Node, x: Tensor, ends: list[tuple[Any, Any]], mode: str = "constant", fill: float = 0.0) -> Tensor:
    """`x` with `ends` (before, after) added to each axis; negative ones cut."""
    touched = [at for at, pair in enumerate(ends) if any(not isinstance(one, int) or one for one in pair)]
    if not touched:
        return x
    checked(node, [size + before + after for size, (before, after) in zip(x.shape, ends, strict=True)])
    reversed_ends = [amount for pair in ends[touched[0] :][::-1] for amount in pair]
    if mode == "constant":
        return F.pad(x, reversed_ends, value=fill)
    name = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}.get(mode)
    if name is None:
        node.refuse(f"its mode {mode} is not read")
    spatial = [amount for pair in ends[2:][::-1] for amount in pair]
    if touched[0] < 2 or not 3 <= x.ndim <= 5:
        node.refuse(f"padding by {mode} of axis {touched[0]} is not read")
    return F.pad(x, spatial, mode=name)


def _depth_to_space(node: Node, x: Tensor) -> Tensor:
    block = node.get("blocksize")
    if node.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    _, channels, height, width = x.shape
    parts = x.reshape(-1, block, block, channels // block**2, height, width)
    return parts.permute(0, 3, 4, 1, 5, 2).reshape(-1, channels // block**2, height * block, width * block)


def _space_to_depth(node: Node, x: Tensor) -> Tensor:
    block = node.get("blocksize")
    _, channels, height, width = x.shape
    parts = x.reshape(-1, channels, height // block, block, width // block, block)
    return parts.permute(0, 3, 5, 1, 2, 4).reshape(-1, channels * block**2, height // block, width // block)


def _constant(node: Node) -> Value:
    """What a Constant node holds."""
    for name, value in node.attributes.items():
        if isinstance(value, Tensor):
            return value
        if name in ("value_int", "value_ints"):
            return known(value)
        if name in ("value_float", "value_floats"):
            return torch.tensor(value, dtype=torch.float32)
    return node.refuse("its kind of value is not read")


def _identity(node: Node, x: Any, *_more: Given) -> Any:
    return x


def _eye_like(node: Node, x: Value) -> Tensor:
    rows, columns = sizes(node, known(list(shape(x))), "sizes")
    dtype = DTYPES.get(node.get("dtype"), x.dtype)
    at = torch.arange(rows).unsqueeze(1), torch.arange(columns).unsqueeze(0)
    made: Tensor = at[1] - at[0] == node.get("k", 0)
    return made.to(dtype)


def _trilu(node: Node, x: Value, offset: Given = None) -> Tensor:
    k = 0 if offset is None else int(one_number(node, offset, "diagonal"))
    return (torch.triu if node.get("upper", 1) else torch.tril)(tensor(x), k)


def _on_tensor(form: Callable[..., Any]) -> Callable[..., Any]:
    def read(node: Node, x: Value, *more: Given) -> Any:
        return form(node, tensor(x), *more)

    return read


TABLE: Mapping[str, Callable[..., Any]] = {
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Shape": _shape,
    "Size": _size,
    "Identity": _identity,
    "Dropout": _identity,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": _concat,
    "concat_repeated": _concat_repeated,
    "Split": _split,
    "SplitToSequence": _on_tensor(_split_to_sequence),
    "SequenceAt": _sequence_at,
    "SequenceConstruct": _sequence_construct,
    "SequenceLength": _sequence_length,
    "ConcatFromSequence": _concat_from_sequence,
    "Slice": _slice,
    "Expand": _expand,
    "Tile": _tile,
    "Pad": _on_tensor(_pad),
    "DepthToSpace": _on_tensor(_depth_to_space),
    "SpaceToDepth": _on_tensor(_space_to_depth),
    "EyeLike": _eye_like,
    "Trilu": _trilu,
}
