"""An ONNX file as nodes and constants: read safely, refused by name where something in it is not read, folded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import inliner
from torch import Tensor

from foundation.links import load_whole
from pipeline.models.onnx_reading.node import DTYPES, Node, NotReadError, read_node, read_tensor
from pipeline.models.onnx_reading.normalization import batch_norm
from pipeline.models.onnx_reading.table import BEFORE_WEIGHTS, READINGS, REASONS
from pipeline.models.onnx_reading.values import Value, known_tensor, tensor

OLDEST = 7
"""Opset; before it, operators broadcast by other rules."""

_SMALL = 1024
"""Elements of a constant of whole numbers that is held as Python numbers."""
FEW = 16
"""Elements of a constant of floats that may be."""

# What moves the numbers of a weight about without changing them: the result is a weight again.
_MOVES = frozenset(
    {"Cast", "Concat", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)
# Of a weight, these make something larger; they stay in the net, so that the weight stays one.
_COPIES = frozenset({"Expand", "Gather", "GatherElements", "GatherND", "Tile"})


class UnreadableError(NotReadError):
    """A whole file that is refused, with a hint of its own."""

    def __init__(self, reason: str, hint: str) -> None:
        self.hint = hint
        super().__init__(reason)


@dataclass(frozen=True)
class GraphInput:
    """An input of the file: its name, its sizes (None or a name: free) and its type.

    `turned`: the file takes images as (batch, height, width, channels), and the module as (batch, channels, height,
    width), which is also how `shape` has them.
    """

    name: str
    shape: tuple[int | str | None, ...]
    dtype: torch.dtype
    turned: bool = False


@dataclass
class Graph:
    """What an ONNX file holds: nodes in order, constants by name, inputs and outputs."""

    nodes: list[Node]
    constants: dict[str, Tensor]
    inputs: list[GraphInput]
    outputs: list[str]
    computed: set[str] = field(default_factory=set)
    """Constants that are results of arithmetic, not numbers of the file."""
    transposed: dict[str, str] = field(default_factory=dict)
    """A constant that is a matrix of the file transposed -> the name of that one."""

    def readers(self) -> dict[str, list[tuple[Node, int]]]:
        """Who reads each value, and as which input."""
        found: dict[str, list[tuple[Node, int]]] = {}
        for node in self.nodes:
            for slot, name in enumerate(node.inputs):
                if name:
                    found.setdefault(name, []).append((node, slot))
        return found

    def drop_unread(self) -> None:
        """Let go of nodes and constants that nobody reads any more."""
        wanted = set(self.outputs)
        kept = []
        for node in reversed(self.nodes):
            if any(name in wanted for name in node.outputs):
                kept.append(node)
                wanted.update(node.inputs)
        self.nodes[:] = kept[::-1]
        self.constants = {name: value for name, value in self.constants.items() if name in wanted}

    def fresh(self, wanted: str, value: Tensor) -> str:
        """Keep a new constant, as `wanted` or a name like it; return its name."""
        name, number = wanted, 1
        while name in self.constants:
            number += 1
            name = f"{wanted}_{number}"
        self.constants[name] = value
        return name


def as_value(constant: Tensor, name: str = "", *, numbers: bool = False) -> Value:
    """A constant as its readers get it: numbers where it is sizes, axes or one number that is no weight by its name.

    `numbers` asks for a few floats as numbers, too.
    """
    flat = constant.ndim <= 1
    if flat and constant.numel() <= (_SMALL if not constant.is_floating_point() else FEW if numbers else 0):
        return known_tensor(constant)
    return known_tensor(constant) if constant.numel() == 1 and not names_weight(name) else constant


def names_weight(name: str) -> bool:
    """Whether `name` is that of a module's parameter, `part.weight`, and not an exporter's for what a node gives."""
    return "." in name and "/" not in name


def read_file(path: Path) -> Graph:
    """Read the file. Raises NotReadError; OSError, ValueError, protobuf's and onnx's own errors for no ONNX file."""
    proto = load_whole(path)
    if proto.functions:
        proto = inliner.inline_local_functions(proto)
    _check_names(proto.graph)
    opset = next((one.version for one in proto.opset_import if one.domain in ("", "ai.onnx")), 0)
    _check_operators(proto.graph)
    if not opset >= OLDEST:
        raise UnreadableError(
            f"is written for opset {opset}, and opsets from {OLDEST} on are read",
            "Convert it: onnx.version_converter.convert_version(model, 17).",
        )
    rules = onnx.checker.C.CheckerContext()
    rules.ir_version, rules.opset_imports = proto.ir_version, {"": opset}
    for node in proto.graph.node:  # as many inputs as its operator takes, attributes that it has
        onnx.checker.check_node(node, rules)
    if proto.graph.sparse_initializer:
        raise NotReadError("it holds sparse weights, which are not read")
    held = {one.name: read_tensor(one) for one in proto.graph.initializer}
    graph = Graph(
        [read_node(one, opset) for one in proto.graph.node],
        held,
        [_input(one) for one in proto.graph.input if one.name not in held],
        [one.name for one in proto.graph.output],
    )
    _check_order(graph)
    _fold(graph)
    return graph


def _check_names(graph: onnx.GraphProto) -> None:
    """Protobuf hands out as bytes what should be text and is none."""
    values = [*graph.input, *graph.output, *graph.initializer]
    names = [name for node in graph.node for name in (node.name, node.op_type, node.domain, *node.input, *node.output)]
    sizes = [size.dim_param for value in graph.input for size in value.type.tensor_type.shape.dim]
    if any(not isinstance(name, str) for name in (*names, *sizes, *(value.name for value in values))):
        raise NotReadError("a name in it is not text")


def _check_operators(graph: onnx.GraphProto) -> None:
    """Refuse, by name, the first operator that is not read."""
    for node in graph.node:
        said = f"{node.op_type} (node {node.name or 'of ' + ', '.join(node.output)})"
        if node.domain == "com.microsoft" or node.domain.startswith(("com.microsoft.", "com.ms.")):
            raise UnreadableError(
                f"uses onnxruntime's own operator {said}, which cannot be read",
                "Give the file as it was before onnxruntime's optimisation.",
            )
        if node.domain not in ("", "ai.onnx"):
            raise UnreadableError(
                f"uses {said} of the domain {node.domain}, which cannot be read",
                "Export the model with ONNX's own operators alone.",
            )
        if node.op_type in REASONS:
            reason, hint = REASONS[node.op_type]
            raise UnreadableError(f"uses {said}, which cannot be read: it {reason}", hint)
        if node.op_type not in READINGS and node.op_type not in BEFORE_WEIGHTS:
            raise UnreadableError(
                f"uses {said}, which cannot be read",
                "Give the PyTorch model that it was made from, or cut that operator off.",
            )


def _check_order(graph: Graph) -> None:
    given = {*graph.constants, *(one.name for one in graph.inputs), ""}
    for node in graph.nodes:
        missing = next((name for name in node.inputs if name not in given), None)
        if missing is not None:
            raise NotReadError(f"{node} reads {missing}, which nothing before it gives")
        given.update(node.outputs)
    missing = next((name for name in graph.outputs if name not in given), None)
    if missing is not None:
        raise NotReadError(f"nothing gives its output {missing}")


def _input(value: onnx.ValueInfoProto) -> GraphInput:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or kind.elem_type not in DTYPES:
        raise NotReadError(f"its input {value.name} is no tensor of numbers")
    if not kind.HasField("shape"):
        raise NotReadError(f"it does not say how many dimensions its input {value.name} has")
    sizes = tuple(one.dim_value if one.HasField("dim_value") else one.dim_param or None for one in kind.shape.dim)
    return GraphInput(value.name, sizes, DTYPES[kind.elem_type])


def _fold(graph: Graph) -> None:
    """Compute once what depends on constants alone."""
    left = []
    for node in graph.nodes:
        inputs = [name for name in node.inputs if name]
        known = all(name in graph.constants for name in inputs)
        made = evaluated(node, [_folded(graph, name) for name in node.inputs]) if known and _folds(node) else None
        # A sequence is left to its readers; a weight that is copied stays the weight that it is.
        if made is None or any(isinstance(one, list) for one in made) or _copies(graph, node, made):
            left.append(node)
            continue
        for name, value in zip(node.outputs, made, strict=False):
            graph.constants[name] = tensor(value).contiguous()
            if node.operator not in (*_MOVES, *_COPIES, "Constant") or any(one in graph.computed for one in inputs):
                graph.computed.add(name)
        if node.operator == "Transpose" and graph.constants[inputs[0]].ndim == 2 and node.get("perm", [1, 0]) == [1, 0]:
            graph.transposed[node.outputs[0]] = inputs[0]
        if node.operator == "Identity" and inputs[0] in graph.transposed:
            graph.transposed[node.outputs[0]] = graph.transposed[inputs[0]]
    graph.nodes[:] = left


def _folds(node: Node) -> bool:
    return node.operator in READINGS or node.operator == "BatchNormalization"


def _folded(graph: Graph, name: str) -> Value | None:
    """A constant as the operators that compute with it while the file is read get it."""
    if not name:
        return None
    constant = graph.constants[name]
    few = constant.ndim <= 1 and constant.numel() <= FEW
    return known_tensor(constant) if few else as_value(constant)


def _copies(graph: Graph, node: Node, made: tuple[Any, ...]) -> bool:
    """Whether the node made more of a weight of the file than it is."""
    if node.operator not in _COPIES:
        return False
    data = graph.constants[node.inputs[0]]
    larger = isinstance(made[0], Tensor) and made[0].numel() > data.numel()
    return larger and data.is_floating_point() and node.inputs[0] not in graph.computed


def evaluated(node: Node, values: list[Any]) -> tuple[Any, ...]:
    """The outputs of `node` for `values`. Raises NotReadError where torch cannot compute them."""
    try:
        with torch.no_grad():
            norm = node.operator == "BatchNormalization"
            made = batch_norm(node, False, *values) if norm else READINGS[node.operator](node, *values)
    except NotReadError:
        raise
    except Exception as error:  # attributes and sizes that do not fit are refused by torch, in its words
        said = next(iter(str(error).splitlines()), type(error).__name__)
        node.refuse(f"{type(error).__name__}: {said}")
    return made if isinstance(made, tuple) else (made,)
