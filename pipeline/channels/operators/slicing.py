"""Parts of a dimension: slices, single indices, consecutive parts. An index keeps its atom wherever it lands."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import fx

from pipeline.channels.operators.card import Card
from pipeline.channels.operators.carry import beside, selected
from pipeline.channels.operators.cut import Cut
from pipeline.channels.operators.movement import depends_moved
from pipeline.channels.operators.table import bind, family
from pipeline.channels.operators.trace import NoRule, Trace
from pipeline.channels.operators.values import Flags, Indices, Value

aten = torch.ops.aten


def edit_slice(c: Cut, node: fx.Node) -> None:
    """Bounds move with the indices before them; a strided slice becomes a list of indices."""
    x, a = c.value(node.args[0]), bind(node)
    dim = a["dim"] % len(x.shape)
    keep = c.keep(x.atoms[dim])
    if keep is None:
        return
    picked = np.arange(x.shape[dim])[sliced(a, x.shape[dim])]
    if a["step"] == 1:
        start, end = bounds(keep, picked)
        c.set(node, start=start, end=end)
        return
    c.pick(node, node.args[0], dim, picked)


def bounds(keep: Flags, picked: Indices) -> tuple[int, int]:
    """Start and end, among the indices that stay, of consecutive places."""
    start = int(keep[: picked[0]].sum()) if picked.size else 0
    return start, start + int(keep[picked].sum())


def sliced(a: dict[str, Any], size: int) -> slice:
    """The range that a slice's arguments name in a dimension of `size`."""
    end = a["end"]
    return slice(a["start"], end if end is None or end < size else None, a["step"])


@family(Card("arrangement", edit=edit_slice, depends=depends_moved, carries=beside), "slice", "slice_copy", "narrow")
def slice_(t: Trace, node: fx.Node) -> Value:
    """A range of one dimension."""
    a = bind(node)
    x, shape = t.value(node.args[0]), t.shape(node)
    dim = a["dim"] % len(x.shape)
    if x.atoms[dim] is None or x.shape == shape:
        return x.replace_dim(dim, x.atoms[dim], x.zeros[dim], shape[dim])
    if "step" not in a or any(isinstance(a[k], fx.Node) for k in ("start", "end", "step")):
        raise NoRule("slices a channel dimension at bounds known only at run time")
    part = sliced(a, x.shape[dim])
    zeros = x.zeros[dim]
    return x.replace_dim(dim, x.atoms[dim][part], None if zeros is None else zeros[part], shape[dim])


def edit_select(c: Cut, node: fx.Node) -> None:
    """The selected place moves with the indices before it."""
    x, a = c.value(node.args[0]), bind(node)
    dim = a["dim"] % len(x.shape)
    keep = c.keep(x.atoms[dim])
    if keep is not None:
        c.set(node, index=int(keep[: a["index"] % x.shape[dim]].sum()))


@family(Card("arrangement", edit=edit_select, depends=depends_moved, carries=selected), "select")
def select(t: Trace, node: fx.Node) -> Value:
    """One index of one dimension: that index stays."""
    a = bind(node)
    x = t.value(node.args[0])
    dim = a["dim"] % len(x.shape)
    if x.atoms[dim] is not None:
        if isinstance(a["index"], fx.Node):
            t.pin(x.atoms[dim], node, "selected by a number known only at run time")
        else:
            at = a["index"] % x.shape[dim]
            t.pin(x.atoms[dim][at : at + 1], node, "selected by its place")
    return x.pick([d for d in range(len(x.shape)) if d != dim])


@family(Card("arrangement", depends=depends_moved), "unbind")
def unbind(t: Trace, node: fx.Node) -> tuple[Value, ...]:
    """Every index of one dimension by itself: all stay."""
    x = t.value(node.args[0])
    dim = bind(node)["dim"] % len(x.shape)
    t.pin(x.atoms[dim], node, "selected by its place")
    part = x.pick([d for d in range(len(x.shape)) if d != dim])
    count: int = x.shape[dim]
    return (part,) * count


def edit_split(c: Cut, node: fx.Node) -> None:
    """Equal parts become the sizes that are left."""
    x, a = c.value(node.args[0]), bind(node)
    dim = a["dim"] % len(x.shape)
    if c.keep(x.atoms[dim]) is None:
        return
    sizes = [c.count(v.atoms[dim], v.shape[dim]) for v in c.values[node]]
    c.retarget(node, aten.split_with_sizes.default, (c.new_of[node.args[0]], sizes, dim))  # type: ignore[index]


@family(
    Card("arrangement", edit=edit_split, depends=depends_moved),
    "split",
    "split_with_sizes",
    "chunk",
    "tensor_split",
    "unsafe_chunk",
    "unsafe_split",
)
def split(t: Trace, node: fx.Node) -> tuple[Value, ...]:
    """One dimension cut in consecutive parts."""
    x = t.value(node.args[0])
    dim = bind(node)["dim"] % len(x.shape)
    sizes = [t.shape_of(v)[dim] for v in node.meta["val"]]
    bounds = np.cumsum([0, *sizes])
    atoms, zeros = x.atoms[dim], x.zeros[dim]
    return tuple(
        x.replace_dim(dim, None if atoms is None else atoms[i:j], None if zeros is None else zeros[i:j], int(j - i))
        for i, j in pairwise(bounds)
    )
