"""Multiply-accumulate operations of an ONNX file, per sample.

Counted: convolutions, matrix products, einsum, attention, LSTM, GRU and RNN, as in the file and whatever its precision.
Norms, activations and additions are not. The sizes are those of a run: the graph is run once on a feed, giving the
shapes of what the counted operators read and write, so onnxruntime's own operators and dynamic sizes are no matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import helper, inliner

from foundation.errors import ValidationError, first_line
from foundation.links import plain_files
from validators.feeds import Feed
from validators.runners import run_unoptimized

Shape = tuple[int, ...]
_SUFFIX = "/leanort_shape"
# An operator whose name holds one of these multiplies; one that is not in the table below cannot be counted.
_MULTIPLYING = ("Attention", "Conv", "Einsum", "GRU", "Gemm", "LSTM", "MatMul", "MoE", "RNN")


class _UnknownError(Exception):
    """The operator multiplies, but how often cannot be told."""


@dataclass(frozen=True)
class _Node:
    """One node with the shapes of its inputs and outputs; None stands for what is left out."""

    operator: str
    inputs: Sequence[Shape | None]
    outputs: Sequence[Shape | None]
    attributes: Mapping[str, Any]

    def shape(self, at: int) -> Shape:
        found = self.inputs[at] if at < len(self.inputs) else None
        if found is None:
            raise _UnknownError
        return found

    def has(self, at: int) -> bool:
        return at < len(self.inputs) and self.inputs[at] is not None

    @property
    def output(self) -> Shape:
        if self.outputs[0] is None:
            raise _UnknownError
        return self.outputs[0]


def count_macs(path: Path, feed: Feed) -> int | None:
    """Multiply-accumulates of the file at `path` for one sample of `feed`, whose arrays have the batch first.

    None where the file is no ONNX, or holds an operator that multiplies but cannot be counted, be it in a branch or a
    loop: a part of them would look like all. Raises ValidationError when the file cannot be read or run.
    """
    if path.suffix == ".ort":
        return None
    try:
        model = onnx.load(path, load_external_data=False)
        model = inliner.inline_local_functions(model) if model.functions else model
    except Exception as error:  # protobuf's and onnx's own classes share no base
        raise ValidationError(f"{path} cannot be read: {first_line(error)}") from error
    nodes = [node for node in model.graph.node if _multiplies(node)]
    if any(_multiplies(node) for top in model.graph.node for node in _inside(top)):
        return None
    shapes = _shapes(model, path, nodes, feed)
    total = 0
    for node in nodes:
        count = _COUNT.get(node.op_type)
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        inputs, outputs = ([shapes[name] if name else None for name in names] for names in (node.input, node.output))
        try:
            if count is None:
                return None
            total += count(_Node(node.op_type, inputs, outputs, attributes))
        except (_UnknownError, IndexError, KeyError):
            return None
    batch = next((len(array) for array in feed.arrays.values() if array.ndim), 1)
    return total // max(1, batch)


def _multiplies(node: onnx.NodeProto) -> bool:
    return any(word in node.op_type for word in _MULTIPLYING)


def _inside(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a node's subgraphs."""
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield inner
                yield from _inside(inner)


def _shapes(model: onnx.ModelProto, path: Path, nodes: Sequence[onnx.NodeProto], feed: Feed) -> dict[str, Shape]:
    """Tensor -> its shape on `feed`, for all that `nodes` read and write."""
    known = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    wanted = [name for node in nodes for name in (*node.input, *node.output) if name and name not in known]
    wanted = list(dict.fromkeys(wanted))
    if not wanted:
        return known
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    for name in wanted:
        probe.graph.node.append(helper.make_node("Shape", [name], [name + _SUFFIX]))
        probe.graph.output.append(helper.make_tensor_value_info(name + _SUFFIX, onnx.TensorProto.INT64, None))
    try:
        with plain_files(path) as plain:
            found = run_unoptimized(probe, [name + _SUFFIX for name in wanted], feed.arrays, folder=plain.parent)
    except Exception as error:  # onnxruntime's exception classes share no base of their own
        raise ValidationError(f"{path}: its MACs cannot be counted: {first_line(error)}") from error
    return known | {name: tuple(int(n) for n in shape) for name, shape in zip(wanted, found, strict=True)}


