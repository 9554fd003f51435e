"""Elements repeated: each copy may go by itself, or lives with the index that it repeats."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from pipeline.channels.operators.card import Card
from pipeline.channels.operators.carry import expanded
from pipeline.channels.operators.cut import Cut
from pipeline.channels.operators.movement import depends_moved
from pipeline.channels.operators.table import bind, family
from pipeline.channels.operators.trace import NoRule, Trace
from pipeline.channels.operators.values import Atoms, Flags, Value


def edit_expand(c: Cut, node: fx.Node) -> None:
    """A written length follows the kept count."""
    value, entries = c.value(node), bind(node)["size"]
    with c.editor.before(c.new_of[node]):
        sizes = [c.size(c.twin(e), c.count(a, n), n) for e, a, n in zip(entries, value.atoms, value.shape, strict=True)]
    c.set(node, size=sizes)


@family(Card("arrangement", edit=edit_expand, depends=depends_moved, carries=expanded), "expand", "broadcast_to")
def expand(t: Trace, node: fx.Node) -> Value:
    """A dimension of length one repeated: each copy may go by itself."""
    return _expand(t, t.value(node.args[0]), t.shape(node))


def _expand(t: Trace, x: Value, shape: tuple[int, ...]) -> Value:
    lead = len(shape) - len(x.shape)
    atoms: list[Atoms | None] = []
    zeros: list[Flags | None] = []
    for d, n in enumerate(shape):
        k = d - lead
        same = k >= 0 and x.shape[k] == n
        atoms.append(x.atoms[k] if same else t.fresh(n) if n > 1 else None)
        zeros.append(x.zeros[k] if same else None)
    return Value(shape, tuple(atoms), tuple(zeros), x.derived)


@family(Card("arrangement", depends=depends_moved), "expand_as")
def expand_as(t: Trace, node: fx.Node) -> Value:
    """Expanded to another tensor's shape: repeated dimensions live with that tensor's."""
    x, other = t.value(node.args[0]), t.value(node.args[1])
    lead = len(other.shape) - len(x.shape)
    atoms, zeros = [], []
    for d, n in enumerate(other.shape):
        k = d - lead
        same = k >= 0 and x.shape[k] == n
        if same:
            t.tie(x.atoms[k], other.atoms[d], node)
        pinned = other.atoms[d] is None or (same and x.atoms[k] is None)
        atoms.append(None if pinned else other.atoms[d])
        zeros.append(x.zeros[k] if same and not pinned else None)
    return Value(other.shape, tuple(atoms), tuple(zeros), x.derived)


def edit_repeat(c: Cut, node: fx.Node) -> None:
    """A dimension of length one repeated as often as copies stay."""
    x, value = c.value(node.args[0]), c.value(node)
    lead = len(value.shape) - len(x.shape)
    with c.editor.before(c.new_of[node]):
        repeats = [
            c.size(c.twin(e), c.count(value.atoms[d], value.shape[d]), value.shape[d])
            if d < lead or x.shape[d - lead] == 1
            else c.twin(e)
            for d, e in enumerate(_repeats(node))
        ]
    c.set(node, **{_repeat_name(node): repeats})


def _repeat_name(node: fx.Node) -> str:
    return "repeats" if "repeats" in bind(node) else "dims"


def _repeats(node: fx.Node) -> list[Any]:
    return list(bind(node)[_repeat_name(node)])


@family(Card("arrangement", edit=edit_repeat, depends=depends_moved), "repeat", "tile")
def repeat(t: Trace, node: fx.Node) -> Value:
    """The whole tensor repeated."""
    x, shape = t.value(node.args[0]), t.shape(node)
    if len(_repeats(node)) != len(shape):
        raise NoRule("repeats fewer dimensions than there are")
    lead = len(shape) - len(x.shape)
    atoms: list[Atoms | None] = []
    zeros: list[Flags | None] = []
    for d, n in enumerate(shape):
        size = x.shape[d - lead] if d >= lead else 1
        old = x.atoms[d - lead] if d >= lead else None
        flags = x.zeros[d - lead] if d >= lead else None
        if size == 1:
            atoms.append(t.fresh(n) if n > 1 else None)
            zeros.append(None)
        else:
            atoms.append(None if old is None else np.tile(old, n // size))
            zeros.append(None if flags is None else np.tile(flags, n // size))
    return Value(shape, tuple(atoms), tuple(zeros), x.derived)


@family(Card("arrangement", depends=depends_moved), "repeat_interleave")
def repeat_interleave(t: Trace, node: fx.Node) -> Value:
    """Each index repeated in place (as grouped-query attention does with its heads)."""
    a = bind(node)
    if "self" not in a or not isinstance(a["repeats"], int) or a["dim"] is None:
        raise NoRule("repeats by a tensor")
    x = t.value(a["self"])
    d = a["dim"] % len(x.shape)
    atoms, zeros = x.atoms[d], x.zeros[d]
    return x.replace_dim(
        d,
        None if atoms is None else np.repeat(atoms, a["repeats"]),
        None if zeros is None else np.repeat(zeros, a["repeats"]),
        t.shape(node)[d],
    )
