"""Channel shuffle: view, permute, view back. Together they permute one dimension.

Taken apart they would tie channels in powers of two, because each index lands where another came from.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import fx

from pipeline.channels.operators.table import find, kind_of
from pipeline.channels.operators.views import Shuffle

Shape = Callable[[fx.Node], tuple[int, ...]]


def find_shuffles(graph: fx.Graph, shape: Shape) -> tuple[dict[fx.Node, Shuffle], set[fx.Node]]:
    """(last view of each shuffle -> what it does to the first one's operand; the nodes before it in the shuffle)."""
    found: dict[fx.Node, Shuffle] = {}
    between: set[fx.Node] = set()
    for node in graph.nodes:
        if kind_of(node) == "view":
            hit = _shuffle(node, shape)
            if hit is not None:
                last, found[last] = hit
                step = node
                while step is not last:
                    between.add(step)
                    step = next(iter(step.users))
    return found, between


def _shuffle(first: fx.Node, shape: Shape) -> tuple[fx.Node, Shuffle] | None:
    """The shuffle that the view `first` begins, if it does."""
    source = first.args[0]
    assert isinstance(source, fx.Node)
    before, split = shape(source), shape(first)
    dim = next((d for d, (a, b) in enumerate(zip(before, split, strict=False)) if a != b), None)
    extra = len(split) - len(before)
    if dim is None or extra < 1 or before[dim + 1 :] != split[dim + 1 + extra :]:
        return None  # it does not split one dimension alone
    order = list(range(len(split)))  # dimension k holds what `first` has in dimension order[k]
    node = first
    while True:
        if len(node.users) != 1:
            return None
        node = next(iter(node.users))
        kind = kind_of(node)
        if kind == "view":
            break
        if kind == "permutation":
            card = find(node.target)
            assert card is not None and card.order is not None
            order = [order[d] for d in card.order(node, len(order))]
        elif kind != "same":
            return None
    parts = range(dim, dim + extra + 1)
    outside_fixed = all(order[d] == d for d in range(len(order)) if d not in parts)
    if shape(node) != before or not outside_fixed or order == sorted(order):
        return None
    card = find(node.target)
    if card is None or card.edit is None:  # it is this view's edit that makes one operator of the shuffle
        return None
    # What happens to the indices themselves: numbered, split, permuted, and flat again.
    numbered = np.arange(before[dim]).reshape([split[d] for d in parts])
    return node, Shuffle(source, dim, numbered.transpose([order[d] - dim for d in parts]).reshape(-1))
