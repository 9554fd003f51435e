"""Channel shuffle: view, permute, view back. Together they permute one dimension; taken apart they would tie channels
in
powers of two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import fx

from pipeline.channels.operators.table import base_name

_VIEWS = ("view", "reshape", "flatten", "unflatten", "_unsafe_view")
_MOVES = ("permute", "transpose", "contiguous", "clone", "swapaxes")


def find_shuffles(
    graph: fx.Graph, shape: Callable[[fx.Node], tuple[int, ...]]
) -> tuple[dict[fx.Node, Any], set[fx.Node]]:
    """Last view of each shuffle -> (the tensor shuffled, its dimension, source index of every place); and the
    nodes between.
    """
    found: dict[fx.Node, Any] = {}
    between: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "call_function" and base_name(node.target) in _VIEWS:
            hit = _shuffle(node, shape)
            if hit is not None:
                last = hit[0]
                found[last] = hit[1]
                step = node
                while step is not last:
                    between.add(step)
                    step = next(iter(step.users))
    return found, between


def _shuffle(first: fx.Node, shape: Callable[[fx.Node], tuple[int, ...]]) -> tuple[fx.Node, Any] | None:
    source = first.args[0]
    before, inside = shape(source), shape(first)  # type: ignore[arg-type]
    dim = next((d for d, (a, b) in enumerate(zip(before, inside, strict=False)) if a != b), None)
    extra = len(inside) - len(before)
    if dim is None or extra < 1 or before[dim + 1 :] != inside[dim + 1 + extra :]:
        return None
    order = list(range(len(inside)))
    node = first
    while True:
        if len(node.users) != 1:
            return None
        node = next(iter(node.users))
        name = base_name(node.target)
        if name in _VIEWS:
            break
        if name not in _MOVES:
            return None
        order = _moved(node, order)
    split = range(dim, dim + extra + 1)
    outside_fixed = all(order[d] == d for d in range(len(order)) if d not in split)
    if (
        base_name(node.target) not in ("view", "reshape", "_unsafe_view")
        or shape(node) != before
        or not outside_fixed
        or order == sorted(order)
    ):
        return None
    grid = np.arange(before[dim]).reshape([inside[d] for d in split])
    return node, (source, dim, grid.transpose([order[d] - dim for d in split]).reshape(-1))


def _moved(node: fx.Node, order: list[int]) -> list[int]:
    name = base_name(node.target)
    if name == "permute":
        axes: Any = node.args[1]
        return [order[d % len(order)] for d in axes]
    if name in ("transpose", "swapaxes"):
        dims: Any = node.args[1:3]
        i, j = (d % len(order) for d in dims)
        moved = list(order)
        moved[i], moved[j] = moved[j], moved[i]
        return moved
    return order
