"""Which integers an input takes, read off an ONNX graph.

An input is followed through whatever moves its numbers without changing them (Cast, Reshape, Slice, Concat, ...), or
shifts them by a constant, to what reads them:

- It picks rows of a table (Gather and its kin, OneHot, onnxruntime's EmbedLayerNormalization): 0 to the table's last
  row; of several tables the smallest counts.
- It is a mask: bool, or scaled as (1 - x) or x times a large negative number, or read as an attention's mask: 0 and 1.
  So is an input that nothing but its name calls a mask (`attention_mask`), unless it is 8 or 16 bits wide.
- It is only compared with constants, or clipped by them: values on both sides of each, and far beyond.
- It is 8 or 16 bits wide: all that the type can hold.
- Otherwise it is not known. Some ranges are tried, and a comparison that found no difference on them proves nothing.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import helper, inliner, numpy_helper

from foundation.errors import ValidationError, first_line

Span = tuple[float, float]
Size = int | str

BINARY: Span = (0, 1)
# What is tried where nothing is known.
GUESSES: tuple[Span, ...] = (BINARY, (0, 9), (0, 255), (-1000, 1000), (-1_000_000, 1_000_000))
_FAR: tuple[Span, ...] = ((-1000, 1000), (-1_000_000, 1_000_000))
# A mask is turned into something that drowns all scores by a factor like -1e4, or the type's lowest number.
_DROWNS = 1e3
# Constants of up to so many elements are read; one with more than so many is compared with each of them.
_SMALL = 1 << 17
_ONE_BY_ONE = 8
_MASK = re.compile(r"mask(?![a-z])")

# Operators that hand numbers on as they are -> the inputs that hold them; None: every one.
_CARRIES: Mapping[str, frozenset[int] | None] = {
    **dict.fromkeys(
        [
            "Compress", "DepthToSpace", "Dropout", "Expand", "Flatten", "Gather", "GatherElements", "GatherND",
            "Identity", "ReduceMax", "ReduceMin", "Reshape", "ReverseSequence", "Slice", "SpaceToDepth", "Split",
            "Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze",
        ],
        frozenset({0}),
    ),
    "Concat": None,
    "Pad": frozenset({0, 2}),
    "ScatterElements": frozenset({0, 2}),
    "ScatterND": frozenset({0, 2}),
    "Where": frozenset({1, 2}),
}  # fmt: skip
_COMPARES = frozenset({"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"})
# Where an operator of onnxruntime takes a mask.
_MASK_SLOTS = frozenset(
    {("Attention", 3), ("EmbedLayerNormalization", 7), ("MultiHeadAttention", 4), ("PackedAttention", 3)}
)
# Tables that an EmbedLayerNormalization reads, by the input that picks their rows.
_EMBEDDED = {0: 2, 1: 4, 8: 3}


@dataclass(frozen=True)
class Domain:
    """What an integer input takes: `spans` of values, both ends included, and why.

    `rows` are tables that it picks from, as (size, shift): the value plus shift lies in 0..size-1, where the size may
    be the name of a dynamic dimension. `table` says that the first span is one of rows. `known` is False where the
    spans are guesses. `keeps` is what a mask lets through, 0 or 1, in one whose sense is not known "either"; None for
    what is no mask.
    """

    spans: tuple[Span, ...]
    why: str
    rows: tuple[tuple[Size, int], ...] = ()
    table: bool = False
    known: bool = True
    keeps: Literal[0, 1, "either"] | None = None

    def at(self, sizes: Mapping[str, int]) -> Domain:
        """The domain for given sizes of dynamic dimensions: its first span is then that of the tables' rows."""
        resolved = [(sizes.get(size) if isinstance(size, str) else size, shift) for size, shift in self.rows]
        sized = [(size, shift) for size, shift in resolved if size is not None]
        if not self.rows:
            return self
        if not sized:
            return replace(self, spans=GUESSES, rows=(), known=False)
        low = max(0, *(-shift for _, shift in sized))
        high = max(low, min(size - 1 - shift for size, shift in sized))
        return replace(self, spans=((low, high), *self.spans), rows=(), table=True)


