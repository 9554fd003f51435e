"""Multiply-accumulate operations of an exported graph, per sample.

Counted: what has a count on its card, as convolutions, linear layers, matrix products, einsum, attention, LSTM and GRU
have. Norms, activations and additions are not.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor, fx
from torch.export import ExportedProgram

from pipeline.channels.operators.card import Shape
from pipeline.channels.operators.table import find


def node_macs(node: fx.Node, shape: Shape) -> int:
    """Multiply-accumulates of one node for the whole batch; `shape(node)` gives its tensor's sizes."""
    card = find(node.target) if node.op == "call_function" else None
    return card.macs(node, shape) if card is not None and card.macs is not None else 0


def counted(node: fx.Node) -> bool:
    """Whether the node's multiplications are counted."""
    card = find(node.target) if node.op == "call_function" else None
    return card is not None and card.macs is not None


def concrete(size: Any, batch: int) -> int:
    """A size as a number: symbols have the size that the program was captured at; `batch` where that is not known."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if hint is not None else _substituted(size.node.expr, batch)


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
    """The batch that the program was captured at; 5 (odd and prime) where it is free and nothing says that."""
    inputs = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in inputs:
            val = node.meta.get("val")
            if isinstance(val, Tensor) and val.dim():
                return concrete(val.shape[0], 5)
    return 1
