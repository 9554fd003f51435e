"""Elements written into a tensor at places of a dimension: the result loses what the tensor loses.

y = x, but y[..., place k, ...] = part[..., k, ...]: index k of the part lives with the place that it is written to, and
beside that dimension the two live together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from pipeline.channels.operators.card import Card
from pipeline.channels.operators.cut import Cut
from pipeline.channels.operators.movement import depends_moved
from pipeline.channels.operators.slicing import bounds, sliced
from pipeline.channels.operators.table import base_name, bind, family
from pipeline.channels.operators.trace import NoRule, Trace
from pipeline.channels.operators.values import Atoms, Flags, Indices, Value, both

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Places:
    """Where in dimension `dim` a constant list writes to."""

    dim: int
    places: Indices


# -- a range or one place ------------------------------------------------------------------------------------------


def edit_slice_scatter(c: Cut, node: fx.Node) -> None:
    """Bounds move with the indices before them; with a stride, both are put together and picked from in order."""
    a = bind(node)
    x = c.value(a["self"])
    dim = a["dim"] % len(x.shape)
    keep = c.keep(x.atoms[dim])
    if keep is None:
        return
    picked = np.arange(x.shape[dim])[sliced(a, x.shape[dim])]
    if a["step"] == 1:
        start, end = bounds(keep, picked)
        c.set(node, start=start, end=end)
        return
    order = np.cumsum(keep) - 1
    order[picked] = int(keep.sum()) + np.cumsum(keep[picked]) - 1
    index = c.editor.constant(f"{node.name}_index", torch.from_numpy(order[keep]))
    with c.editor.before(c.new_of[node]):
        together = c.call(aten.cat.default, [c.new_of[a["self"]], c.new_of[a["src"]]], dim)
    c.retarget(node, aten.index_select.default, (together, dim, index))


@family(Card("arrangement", edit=edit_slice_scatter, depends=depends_moved), "slice_scatter")
def slice_scatter(t: Trace, node: fx.Node) -> Value:
    """x with a range of one dimension written."""
    a = bind(node)
    x, part = t.value(a["self"]), t.value(a["src"])
    dim = a["dim"] % len(x.shape)
    if _types_differ(a["self"], a["src"]):
        raise NoRule("writes another type")
    if x.atoms[dim] is None or x.shape == part.shape:
        return _written(t, node, x, part, dim, np.arange(x.shape[dim]) if x.shape == part.shape else None)
    if any(isinstance(a[k], fx.Node) for k in ("start", "end", "step")):
        raise NoRule("writes to a channel dimension at bounds known only at run time")
    return _written(t, node, x, part, dim, np.arange(x.shape[dim])[sliced(a, x.shape[dim])])


def edit_select_scatter(c: Cut, node: fx.Node) -> None:
    """The place moves with the indices before it."""
    x, a = c.value(node.args[0]), bind(node)
    dim = a["dim"] % len(x.shape)
    keep = c.keep(x.atoms[dim])
    if keep is not None:
        c.set(node, index=int(keep[: a["index"] % x.shape[dim]].sum()))


@family(Card("arrangement", edit=edit_select_scatter, depends=depends_moved), "select_scatter")
def select_scatter(t: Trace, node: fx.Node) -> Value:
    """x with one index of one dimension written: that index stays."""
    a = bind(node)
    x, part = t.value(a["self"]), t.value(a["src"])
    dim = a["dim"] % len(x.shape)
    order = list(range(len(part.shape)))
    order.insert(dim, -1)
    part = part.pick(order)
    if isinstance(a["index"], fx.Node):
        t.pin(x.atoms[dim], node, "written at a number known only at run time")
        return _written(t, node, x, part, dim, None)
    at = a["index"] % x.shape[dim]
    if x.atoms[dim] is not None:
        t.pin(x.atoms[dim][at : at + 1], node, "written by its place")
    return _written(t, node, x, part, dim, np.arange(at, at + 1))


def _types_differ(a: fx.Node, b: fx.Node) -> bool:
    return bool(a.meta["val"].dtype != b.meta["val"].dtype)


def _written(
    t: Trace,
    node: fx.Node,
    x: Value,
    part: Value | None,
    dim: int,
    places: Indices | None,
    adds: bool = False,
    zero: bool = False,
) -> Value:
    """x with `part` (broadcast to the places) written to, or added to, the `places` of `dim`; None: unknown places.

    Without a part a number is written: `zero`, whether it is zero.
    """
    atoms, zeros = list(x.atoms), list(x.zeros)
    for d in range(len(x.shape)):
        k = -1 if part is None else d - len(x.shape) + len(part.shape)
        wide = part is not None and k >= 0 and part.shape[k] > 1
        theirs = part.atoms[k] if wide and part is not None else None
        flags = part.zeros[k] if wide and part is not None else None
        if d != dim:
            if wide:
                t.tie(x.atoms[d], theirs, node)
                atoms[d] = None if theirs is None else x.atoms[d]
            zeros[d] = both(x.zeros[d], flags) if wide else (x.zeros[d] if part is None and zero else None)
            continue
        if places is None:
            t.pin(x.atoms[d], node, "written at places known only at run time")
            t.pin(theirs, node, "written at places known only at run time")
            atoms[d], zeros[d] = None, None
            continue
        own = x.atoms[d]
        if wide:
            t.tie(None if own is None else own[places], theirs, node)
            atoms[d] = _fixed_at(own, places) if theirs is None else own
        zeros[d] = _zeros_at(x.zeros[d], places, flags, adds, zero)
    return Value(x.shape, tuple(atoms), tuple(zeros), x.derived and (part is None or part.derived))


def _fixed_at(atoms: Any, places: Indices) -> Any:
    if atoms is None:
        return None
    atoms = atoms.copy()
    atoms[places] = 0
    return atoms


def _zeros_at(own: Flags | None, places: Indices, part: Flags | None, adds: bool, zero: bool) -> Flags | None:
    size = int(places.max(initial=-1)) + 1 if own is None else own.shape[0]
    if own is None:
        return None
    found = own.copy()
    written: Any = np.full(places.shape, zero) if part is None else part
    for place, flag in zip(places.tolist(), written.tolist(), strict=True):
        found[place] = flag and (found[place] or not adds) if place < size else False
    return found


# -- a list of places ----------------------------------------------------------------------------------------------


def edit_list(c: Cut, node: fx.Node) -> None:
    """Places in the list move with the indices before them."""
    found = c.note(node, Places)
    if found is None:
        return
    atoms = c.value(node.args[0]).atoms[found.dim]
    if c.keep(atoms) is None:
        return
    index = c.editor.constant(f"{node.name}_index", c.moved(atoms, found.places))
    if "indices" in bind(node):
        c.set(node, indices=[None] * found.dim + [index])
    else:
        c.set(node, index=index)


def _places(t: Trace, node: fx.Node, source: Any, x: Value, dim: int) -> Indices | None:
    """The places that a list names, where it is a constant."""
    if source not in t.static or t.static[source].dtype == torch.bool:
        return None
    places: Indices = t.static[source].numpy().reshape(-1) % x.shape[dim]
    t.notes[node] = Places(dim, places)
    return places


@family(Card("arrangement", edit=edit_list, depends=depends_moved), "index_copy", "index_fill")
@family(Card("arrangement", edit=edit_list), "index_add")
def index_copy(t: Trace, node: fx.Node) -> Value:
    """x with a list of places of one dimension written or added to."""
    a = bind(node)
    x = t.value(a["self"])
    dim = a["dim"] % len(x.shape)
    places = _places(t, node, a["index"], x, dim)
    adds = base_name(node.target) == "index_add"
    if "value" in a:
        if isinstance(a["value"], fx.Node):
            raise NoRule("filled with a number known only at run time")
        return _written(t, node, x, None, dim, places, zero=a["value"] == 0)
    return _written(t, node, x, t.value(a["source"]), dim, places, adds)


@family(Card("arrangement", edit=edit_list, depends=depends_moved), "index_put")
def index_put(t: Trace, node: fx.Node) -> Value:
    """x[..., i, ...] = part: a constant list on one dimension, or any index on dimensions that stay."""
    a = bind(node)
    x, part = t.value(a["self"]), t.value(a["values"])
    entries = list(a["indices"])
    used = [d for d, e in enumerate(entries) if e is not None]
    tables = [t.shape(entries[d]) for d in used]
    masked = any(entries[d].meta["val"].dtype == torch.bool for d in used)
    if len(used) == 1 and len(tables[0]) == 1 and not masked:
        dim = used[0]
        return _written(t, node, x, part, dim, _places(t, node, entries[dim], x, dim), bool(a["accumulate"]))
    why = "written at places looked up by index"
    if masked and len(used) == 1 and part.shape in ((), (1,)) and not a["accumulate"]:
        return _filled_by_mask(t, node, x, entries[used[0]], used[0], a["values"])
    if masked:
        if len(used) > 1:
            raise NoRule("written by a mask beside an index")
        fixed = list(range(used[0], used[0] + len(tables[0])))
        behind = list(range(fixed[-1] + 1, len(x.shape)))
    else:
        fixed = used
        behind = list(range(used[-1] + 1, len(x.shape))) if used == list(range(used[0], used[-1] + 1)) else []
    for d in used:
        if entries[d] not in t.static and entries[d] in t.values:
            t.pin_value(t.value(entries[d]), node, why)
    t.pin_value(x, node, why, [d for d in range(len(x.shape)) if d not in behind])
    atoms: list[Atoms | None] = [None] * len(x.shape)
    zeros: list[Flags | None] = [None] * len(x.shape)
    aligned = set()
    for d in behind:
        k = d - len(x.shape) + len(part.shape)
        atoms[d] = x.atoms[d]
        if k >= 0 and part.shape[k] > 1:
            aligned.add(k)
            t.tie(x.atoms[d], part.atoms[k], node, why)
            atoms[d] = None if part.atoms[k] is None else atoms[d]
            zeros[d] = both(x.zeros[d], part.zeros[k])
    t.pin_value(part, node, why, [k for k in range(len(part.shape)) if k not in aligned])
    return Value(x.shape, tuple(atoms), tuple(zeros), x.derived and part.derived)


def _filled_by_mask(t: Trace, node: fx.Node, x: Value, source: fx.Node, first: int, number: fx.Node) -> Value:
    """x[mask] = number: each element by itself, the mask over dimensions from `first` on."""
    mask = t.value(source)
    atoms = list(x.atoms)
    for k, theirs in enumerate(mask.atoms):
        t.tie(atoms[first + k], theirs, node)
        atoms[first + k] = None if theirs is None else atoms[first + k]
    fixed = t.static.get(number)
    zero = fixed is not None and not bool(fixed.any())
    return Value(x.shape, tuple(atoms), x.zeros if zero else (None,) * len(x.shape))


# -- places for every element --------------------------------------------------------------------------------------


@family(Card("arrangement"), "scatter", "scatter_add", "scatter_reduce")
def scatter(t: Trace, node: fx.Node) -> Value:
    """y[i, index[i, j, k], k] = part[i, j, k] for the second dimension: what is looked up in stays, and beside it the
    index and the part, which may be shorter than x, lose what x loses.
    """
    a = bind(node)
    x, places = t.value(a["self"]), t.value(a["index"])
    if not x.shape:
        raise NoRule("a number without dimensions")
    dim = a["dim"] % len(x.shape)
    why = "written at places looked up by index"
    parts = [places, *([t.value(a["src"])] if isinstance(a.get("src"), fx.Node) else [])]
    for v in (x, *parts):
        t.pin(v.atoms[dim], node, why)
    atoms = list(x.atoms)
    atoms[dim] = None
    for d, size in enumerate(places.shape):
        if d == dim:
            continue
        for v in parts:
            if v.shape[d] == 1 == x.shape[d]:
                continue
            own, theirs = atoms[d], v.atoms[d]
            t.tie(None if own is None else own[:size], None if theirs is None else theirs[:size], node, why)
            if theirs is None:
                t.pin(own, node, why)
                atoms[d] = None
    return Value(x.shape, tuple(atoms), (None,) * len(x.shape), x.derived and all(v.derived for v in parts))