@dataclass
class _Uses:
    """What reads an input's numbers."""

    rows: list[tuple[Size, int]] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)  # constants that it is compared with or clipped by
    bare: bool = False  # a table is read without a clip before it
    keeps: Literal[0, 1] | None = None  # a mask, and what it lets through
    unknown: bool = False


@dataclass(frozen=True)
class _State:
    """A tensor that holds input + shift, or 1 - input (flipped), or a sum of it; clipped on both sides or not."""

    shift: int = 0
    flipped: bool = False
    summed: bool = False
    below: float | None = None
    above: float | None = None

    @property
    def plain(self) -> bool:
        return not (self.flipped or self.summed)

    @property
    def clipped(self) -> bool:
        return self.below is not None and self.above is not None


def integer_domains(path: Path) -> dict[str, Domain]:
    """The domain of each integer and boolean input of the ONNX file at `path`, and of floats that become indices.

    Raises ValidationError when the file cannot be read.
    """
    try:
        model = onnx.load(path, load_external_data=False)
        model = inliner.inline_local_functions(model) if model.functions else model
    except Exception as error:  # protobuf's and onnx's own classes share no base
        raise ValidationError(f"{path} cannot be read: {first_line(error)}") from error
    graph = _Graph(model)
    held = {tensor.name for tensor in model.graph.initializer}
    found = {}
    for value in model.graph.input:
        element = value.type.tensor_type.elem_type
        if value.name in held or not element or element == onnx.TensorProto.STRING:
            continue
        dtype = helper.tensor_dtype_to_np_dtype(element)
        if dtype.kind in "iub":
            found[value.name] = _domain(value.name, dtype, graph.uses(value.name))
        elif dtype.kind == "f" and (uses := graph.uses(value.name)).rows:  # indices that come as floats
            found[value.name] = _domain(value.name, np.dtype(np.int64), uses)
    return found


def without_graph(name: str, dtype: str) -> Domain:
    """The domain of an input by its type and name alone."""
    return _domain(name, np.dtype(dtype), _Uses(unknown=True))


def _domain(name: str, dtype: np.dtype[Any], uses: _Uses) -> Domain:
    called = _MASK.search(name.lower()) is not None
    if uses.rows:
        sizes = " and ".join(dict.fromkeys(str(size) for size, _ in uses.rows))
        beyond = () if uses.bare else _around(uses.limits, dtype)
        return Domain(beyond, f"a table of {sizes} rows", tuple(dict.fromkeys(uses.rows)))
    if dtype.kind == "b":
        return Domain((BINARY,), "bool", keeps="either" if uses.keeps is None else uses.keeps)
    if uses.keeps is not None:
        return Domain((BINARY,), "a mask", keeps=uses.keeps)
    info = np.iinfo(dtype)
    whole: Span = (int(info.min), int(info.max))
    if dtype.itemsize == 1:
        return Domain((whole,), f"all of {dtype}")
    if dtype.itemsize == 2:
        return Domain((BINARY, (0, 255), whole), f"all of {dtype}")
    if called:
        return Domain((BINARY,), "called a mask", keeps="either")
    if not uses.unknown:
        return Domain((BINARY, *_around(uses.limits, dtype)), "compared with constants, or clipped")
    return Domain(_within(GUESSES, whole), "not known", known=False)


def _around(limits: Sequence[float], dtype: np.dtype[Any]) -> tuple[Span, ...]:
    """Values on both sides of the constants that an input is compared with or clipped by, and far beyond."""
    info = np.iinfo(dtype)
    near = (math.floor(min(limits, default=0)) - 3, math.ceil(max(limits, default=1)) + 3)
    return _within((near, *_FAR), (int(info.min), int(info.max)))


def _within(spans: Sequence[Span], whole: Span) -> tuple[Span, ...]:
    """The spans cut down to what a type holds."""
    cut = [(max(low, whole[0]), min(high, whole[1])) for low, high in spans]
    return tuple(dict.fromkeys((low, high) for low, high in cut if low <= high))


