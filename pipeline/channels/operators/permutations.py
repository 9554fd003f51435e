"""Dimensions in another order, and dimensions of length one put in or dropped: channels keep their order."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from pipeline.channels.operators.card import Card
from pipeline.channels.operators.carry import inserted, without
from pipeline.channels.operators.cut import Cut
from pipeline.channels.operators.movement import depends_moved
from pipeline.channels.operators.table import bind, family, find
from pipeline.channels.operators.trace import Trace
from pipeline.channels.operators.values import Value

aten = torch.ops.aten


def _permuted(node: fx.Node, rank: int) -> list[int]:
    return [d % rank for d in bind(node)["dims"]]


def _two_exchanged(node: fx.Node, rank: int) -> list[int]:
    order = list(range(rank))
    dims: Any = node.args[1:3]
    i, j = (int(d) % rank for d in dims)
    order[i], order[j] = order[j], order[i]
    return order


def _last_two_exchanged(node: fx.Node, rank: int) -> list[int]:
    order = list(range(rank))
    if rank > 1:
        order[-2:] = order[-1], order[-2]
    return order


def _moved(node: fx.Node, rank: int) -> list[int]:
    """Asked of the operator itself."""
    moved = node.target(torch.empty(tuple(range(1, rank + 1))), *node.args[1:])  # type: ignore[operator]
    return [n - 1 for n in moved.shape]


@family(Card("permutation", order=_permuted, depends=depends_moved), "permute", "permute_copy")
@family(Card("permutation", order=_two_exchanged, depends=depends_moved), "transpose", "swapaxes", "swapdims")
@family(Card("permutation", order=_last_two_exchanged, depends=depends_moved), "t", "numpy_T", "mT")
@family(
    Card("arrangement", order=_last_two_exchanged, depends=depends_moved), "matrix_H", "adjoint", "mH"
)  # conjugates
@family(Card("permutation", order=_moved, depends=depends_moved), "movedim", "moveaxis")
def permute(t: Trace, node: fx.Node) -> Value:
    """Dimensions in the order that the card says."""
    x = t.value(node.args[0])
    card = find(node.target)
    assert card is not None and card.order is not None
    return x.pick(card.order(node, len(x.shape)))


@family(Card("arrangement", depends=depends_moved, carries=inserted), "unsqueeze")
def unsqueeze(t: Trace, node: fx.Node) -> Value:
    """A new dimension of length one."""
    x = t.value(node.args[0])
    order = list(range(len(x.shape)))
    order.insert(bind(node)["dim"] % (len(order) + 1), -1)
    return x.pick(order)


def edit_squeeze(c: Cut, node: fx.Node) -> None:
    """A squeeze of every length-one dimension must not take one that has become so."""
    x = c.value(node.args[0])
    overload = node.target._overloadname  # type: ignore[union-attr]
    if overload == "default":
        ones = [d for d, n in enumerate(x.shape) if n == 1]
        c.retarget(node, aten.squeeze.dims, (c.new_of[node.args[0]], ones))  # type: ignore[index]


@family(Card("arrangement", edit=edit_squeeze, depends=depends_moved, carries=without), "squeeze")
def squeeze(t: Trace, node: fx.Node) -> Value:
    """Length-one dimensions dropped."""
    x = t.value(node.args[0])
    dims = bind(node).get("dim")
    named = range(len(x.shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    drop = {d % len(x.shape) for d in named if x.shape[d] == 1}
    if dims is not None:
        for d in named:  # a dimension named here but longer than one must not shrink to one
            if x.shape[d] > 1:
                t.pin(x.atoms[d], node, "squeezed when it has one index left")
    return x.pick([d for d in range(len(x.shape)) if d not in drop])
