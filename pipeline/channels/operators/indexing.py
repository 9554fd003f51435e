"""Dimensions taken apart by position: a list of indices, reversed, rolled. A known place takes its atom along."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import fx

from pipeline.channels.operators.card import Card
from pipeline.channels.operators.carry import beside
from pipeline.channels.operators.cut import Cut
from pipeline.channels.operators.movement import depends_moved
from pipeline.channels.operators.table import bind, family
from pipeline.channels.operators.trace import NoRule, Trace
from pipeline.channels.operators.values import Flags, Indices, Value


@dataclass(frozen=True, eq=False)
class Picked:
    """Indices of dimension `dim` by a constant list, given as `argument`."""

    dim: int
    places: Indices
    argument: Literal["index", "indices"]


def edit_index(c: Cut, node: fx.Node) -> None:
    """Places in a list of indices move with the indices before them."""
    found = c.note(node, Picked)
    if found is None:  # looked up along dimensions that stay
        return
    atoms = c.value(node.args[0]).atoms[found.dim]
    if c.keep(atoms) is None:
        return
    index = c.editor.constant(f"{node.name}_index", c.moved(atoms, found.places))
    if found.argument == "index":
        c.set(node, index=index)
    else:
        c.set(node, indices=[None] * found.dim + [index])


@family(Card("arrangement", edit=edit_index, depends=depends_moved, carries=beside), "index_select")
def index_select(t: Trace, node: fx.Node) -> Value:
    """Indices of one dimension by a constant list."""
    a = bind(node)
    x = t.value(node.args[0])
    return _pick(t, node, x, a["dim"] % len(x.shape), a["index"], "index")


@family(Card("arrangement", edit=edit_index, depends=depends_moved), "index")
def index(t: Trace, node: fx.Node) -> Value:
    """x[..., i, ...]: a constant list on one channel dimension, or any index on dimensions that stay."""
    x = t.value(node.args[0])
    entries = list(bind(node)["indices"])
    used = [d for d, e in enumerate(entries) if e is not None]
    tables = [t.shape(entries[d]) for d in used]
    if len(used) == 1 and len(tables[0]) == 1 and x.atoms[used[0]] is not None and entries[used[0]] in t.static:
        return _pick(t, node, x, used[0], entries[used[0]], "indices")
    for d in used:
        t.pin(x.atoms[d], node, "looked up by index")
    for d in used:
        if entries[d] not in t.static and entries[d] in t.values:
            t.pin_value(t.value(entries[d]), node, "looked up by index")
    shape = t.shape(node)
    if any(entries[d].meta["val"].dtype == torch.bool for d in used):
        raise NoRule("picked by a mask")
    block = len(np.broadcast_shapes(*tables))
    adjacent = used == list(range(used[0], used[-1] + 1))
    rest = [d for d in range(len(x.shape)) if d not in used]
    at = used[0] if adjacent else 0
    order = rest[:at] + [-1] * block + rest[at:]
    return x.pick(order, shape)


def _pick(t: Trace, node: fx.Node, x: Value, dim: int, source: fx.Node, argument: Literal["index", "indices"]) -> Value:
    atoms, zeros, shape = x.atoms[dim], x.zeros[dim], t.shape(node)
    if atoms is None:
        return x.replace_dim(dim, None, None, shape[dim])
    if source not in t.static or t.static[source].dtype == torch.bool:
        t.pin(atoms, node, "looked up by an index known only at run time")
        return x.replace_dim(dim, None, None, shape[dim])
    picked = t.static[source].numpy() % x.shape[dim]
    t.notes[node] = Picked(dim, picked, argument)
    return x.replace_dim(dim, atoms[picked], None if zeros is None else zeros[picked], shape[dim])


@family(Card("arrangement", depends=depends_moved), "gather")
def gather(t: Trace, node: fx.Node) -> Value:
    """y[i, j, k] = x[i, index[i, j, k], k] for the second dimension: what is looked up in stays, and beside it the
    index, which may be shorter than x, loses what x loses.
    """
    a = bind(node)
    x, places = t.value(a["self"]), t.value(a["index"])
    if not x.shape:
        raise NoRule("a number without dimensions")
    dim = a["dim"] % len(x.shape)
    t.pin(x.atoms[dim], node, "looked up by index")
    atoms = list(places.atoms)
    zeros: list[Flags | None] = [None] * len(atoms)
    for d, size in enumerate(places.shape):
        own = x.atoms[d]
        if d == dim:
            continue
        t.tie(None if own is None else own[:size], atoms[d], node)
        if own is None:
            atoms[d] = None
        elif atoms[d] is not None and (flags := x.zeros[d]) is not None:
            zeros[d] = flags[:size]
    return Value(places.shape, tuple(atoms), tuple(zeros), x.derived and places.derived)


@family(Card("arrangement", depends=depends_moved, carries=beside), "flip")
def flip(t: Trace, node: fx.Node) -> Value:
    """Dimensions reversed."""
    x = t.value(node.args[0])
    for d in bind(node)["dims"]:
        k = d % len(x.shape)
        atoms, zeros = x.atoms[k], x.zeros[k]
        if atoms is not None:
            x = x.replace_dim(k, atoms[::-1], None if zeros is None else zeros[::-1], x.shape[k])
    return x


@family(Card("arrangement", depends=depends_moved, carries=beside), "roll")
@family(Card("arrangement", depends=depends_moved), "rot90", "tril", "triu")
def in_place_of_space(t: Trace, node: fx.Node) -> Value:
    """Operators on whole dimensions (all those named, or the last two) that must not change length."""
    x = t.value(node.args[0])
    dims = bind(node).get("dims") or (range(len(x.shape)) if "dims" in bind(node) else (-2, -1))
    named = {d % len(x.shape) for d in dims}
    t.pin_value(x, node, "moves by position", sorted(named))
    zeros = tuple(None if d in named else z for d, z in enumerate(x.zeros))
    return Value(x.shape, x.atoms, zeros, x.derived)