def _convolution(node: _Node) -> int:
    weight = node.shape(3 if node.operator == "QLinearConv" else 1)
    positions = node.shape(0) if node.operator == "ConvTranspose" else node.output
    return math.prod(positions) * math.prod(weight[1:])  # inputs (transposed: outputs) of one group x kernel


def _matmul(node: _Node) -> int:
    left = node.shape(0)
    return math.prod(node.output) * left[-2 if node.attributes.get("transA") and len(left) > 1 else -1]


def _matmul_bits(node: _Node) -> int:
    return math.prod(node.output) * int(node.attributes["K"])


def _gemm(node: _Node) -> int:
    return math.prod(node.output) * node.shape(0)[0 if node.attributes.get("transA") else 1]


def _einsum(node: _Node) -> int:
    terms = node.attributes["equation"].decode().replace(" ", "").partition("->")[0].split(",")
    sizes: dict[str, int] = {}
    for at, term in enumerate(terms):
        shape = node.shape(at)
        before, dots, after = term.partition("...")
        free = len(shape) - len(before) - len(after)
        names = [*before, *(f"...{free - i}" for i in range(free) if dots), *after]
        for name, size in zip(names, shape, strict=True):
            sizes[name] = max(size, sizes.get(name, 1))
    return math.prod(sizes.values()) * (len(terms) - 1)


def _attention(node: _Node) -> int:
    """ONNX's own: (batch, heads, length, size), or (batch, length, heads x size) with the heads as attributes."""
    query, key, value = (node.shape(at) for at in range(3))
    past = node.shape(4)[-2] if node.has(4) else 0
    if len(query) == 4:
        return math.prod(query[:-1]) * (key[-2] + past) * (query[-1] + value[-1])
    heads, shared = (int(node.attributes[name]) for name in ("q_num_heads", "kv_num_heads"))
    return query[0] * query[1] * (key[1] + past) * (query[2] + heads * value[2] // shared)


def _microsoft_attention(node: _Node) -> int:
    """onnxruntime's fused one: a product for query, key and value at once, then attention. No past."""
    hidden, weight = node.shape(0), node.shape(1)
    if node.has(4):
        raise _UnknownError
    sizes = node.attributes.get("qkv_hidden_sizes") or [weight[-1] // 3] * 3
    return math.prod(hidden) * weight[-1] + hidden[0] * hidden[1] ** 2 * (int(sizes[0]) + int(sizes[2]))


def _multi_head(node: _Node) -> int:
    """onnxruntime's attention after its products: query (batch, length, size), key and value alike. No past."""
    query = node.shape(0)
    if node.has(6) or node.has(7) or len(query) != 3:
        raise _UnknownError
    key, value = node.shape(1), node.shape(2)
    if len(key) == 3:
        return query[0] * query[1] * key[1] * (query[2] + value[2])
    return query[0] * query[1] * key[2] * (query[2] + value[1] * value[3])  # (batch, heads, length, size)


def _recurrent(node: _Node) -> int:
    steps, batch = node.shape(0)[:2]
    return steps * batch * (math.prod(node.shape(1)) + math.prod(node.shape(2)))


def _of_domain(standard: Callable[[_Node], int], microsoft: Callable[[_Node], int]) -> Callable[[_Node], int]:
    """Two operators of one name, told apart by what they read: onnxruntime's takes a matrix as its second input."""
    return lambda node: (microsoft if len(node.shape(1)) == 2 else standard)(node)


_COUNT: Mapping[str, Callable[[_Node], int]] = {
    **dict.fromkeys(
        ["Conv", "ConvInteger", "ConvTranspose", "FusedConv", "NhwcConv", "NhwcFusedConv", "QLinearConv"], _convolution
    ),
    **dict.fromkeys(
        [
            "DynamicQuantizeMatMul",
            "FusedMatMul",
            "FusedMatMulActivation",
            "MatMul",
            "MatMulInteger",
            "MatMulIntegerToFloat",
            "QLinearMatMul",
            "TransposeMatMul",
        ],
        _matmul,
    ),
    "MatMulNBits": _matmul_bits,
    **dict.fromkeys(["FusedGemm", "Gemm", "QGemm"], _gemm),
    "Einsum": _einsum,
    "Attention": _of_domain(_attention, _microsoft_attention),
    "MultiHeadAttention": _multi_head,
    **dict.fromkeys(["GRU", "LSTM", "RNN"], _recurrent),
}
