"""Multiply-accumulate operations of an exported graph, per sample.

Counted: convolutions, linear layers, matrix products, einsum, attention, LSTM and GRU. Norms, activations and
additions are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from pipeline.channels.operators.contract import parse_einsum
from pipeline.channels.operators.table import base_name, bind

Shape = Callable[[fx.Node], tuple[int, ...]]


def node_macs(node: fx.Node, shape: Shape) -> int:
    """Multiply-accumulates of one node for the whole batch; `shape(node)` gives its tensor's sizes."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return 0
    count = _COUNT.get(base_name(node.target))
    return count(node, shape) if count else 0


def _convolution(node: fx.Node, shape: Shape) -> int:
    a = bind(node)
    weight = shape(a["weight"])
    transposed = "transpose" in str(node.target) or bool(a.get("transposed"))
    per_position = math.prod(weight[1:])  # inputs (transposed: outputs) of one group × kernel
    return math.prod(shape(a["input"]) if transposed else shape(node)) * per_position


def _linear(node: fx.Node, shape: Shape) -> int:
    return math.prod(shape(node)) * shape(bind(node)["input"])[-1]


def _matmul(node: fx.Node, shape: Shape) -> int:
    return math.prod(shape(node)) * shape(node.args[0])[-1]  # type: ignore[arg-type]


def _addmm(node: fx.Node, shape: Shape) -> int:
    return math.prod(shape(node)) * shape(node.args[1])[-1]  # type: ignore[arg-type]


def _attention(node: fx.Node, shape: Shape) -> int:
    a = bind(node)
    query, key, value = shape(a["query"]), shape(a["key"]), shape(a["value"])
    rows = math.prod(query[:-1])
    return rows * key[-2] * (query[-1] + value[-1])


def _einsum(node: fx.Node, shape: Shape) -> int:
    operands: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    letters, _ = parse_einsum(str(node.args[0]), [len(shape(n)) for n in operands])
    size = {
        name: n
        for names, source in zip(letters, operands, strict=True)
        for name, n in zip(names, shape(source), strict=True)
    }
    return math.prod(size.values()) * (len(operands) - 1)


def _recurrent(node: fx.Node, shape: Shape) -> int:
    steps = math.prod(shape(node.args[0])[:2])  # type: ignore[arg-type]
    weights: Any = node.args[2]
    return sum(steps * math.prod(shape(w)) for w in weights if len(shape(w)) == 2)


_COUNT: dict[str, Callable[[fx.Node, Shape], int]] = {
    **dict.fromkeys(
        ["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution"],
        _convolution,
    ),
    "linear": _linear,
    **dict.fromkeys(["matmul", "mm", "bmm", "mv", "dot"], _matmul),
    **dict.fromkeys(["addmm", "baddbmm", "addmv"], _addmm),
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
    **dict.fromkeys(["lstm", "gru", "rnn_tanh", "rnn_relu"], _recurrent),
}


def counted(node: fx.Node) -> bool:
    """Whether the node's multiplications are counted."""
    return node.op == "call_function" and base_name(node.target) in _COUNT


def concrete(size: Any, batch: int) -> int:
    """A size as a number: symbols stand for the batch dimension, taken as `batch`."""
    return size if isinstance(size, int) else _substituted(size.node.expr, batch)


@lru_cache(maxsize=4096)
def _substituted(expression: Any, batch: int) -> int:
    return int(expression.subs(dict.fromkeys(expression.free_symbols, batch)))


def count_macs(program: ExportedProgram) -> int:
    """Multiply-accumulates of `program` for one sample."""
    batch = example_batch(program)

    def shape(node: fx.Node) -> tuple[int, ...]:
        return tuple(concrete(s, batch) for s in node.meta["val"].shape)

    return sum(node_macs(n, shape) for n in program.graph.nodes) // batch


def example_batch(program: ExportedProgram) -> int:
    """The batch to put for the symbols: 5 (odd and prime) where it is dynamic, else the fixed one."""
    inputs = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in inputs:
            val = node.meta.get("val")
            if isinstance(val, Tensor) and val.dim():
                return val.shape[0] if isinstance(val.shape[0], int) else 5
    return 1
