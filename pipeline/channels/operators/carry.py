"""Where an operator takes a dimension whole: linear in its first operand, and alike at every index of the dimension.

For (node, dim): the output's dimension that holds the first operand's dimension `dim`; None where its indices are mixed
or dropped. Sizes that are dynamic are never compared, which would fix them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import fx

from pipeline.channels.operators.table import bind, find

Size = int | None
"""None: a dynamic one."""


def carried(node: fx.Node, dim: int) -> int | None:
    """As above, by the node's card; None where that does not say."""
    card = find(node.target)
    if card is None:
        return None
    if card.kind == "permutation" and card.order is not None:
        return card.order(node, len(_sizes(node.args[0]))).index(dim)
    return None if card.carries is None else card.carries(node, dim)


def keeps_constants(node: fx.Node) -> bool:
    """Whether a number added to the first operand is added to the output as well: a sum multiplies it."""
    card = find(node.target)
    return card is not None and (card.moves or card.averages)


def in_place(node: fx.Node, dim: int) -> int | None:
    """Every dimension stays where it is."""
    return dim


def times_number(node: fx.Node, dim: int) -> int | None:
    """Multiplied or divided by one number, and not rounded."""
    return None if isinstance(node.args[1], fx.Node) or bind(node).get("rounding_mode") else dim


def beside(node: fx.Node, dim: int) -> int | None:
    """Only the dimensions named are changed."""
    return None if dim in _named(node) else dim


def without(node: fx.Node, dim: int) -> int | None:
    """The dimensions named are gone, or of length one."""
    over = _named(node)
    dropped = len(_sizes(node.args[0])) - len(_sizes(node))
    if dim in over or dropped not in (0, len(over)):  # a squeeze may drop some of them only
        return None
    return dim - sum(d < dim for d in over) if dropped else dim


def selected(node: fx.Node, dim: int) -> int | None:
    """One dimension is gone."""
    at = bind(node)["dim"] % len(_sizes(node.args[0]))
    return None if at == dim else dim - (at < dim)


def inserted(node: fx.Node, dim: int) -> int | None:
    """A dimension is put in."""
    return dim + int(dim >= bind(node)["dim"] % len(_sizes(node)))


def expanded(node: fx.Node, dim: int) -> int | None:
    """Dimensions are put in before the first; one that was not of length one keeps its size."""
    return dim + len(_sizes(node)) - len(_sizes(node.args[0]))


def through_view(node: fx.Node, dim: int) -> int | None:
    """A view keeps a dimension whole where the sizes behind it have the same product."""
    before, after = _sizes(node.args[0]), _sizes(node)
    behind = _product(before[dim + 1 :])
    if behind is None or before[dim] is None:
        return None
    for to in range(len(after)):
        if after[to] == before[dim] and _product(after[to + 1 :]) == behind:
            return to
    return None


def _sizes(node: Any) -> tuple[Size, ...]:
    return tuple(size if isinstance(size, int) else None for size in node.meta["val"].shape)


def _product(sizes: Sequence[Size]) -> Size:
    known = [n for n in sizes if n is not None]
    return math.prod(known) if len(known) == len(sizes) else None


def _named(node: fx.Node) -> set[int]:
    a, rank = bind(node), len(_sizes(node.args[0]))
    given = a.get("dim", a.get("dims"))
    if given is None or given == []:
        return set(range(rank))
    return {d % rank for d in ([given] if isinstance(given, int) else given)}