class _Graph:
    """Who reads which tensor, the sizes that are known, and the small constants."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        self.shapes: dict[str, list[Size | None]] = {}
        self.constants: dict[str, np.ndarray[Any, np.dtype[Any]]] = {}
        self.outputs = {value.name for value in model.graph.output}
        # It needs no weights. Where it breaks off (more than 2 GB, a node that it takes for wrong), what the file says
        # of its tables remains.
        with contextlib.suppress(Exception):
            model = onnx.shape_inference.infer_shapes(model)
        self._read(model.graph)

    def _read(self, graph: onnx.GraphProto) -> None:
        for value in (*graph.input, *graph.value_info, *graph.output):
            dims = value.type.tensor_type.shape.dim if value.type.tensor_type.HasField("shape") else ()
            self.shapes.setdefault(
                value.name, [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in dims]
            )
        for tensor in graph.initializer:
            self._hold(tensor.name, tensor)
        for node in graph.node:
            for at, name in enumerate(node.input):
                self.readers.setdefault(name, []).append((node, at))
            for attribute in node.attribute:
                if node.op_type == "Constant" and attribute.name == "value":
                    self._hold(node.output[0], attribute.t)
                elif node.op_type == "Constant" and attribute.name in ("value_int", "value_float"):
                    self.constants[node.output[0]] = np.asarray(helper.get_attribute_value(attribute))
                for inner in (attribute.g, *attribute.graphs):
                    if inner.node:
                        self._read(inner)

    def _hold(self, name: str, tensor: onnx.TensorProto) -> None:
        self.shapes[name] = list(tensor.dims)
        if tensor.data_location != onnx.TensorProto.EXTERNAL and math.prod(tensor.dims) <= _SMALL:
            self.constants[name] = numpy_helper.to_array(tensor)

    def number(self, node: onnx.NodeProto, at: int) -> float | None:
        """The constant that every element of an input is, if it is one."""
        array = self.constants.get(node.input[at]) if at < len(node.input) else None
        if array is None or array.dtype.kind not in "iufb" or not array.size or (array != array.flat[0]).any():
            return None
        return float(array.flat[0])

    def _compared(self, node: onnx.NodeProto, at: int) -> np.ndarray[Any, np.dtype[Any]] | None:
        """The constant numbers that an input is, if it is constant."""
        array = self.constants.get(node.input[at])
        return array if array is not None and array.size and array.dtype.kind in "iuf" else None

    def dim(self, node: onnx.NodeProto, at: int, axis: int) -> Size | None:
        """The size of an axis of an input."""
        shape = self.shapes.get(node.input[at], []) if at < len(node.input) else []
        return shape[axis] if -len(shape) <= axis < len(shape) else None

    def uses(self, name: str) -> _Uses:
        """All that reads the numbers of the input `name`."""
        uses = _Uses()
        seen: set[tuple[str, _State]] = set()
        waiting = [(name, _State())]
        while waiting:
            at = waiting.pop()
            if at in seen or len(seen) > 10_000:
                continue
            seen.add(at)
            tensor, state = at
            if tensor in self.outputs:
                uses.unknown = True
            for node, slot in self.readers.get(tensor, []):
                waiting += [(out, after) for out, after in self._read_by(node, slot, state, uses) if out]
        return uses

    def _read_by(self, node: onnx.NodeProto, slot: int, state: _State, uses: _Uses) -> Iterator[tuple[str, _State]]:
        """Note how a node uses a tensor, and give what it hands on."""
        operator = node.op_type
        rows = list(self._rows(node, slot)) if state.plain else []
        carries = _CARRIES.get(operator, frozenset())
        other = self.number(node, 1 - slot) if len(node.input) == 2 and slot < 2 else None
        if operator in ("Shape", "Size"):
            return
        if rows:
            uses.unknown |= None in rows
            uses.bare |= not state.clipped
            uses.rows += [(size, state.shift) for size in rows if size is not None]
        elif (operator, slot) in _MASK_SLOTS:
            uses.keeps = 1
        elif carries is None or slot in carries:
            yield from ((out, state) for out in node.output)
        elif operator == "Cast":
            if _attribute(node, "to", 0) != onnx.TensorProto.BOOL:
                yield node.output[0], state
            elif state.flipped:
                uses.keeps = 1
            else:
                uses.limits += [-state.shift] if state.plain else []
                uses.unknown |= state.summed
        elif operator in _COMPARES and state.plain and (held := self._compared(node, 1 - slot)) is not None:
            low, high = float(held.min()), float(held.max())
            if operator == "Equal" and held.size > _ONE_BY_ONE:  # a one-hot vector by hand
                uses.rows.append((int(high) + 1, state.shift))
                uses.bare = True
            else:
                uses.limits += [low - state.shift, high - state.shift]
        elif operator in ("Clip", "Max", "Min") and state.plain and (ends := self._ends(node, slot)) is not None:
            below, above = (end if end is None else end - state.shift for end in ends)
            uses.limits += [end for end in (below, above) if end is not None]
            both = (state.below if below is None else below, state.above if above is None else above)
            yield node.output[0], _State(state.shift, below=both[0], above=both[1])
        elif operator == "Add" and other is not None and state.plain and other == int(other):
            yield node.output[0], _State(state.shift + int(other), below=state.below, above=state.above)
        elif operator == "Sub" and slot == 0 and other is not None and state.plain and other == int(other):
            yield node.output[0], _State(state.shift - int(other), below=state.below, above=state.above)
        elif operator == "Sub" and slot == 1 and other == 1 and state == _State():
            yield node.output[0], _State(flipped=True)
        elif (
            operator == "Mul"
            and other is not None
            and ((state.flipped and other <= -_DROWNS) or (state.shift == -1 and state.plain and other >= _DROWNS))
        ):
            uses.keeps = 1
        elif operator == "Mul" and other is not None and state == _State() and other <= -_DROWNS:
            uses.keeps = 0
        elif operator == "ReduceSum" and slot == 0 and state == _State():
            yield node.output[0], _State(summed=True)
        elif not state.plain or not state.clipped:
            uses.unknown = True

    def _ends(self, node: onnx.NodeProto, slot: int) -> tuple[float | None, float | None] | None:
        """The bounds that a Clip, Max or Min with constants holds its input in; None where they are none."""
        if node.op_type == "Clip":
            if slot != 0:
                return None
            ends = [self.number(node, at) if at < len(node.input) and node.input[at] else None for at in (1, 2)]
            given = [at < len(node.input) and bool(node.input[at]) for at in (1, 2)]
            return None if any(g and e is None for g, e in zip(given, ends, strict=True)) else (ends[0], ends[1])
        end = self.number(node, 1 - slot) if len(node.input) == 2 else None
        if end is None:
            return None
        return (end, None) if node.op_type == "Max" else (None, end)

    def _rows(self, node: onnx.NodeProto, slot: int) -> Iterator[Size | None]:
        """The sizes of the tables that a node picks from by its input `slot`; None for one that is not known."""
        operator = node.op_type
        if slot == 1 and operator in ("Gather", "GatherElements", "ScatterElements"):
            yield self.dim(node, 0, _attribute(node, "axis", 0))
        elif slot == 1 and operator in ("GatherND", "ScatterND"):
            skipped, depth = _attribute(node, "batch_dims", 0), self.dim(node, 1, -1)
            for axis in range(depth if isinstance(depth, int) else 1):
                yield self.dim(node, 0, skipped + axis)
        elif slot == 1 and operator == "GatherBlockQuantized":
            yield self.dim(node, 0, _attribute(node, "gather_axis", 0))
        elif slot == 0 and operator == "OneHot":
            classes = self.number(node, 1)
            yield None if classes is None else int(classes)
        elif operator == "EmbedLayerNormalization" and slot in _EMBEDDED:
            yield self.dim(node, _EMBEDDED[slot], 0)


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)
