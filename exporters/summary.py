"""What an ONNX file holds, read without loading its weights into memory twice or running it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict

from foundation.errors import ExportError, first_line
from foundation.links import leaves

# Integers of these types are shapes, indices and masks, never weights.
_NOT_WEIGHTS = {onnx.TensorProto.INT64, onnx.TensorProto.BOOL, onnx.TensorProto.STRING}


class TensorSpec(BaseModel):
    """An input or output: name, ONNX element type ("float", "int64", ...), and shape; a dynamic dimension is a name."""

    model_config = ConfigDict(frozen=True)

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class OnnxSummary(BaseModel):
    """What an ONNX file holds.

    `parameters` counts the elements of all initialisers but those of type int64, bool and string (shapes, indices,
    masks); `bytes` is the size on disk, external data included; `operators` maps an operator ("Conv", or
    "com.microsoft:FusedConv" outside the standard) to how many nodes use it, subgraphs included.
    """

    model_config = ConfigDict(frozen=True)

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: int
    parameters: int
    bytes: int
    external_files: tuple[str, ...]
    operators: dict[str, int]
    metadata: dict[str, str]


def describe(path: Path) -> OnnxSummary:
    """Summarise the ONNX file at `path`. Raises ExportError when it is no readable ONNX model."""
    model = read_graph(path)
    external = external_files(model, path)
    initialised = {tensor.name for tensor in model.graph.initializer}
    tensors = [tensor for graph in _graphs(model.graph) for tensor in graph.initializer]
    tensors += [tensor for node in _nodes(model) for tensor in _constants(node)]
    return OnnxSummary(
        inputs=tuple(_spec(value) for value in model.graph.input if value.name not in initialised),
        outputs=tuple(_spec(value) for value in model.graph.output),
        opset=next((entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"}), 0),
        parameters=sum(math.prod(tensor.dims) for tensor in tensors if tensor.data_type not in _NOT_WEIGHTS),
        bytes=path.stat().st_size + sum((path.parent / name).stat().st_size for name in external),
        external_files=external,
        operators=operators(model),
        metadata={entry.key: entry.value for entry in model.metadata_props},
    )


def read_graph(path: Path) -> onnx.ModelProto:
    """The model at `path` without its external data. Raises ExportError when it is no readable ONNX model."""
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise ExportError(f"{path} cannot be read as ONNX: {first_line(error)}", "Give an .onnx file.") from error
    if not model.opset_import or not model.graph.output:
        raise ExportError(f"{path} holds no ONNX model.", "Give an .onnx file.")
    return model


def external_files(model: onnx.ModelProto, path: Path) -> tuple[str, ...]:
    """The names of the files beside `path` that hold its weights, sorted.

    Raises ExportError for a name that leaves the folder, a missing file, and one too short for what it should hold.
    """
    ends: dict[str, int] = {}
    for graph in _graphs(model.graph):
        for tensor in graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                entries = {entry.key: entry.value for entry in tensor.external_data}
                name, numbers = entries.get("location", ""), [entries.get(key, "0") for key in ("offset", "length")]
                if not name or not all(number.isascii() and number.isdecimal() for number in numbers):
                    raise ExportError(
                        f"{path} does not say where the weights {tensor.name} lie.", "Do not use this file."
                    )
                ends[name] = max(sum(map(int, numbers)), ends.get(name, 0))
    for name, end in ends.items():
        if leaves(path.parent, name):
            raise ExportError(f"{path} points to weights outside its folder ({name}).", "Do not use this file.")
        if not (path.parent / name).is_file():
            raise ExportError(f"{path} keeps its weights in {name}, which is missing.", f"Put {name} beside it.")
        if (size := (path.parent / name).stat().st_size) < end:
            raise ExportError(f"{path} needs {end} bytes of {name}, which has {size}.", f"Fetch {name} again.")
    return tuple(sorted(ends))


def operators(model: onnx.ModelProto) -> dict[str, int]:
    """How many nodes use each operator, the most frequent first; the standard domain goes unnamed."""
    counts = Counter(
        node.op_type if node.domain in {"", "ai.onnx"} else f"{node.domain}:{node.op_type}" for node in _nodes(model)
    )
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def domains(model: onnx.ModelProto) -> set[str]:
    """The operator domains that the nodes use."""
    return {node.domain for node in _nodes(model)}


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in _graphs(model.graph):
        yield from graph.node
    for function in model.functions:
        yield from function.node


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and every subgraph below it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner)


def _constants(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    if node.op_type == "Constant":
        yield from (attribute.t for attribute in node.attribute if attribute.name == "value")


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in tensor.shape.dim)
    return TensorSpec(name=value.name, dtype=onnx.TensorProto.DataType.Name(tensor.elem_type).lower(), shape=shape)
