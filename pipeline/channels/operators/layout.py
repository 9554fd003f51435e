"""Operators that move, split and merge elements: views, permutations, slices, concatenation, padding.

A view is read as factors: the sizes on both sides are cut at every common divisor of their running products, so
[B, 12, 64] -> [B, 3, 4, 64] splits one dimension into two factors, and each split or merge is a `product` relation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import fx

from pipeline.channels.operators.cut import Cut
from pipeline.channels.operators.table import bind, rule
from pipeline.channels.operators.trace import SPACE, NoRule, Trace
from pipeline.channels.operators.values import PINNED, Atoms, Flags, Value, both, opaque

aten = torch.ops.aten


# -- views ---------------------------------------------------------------------------------------------------------


def factorise(before: Sequence[int], after: Sequence[int]) -> tuple[list[int], list[list[int]], list[list[int]]] | None:
    """Common factors of two shapes with the same number of elements.

    Returns (factor sizes, factors of each dimension before, factors of each dimension after), or None where the
    dimensions cut across each other. Dimensions of length one have no factor.
    """

    def cuts(sizes: Sequence[int]) -> list[int]:
        return [math.prod(sizes[d:]) for d in range(len(sizes) + 1)]

    points = sorted(set(cuts(before)) | set(cuts(after)))
    if any(big % small for small, big in pairwise(points)):
        return None
    bounds = list(zip(points[1:], points[:-1], strict=True))[::-1]  # outermost factor first: (above, below)
    sizes = [above // below for above, below in bounds]

    def members(shape: Sequence[int]) -> list[list[int]]:
        edge = cuts(shape)
        return [
            [k for k, (above, below) in enumerate(bounds) if below >= edge[d + 1] and above <= edge[d]]
            for d in range(len(shape))
        ]

    return sizes, members(before), members(after)


def split_dim(
    t: Trace, node: fx.Node, atoms: Atoms | None, zeros: Flags | None, sizes: Sequence[int]
) -> tuple[list[Atoms | None], list[Flags | None]]:
    """One dimension as the product of `sizes`: fresh atoms for every factor longer than one."""
    if atoms is None or len(sizes) == 1:
        return [atoms] * len(sizes), [zeros] * len(sizes)
    factors = [t.fresh(n) if n > 1 else None for n in sizes]
    t.product(node, atoms, factors, sizes)
    if zeros is None:
        return factors, [None] * len(sizes)
    grid = zeros.reshape(tuple(sizes))
    others = [tuple(k for k in range(len(sizes)) if k != d) for d in range(len(sizes))]
    kept: list[Flags | None] = [
        np.asarray(grid.all(axis=axes)) if f is not None else None for f, axes in zip(factors, others, strict=True)
    ]
    return factors, kept


def merge_dims(
    t: Trace, node: fx.Node, atoms: Sequence[Atoms | None], zeros: Sequence[Flags | None], sizes: Sequence[int]
) -> tuple[Atoms | None, Flags | None]:
    """Several dimensions as one flat one."""
    free = [d for d, a in enumerate(atoms) if a is not None]
    if not free:
        return None, None

    def spread(array: Any, d: int) -> Any:
        shape = [1] * len(sizes)
        shape[d] = sizes[d]
        return np.ascontiguousarray(np.broadcast_to(array.reshape(shape), tuple(sizes))).reshape(-1)

    flags: Flags | None = spread(zeros[free[0]], free[0]) if zeros[free[0]] is not None else None
    for d in free[1:]:
        flags = both(flags, spread(zeros[d], d) if zeros[d] is not None else None)
    if len(free) == 1:
        return spread(atoms[free[0]], free[0]), flags
    flat = t.fresh(math.prod(sizes))
    t.product(node, flat, atoms, sizes)
    return flat, flags


def reshape_value(t: Trace, node: fx.Node, x: Value, shape: tuple[int, ...]) -> Value:
    """`x` viewed as `shape`."""
    if x.shape == shape:
        return x
    if not x.labelled:
        return opaque(shape, x.derived)
    parts = factorise(x.shape, shape)
    if parts is None:
        t.pin_value(x, node, "the view cuts across its dimensions")
        return opaque(shape, x.derived)
    sizes, before, after = parts
    atoms: dict[int, Atoms | None] = {}
    zeros: dict[int, Flags | None] = {}
    for d, factors in enumerate(before):
        found = split_dim(t, node, x.atoms[d], x.zeros[d], [sizes[k] for k in factors]) if factors else ([], [])
        for k, a, z in zip(factors, *found, strict=True):
            atoms[k], zeros[k] = a, z
    merged = [
        merge_dims(t, node, [atoms[k] for k in f], [zeros[k] for k in f], [sizes[k] for k in f]) if f else (None, None)
        for f in after
    ]
    return Value(shape, tuple(a for a, _ in merged), tuple(z for _, z in merged), x.derived)


def edit_sizes(c: Cut, node: fx.Node) -> None:
    """Sizes written in a view follow the kept counts."""
    if node in c.notes:
        start, dim, order = c.notes[node]
        edit_shuffled(c, node, c.value(start), dim, order, c.new_of[start])
        return
    value, name = c.value(node), _size_name(node)
    entries = bind(node)[name]
    first = len(value.shape) - len(entries)
    if name == "sizes":  # unflatten: the entries replace one dimension of the operand
        first = bind(node)["dim"] % len(c.value(node.args[0]).shape)
    with c.graph.inserting_before(c.new_of[node]):
        sizes = [
            c.size(_twin(c, e), c.count(value.atoms[first + k], value.shape[first + k]), value.shape[first + k])
            for k, e in enumerate(entries)
        ]
    c.set(node, **{name: sizes})


def _size_name(node: fx.Node) -> str:
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    return next(n for n in ("size", "shape", "sizes") if n in names)


def _twin(c: Cut, entry: Any) -> Any:
    return c.new_of[entry] if isinstance(entry, fx.Node) else entry


@rule("view", "reshape", "_unsafe_view", "unflatten", "_reshape_copy", "view_copy", "_reshape_alias", edit=edit_sizes)
def view(t: Trace, node: fx.Node) -> Value:
    """A view is a product of factors."""
    if node in t.notes:  # the end of a channel shuffle, see shuffle.py
        start, dim, order = t.notes[node]
        x = t.value(start)
        atoms, zeros = x.atoms[dim], x.zeros[dim]
        return x.replace_dim(
            dim, None if atoms is None else atoms[order], None if zeros is None else zeros[order], x.shape[dim]
        )
    if not isinstance(bind(node).get("size", bind(node).get("shape", bind(node).get("sizes"))), (list, tuple)):
        raise NoRule("views the bits as another type")
    return reshape_value(t, node, t.value(node.args[0]), t.shape(node))


@rule("flatten", "view_as", "reshape_as", "ravel")
def flatten(t: Trace, node: fx.Node) -> Value:
    """Views without a size of their own."""
    return reshape_value(t, node, t.value(node.args[0]), t.shape(node))


# -- order and length-one dimensions -------------------------------------------------------------------------------


@rule("permute", "permute_copy")
def permute(t: Trace, node: fx.Node) -> Value:
    """Dimensions in another order."""
    x = t.value(node.args[0])
    return x.pick([d % len(x.shape) for d in bind(node)["dims"]])


@rule("transpose", "swapaxes", "swapdims")
def transpose(t: Trace, node: fx.Node) -> Value:
    """Two dimensions exchanged."""
    x = t.value(node.args[0])
    order = list(range(len(x.shape)))
    i, j = (int(a) % len(order) for a in node.args[1:3])  # type: ignore[arg-type]
    order[i], order[j] = order[j], order[i]
    return x.pick(order)


@rule("t", "numpy_T", "mT", "matrix_H", "adjoint", "mH")
def matrix_transpose(t: Trace, node: fx.Node) -> Value:
    """The last two dimensions exchanged."""
    x = t.value(node.args[0])
    order = list(range(len(x.shape)))
    if len(order) > 1:
        order[-2:] = order[-1], order[-2]
    return x.pick(order)


@rule("movedim", "moveaxis")
def movedim(t: Trace, node: fx.Node) -> Value:
    """Dimensions moved: asked of the operator itself."""
    x = t.value(node.args[0])
    probe = torch.empty(tuple(range(1, len(x.shape) + 1)))
    moved = node.target(probe, *node.args[1:])  # type: ignore[operator]
    return x.pick([n - 1 for n in moved.shape])


@rule("unsqueeze")
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


@rule("squeeze", edit=edit_squeeze)
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


# -- repetition ----------------------------------------------------------------------------------------------------


def edit_expand(c: Cut, node: fx.Node) -> None:
    """A written length follows the kept count."""
    value, entries = c.value(node), bind(node)["size"]
    with c.graph.inserting_before(c.new_of[node]):
        sizes = [
            c.size(_twin(c, e), c.count(a, n), n) for e, a, n in zip(entries, value.atoms, value.shape, strict=True)
        ]
    c.set(node, size=sizes)


@rule("expand", "broadcast_to", edit=edit_expand)
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


@rule("expand_as")
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
    with c.graph.inserting_before(c.new_of[node]):
        repeats = [
            c.size(_twin(c, e), c.count(value.atoms[d], value.shape[d]), value.shape[d])
            if d < lead or x.shape[d - lead] == 1
            else _twin(c, e)
            for d, e in enumerate(_repeats(node))
        ]
    c.set(node, **{_repeat_name(node): repeats})


def _repeat_name(node: fx.Node) -> str:
    return "repeats" if "repeats" in bind(node) else "dims"


def _repeats(node: fx.Node) -> list[Any]:
    return list(bind(node)[_repeat_name(node)])


@rule("repeat", "tile", edit=edit_repeat)
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


@rule("repeat_interleave")
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


# -- parts ---------------------------------------------------------------------------------------------------------


def edit_slice(c: Cut, node: fx.Node) -> None:
    """Bounds move with the indices before them; a strided slice becomes a list of indices."""
    x, a = c.value(node.args[0]), bind(node)
    dim = a["dim"] % len(x.shape)
    keep = c.keep(x.atoms[dim])
    if keep is None:
        return
    picked = np.arange(x.shape[dim])[_slice(a, x.shape[dim])]
    if a["step"] == 1:
        start = int(keep[: picked[0]].sum()) if picked.size else 0
        c.set(node, start=start, end=start + int(keep[picked].sum()))
        return
    place = np.cumsum(keep) - 1
    index = c.constant(f"{node.name}_index", torch.from_numpy(place[picked[keep[picked]]]))
    c.retarget(node, aten.index_select.default, (c.new_of[node.args[0]], dim, index))  # type: ignore[index]


def _slice(a: dict[str, Any], size: int) -> slice:
    end = a["end"]
    return slice(a["start"], end if end is None or end < size else None, a["step"])


@rule("slice", "slice_copy", "narrow", edit=edit_slice)
def slice_(t: Trace, node: fx.Node) -> Value:
    """A range of one dimension."""
    a = bind(node)
    x, shape = t.value(node.args[0]), t.shape(node)
    dim = a["dim"] % len(x.shape)
    if x.atoms[dim] is None or x.shape == shape:
        return x.replace_dim(dim, x.atoms[dim], x.zeros[dim], shape[dim])
    if "step" not in a or any(isinstance(a[k], fx.Node) for k in ("start", "end", "step")):
        raise NoRule("slices a channel dimension at bounds known only at run time")
    part = _slice(a, x.shape[dim])
    zeros = x.zeros[dim]
    return x.replace_dim(dim, x.atoms[dim][part], None if zeros is None else zeros[part], shape[dim])


def edit_select(c: Cut, node: fx.Node) -> None:
    """The selected place moves with the indices before it."""
    x, a = c.value(node.args[0]), bind(node)
    dim = a["dim"] % len(x.shape)
    keep = c.keep(x.atoms[dim])
    if keep is not None:
        c.set(node, index=int(keep[: a["index"] % x.shape[dim]].sum()))


@rule("select", edit=edit_select)
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


@rule("unbind")
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


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_chunk", "unsafe_split", edit=edit_split)
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


@rule("cat", "concat", "concatenate")
def cat(t: Trace, node: fx.Node) -> Value:
    """Parts one after the other; their other dimensions live together."""
    values = [v for v in (t.value(n) for n in node.args[0]) if v.shape != (0,)]  # type: ignore[union-attr]
    rank = len(values[0].shape)
    dim = bind(node)["dim"] % rank
    atoms: list[Atoms | None] = []
    zeros: list[Flags | None] = []
    for d in range(rank):
        if d != dim:
            a, z = _together(t, node, values, d)
        elif all(v.atoms[d] is None for v in values):
            a, z = None, None
        else:
            a = np.concatenate([_full(v.atoms[d], v.shape[d], PINNED) for v in values])
            z = np.concatenate([_full(v.zeros[d], v.shape[d], False) for v in values])
        atoms.append(a)
        zeros.append(z)
    return Value(t.shape(node), tuple(atoms), tuple(zeros), all(v.derived for v in values))


@rule("stack")
def stack(t: Trace, node: fx.Node) -> Value:
    """Equal tensors side by side along a new dimension, which stays."""
    values = [t.value(n) for n in node.args[0]]  # type: ignore[union-attr]
    pairs = [_together(t, node, values, d) for d in range(len(values[0].shape))]
    pairs.insert(bind(node)["dim"] % (len(pairs) + 1), (None, None))
    return Value(t.shape(node), tuple(a for a, _ in pairs), tuple(z for _, z in pairs), all(v.derived for v in values))


def _together(t: Trace, node: fx.Node, values: list[Value], d: int) -> tuple[Atoms | None, Flags | None]:
    reference, flags = values[0].atoms[d], values[0].zeros[d]
    for v in values[1:]:
        t.tie(reference, v.atoms[d], node)
        reference = None if v.atoms[d] is None else reference
        flags = both(flags, v.zeros[d])
    return reference, flags if reference is not None else None


def _full(array: Any, size: int, fill: Any) -> Any:
    return np.full(size, fill) if array is None else array


# -- by index ------------------------------------------------------------------------------------------------------


def edit_index(c: Cut, node: fx.Node) -> None:
    """Places in a list of indices move with the indices before them."""
    if node not in c.notes:  # looked up along dimensions that stay
        return
    x = c.value(node.args[0])
    dim, picked, argument = c.notes[node]
    keep = c.keep(x.atoms[dim])
    if keep is None:
        return
    place = np.cumsum(keep) - 1
    index = c.constant(f"{node.name}_index", torch.from_numpy(place[picked[keep[picked]]]))
    if argument == "index":
        c.set(node, index=index)
    else:
        c.set(node, indices=[None] * dim + [index])


@rule("index_select", edit=edit_index)
def index_select(t: Trace, node: fx.Node) -> Value:
    """Indices of one dimension by a constant list."""
    a = bind(node)
    x = t.value(node.args[0])
    return _pick(t, node, x, a["dim"] % len(x.shape), a["index"], "index")


@rule("index", edit=edit_index)
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


def _pick(t: Trace, node: fx.Node, x: Value, dim: int, source: fx.Node, argument: str) -> Value:
    atoms, zeros, shape = x.atoms[dim], x.zeros[dim], t.shape(node)
    if atoms is None:
        return x.replace_dim(dim, None, None, shape[dim])
    if source not in t.static or t.static[source].dtype == torch.bool:
        t.pin(atoms, node, "looked up by an index known only at run time")
        return x.replace_dim(dim, None, None, shape[dim])
    picked = t.static[source].numpy() % x.shape[dim]
    t.notes[node] = dim, picked, argument
    return x.replace_dim(dim, atoms[picked], None if zeros is None else zeros[picked], shape[dim])


@rule("flip")
def flip(t: Trace, node: fx.Node) -> Value:
    """Dimensions reversed."""
    x = t.value(node.args[0])
    for d in bind(node)["dims"]:
        k = d % len(x.shape)
        atoms, zeros = x.atoms[k], x.zeros[k]
        if atoms is not None:
            x = x.replace_dim(k, atoms[::-1], None if zeros is None else zeros[::-1], x.shape[k])
    return x


@rule("roll", "rot90", "tril", "triu")
def in_place_of_space(t: Trace, node: fx.Node) -> Value:
    """Operators on whole dimensions (all those named, or the last two) that must not change length."""
    x = t.value(node.args[0])
    dims = bind(node).get("dims") or (range(len(x.shape)) if "dims" in bind(node) else (-2, -1))
    named = {d % len(x.shape) for d in dims}
    t.pin_value(x, node, "moves by position", sorted(named))
    zeros = tuple(None if d in named else z for d, z in enumerate(x.zeros))
    return Value(x.shape, x.atoms, zeros, x.derived)


# -- padding and blocks --------------------------------------------------------------------------------------------


def edit_pad(c: Cut, node: fx.Node) -> None:
    """Padding of a channel dimension shrinks by the padded places that go."""
    x, y, a = c.value(node.args[0]), c.value(node), bind(node)
    pad = list(a["pad"])
    for k in range(len(pad) // 2):
        d = len(x.shape) - 1 - k
        keep = c.keep(y.atoms[d])
        if keep is not None and (pad[2 * k] or pad[2 * k + 1]):
            before = max(pad[2 * k], 0)
            pad[2 * k] = int(keep[:before].sum())
            pad[2 * k + 1] = int(keep[before + x.shape[d] :].sum())
    c.set(node, pad=pad)


@rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d",
      "replication_pad3d", "reflection_pad3d", edit=edit_pad)  # fmt: skip
def pad(t: Trace, node: fx.Node) -> Value:
    """Padded places of a channel dimension are free; a pad by anything but zeros ends what is known of zeros."""
    a = bind(node)
    x, shape = t.value(node.args[0]), t.shape(node)
    widths: Any = a.get("pad", a.get("padding"))
    constant = "pad" in a and a.get("mode", "constant") == "constant"
    fill = a.get("value") or 0
    copies = not constant
    for k in range(len(widths) // 2):
        d = len(x.shape) - 1 - k
        before, after = widths[2 * k], widths[2 * k + 1]
        if (isinstance(before, int) and isinstance(after, int)) and before == after == 0:
            continue
        atoms, zeros = x.atoms[d], x.zeros[d]
        plain = isinstance(before, int) and isinstance(after, int) and before >= 0 and after >= 0
        if atoms is None or copies or not plain:
            t.pin(atoms, node, "padded by position")
            x = x.replace_dim(d, None, None, shape[d])
        else:
            ends = np.full(before, fill == 0), np.full(after, fill == 0)
            inner = zeros if zeros is not None else np.zeros(x.shape[d], np.bool_)
            x = x.replace_dim(
                d,
                np.concatenate([t.fresh(before), atoms, t.fresh(after)]),
                np.concatenate([ends[0], inner, ends[1]]),
                shape[d],
            )
        if constant and fill != 0:
            x = Value(x.shape, x.atoms, tuple(z if k == d else None for k, z in enumerate(x.zeros)), x.derived)
    return x


@rule("pixel_shuffle")
def pixel_shuffle(t: Trace, node: fx.Node) -> Value:
    """[*, C·r·r, H, W] -> [*, C, H·r, W·r]."""
    x, shape = t.value(node.args[0]), t.shape(node)
    r = bind(node)["upscale_factor"]
    t.pin_value(x, node, SPACE, [len(shape) - 2, len(shape) - 1])
    d = len(shape) - 3
    factors, zeros = split_dim(t, node, x.atoms[d], x.zeros[d], [shape[d], r, r])
    for f in factors[1:]:
        if x.atoms[d] is not None:
            t.pin(f, node, "a place inside the pixel block")
    single = shape[d] == 1
    return Value(
        shape,
        (*x.atoms[:d], None if single else factors[0], None, None),
        (*x.zeros[:d], None if single else zeros[0], None, None),
        x.derived,
    )


@rule("pixel_unshuffle")
def pixel_unshuffle(t: Trace, node: fx.Node) -> Value:
    """[*, C, H·r, W·r] -> [*, C·r·r, H, W]."""
    x, shape = t.value(node.args[0]), t.shape(node)
    r = bind(node)["downscale_factor"]
    t.pin_value(x, node, SPACE, [len(shape) - 2, len(shape) - 1])
    d = len(shape) - 3
    atoms, zeros = merge_dims(t, node, [x.atoms[d], None, None], [x.zeros[d], None, None], [x.shape[d], r, r])
    return Value(shape, (*x.atoms[:d], atoms, None, None), (*x.zeros[:d], zeros, None, None), x.derived)


def edit_channel_shuffle(c: Cut, node: fx.Node) -> None:
    """A shuffle of unequal groups is a list of indices."""
    edit_shuffled(c, node, c.value(node.args[0]), 1, c.notes[node], c.new_of[node.args[0]])  # type: ignore[index]


def edit_shuffled(c: Cut, node: fx.Node, x: Value, dim: int, order: Any, source: fx.Node) -> None:
    """Make `node` an index_select of what is left of `order` on `dim`."""
    keep = c.keep(x.atoms[dim])
    if keep is None:
        keep = np.full(x.shape[dim], True)
    place = np.cumsum(keep) - 1
    index = c.constant(f"{node.name}_index", torch.from_numpy(place[order[keep[order]]]))
    c.retarget(node, aten.index_select.default, (source, dim, index))


@rule("channel_shuffle", "native_channel_shuffle", edit=edit_channel_shuffle)
def channel_shuffle(t: Trace, node: fx.Node) -> Value:
    """Channels dealt out over groups: a permutation of dimension 1."""
    x = t.value(node.args[0])
    order = np.arange(x.shape[1]).reshape(bind(node)["groups"], -1).T.reshape(-1)
    t.notes[node] = order
    atoms, zeros = x.atoms[1], x.zeros[1]
    return x.replace_dim(
        1, None if atoms is None else atoms[order], None if zeros is None else zeros[order], x.shape[1]
    )


@rule("im2col")
def im2col(t: Trace, node: fx.Node) -> Value:
    """[B, C, H, W] -> [B, C·k·k, L]."""
    x, shape = t.value(node.args[0]), t.shape(node)
    t.pin_value(x, node, SPACE, [2, 3])
    block = math.prod(bind(node)["kernel_size"])
    atoms, zeros = merge_dims(t, node, [x.atoms[1], None], [x.zeros[1], None], [x.shape[1], block])
    return Value(shape, (x.atoms[0], atoms, None), (x.zeros[0], zeros, None), x.derived)


@rule("col2im")
def col2im(t: Trace, node: fx.Node) -> Value:
    """[B, C·k·k, L] -> [B, C, H, W], overlaps summed."""
    x, shape = t.value(node.args[0]), t.shape(node)
    t.pin_value(x, node, SPACE, [2])
    block = math.prod(bind(node)["kernel_size"])
    factors, zeros = split_dim(t, node, x.atoms[1], x.zeros[1], [shape[1], block])
    t.pin(factors[1], node, "a place inside the block")
    return Value(shape, (x.atoms[0], factors[0], None, None), (x.zeros[0], zeros[0], None, None), x.derived)


@rule("unfold")
def unfold(t: Trace, node: fx.Node) -> Value:
    """Windows of one dimension, laid along a new last one."""
    x, shape = t.value(node.args[0]), t.shape(node)
    dim = bind(node)["dimension"] % len(x.shape)
    t.pin(x.atoms[dim], node, "cut into windows")
    x = x.replace_dim(dim, None, None, shape[dim])
    return x.pick([*range(len(x.shape)), -1], shape)
