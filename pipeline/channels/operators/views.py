"""Views: the same elements in the same order under other sizes.

A view is read as factors: the sizes on both sides are cut at every common divisor of their running products, so
[B, 12, 64] -> [B, 3, 4, 64] splits one dimension into two factors, and each split or merge is a `product` relation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor, fx

from pipeline.channels.operators.card import Card
from pipeline.channels.operators.carry import through_view
from pipeline.channels.operators.cut import Cut
from pipeline.channels.operators.masks import Masks, NoAnswer
from pipeline.channels.operators.table import bind, family
from pipeline.channels.operators.trace import NoRule, Trace
from pipeline.channels.operators.values import Atoms, Flags, Indices, Value, both, opaque


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
    """One dimension as the product of `sizes`: fresh atoms for every factor longer than one.

    A factor along which it repeats (a batch that was merged with channels, and comes apart again) stays as it is.
    """
    if atoms is None or len(sizes) == 1:
        return [atoms] * len(sizes), [zeros] * len(sizes)
    places = atoms.reshape(tuple(sizes))
    repeats = [n > 1 and bool((places == places.take([0], axis=d)).all()) for d, n in enumerate(sizes)]
    factors = [t.fresh(n) if n > 1 and not again else None for n, again in zip(sizes, repeats, strict=True)]
    once = places[tuple(slice(0, 1) if again else slice(None) for again in repeats)]
    t.product(node, np.ascontiguousarray(once).reshape(-1), factors, once.shape)
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


# -- channel shuffle -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Shuffle:
    """A dimension of `source` in another order: its place k holds what was at `order[k]`."""

    source: fx.Node
    dim: int
    order: Indices


def shuffled(t: Trace, shuffle: Shuffle) -> Value:
    """The source's value in the new order."""
    x, dim, order = t.value(shuffle.source), shuffle.dim, shuffle.order
    atoms, zeros = x.atoms[dim], x.zeros[dim]
    return x.replace_dim(
        dim, None if atoms is None else atoms[order], None if zeros is None else zeros[order], x.shape[dim]
    )


def edit_shuffled(c: Cut, node: fx.Node) -> None:
    """A shuffle of unequal groups is a list of indices."""
    shuffle = c.note(node, Shuffle)
    assert shuffle is not None
    c.pick(node, shuffle.source, shuffle.dim, shuffle.order)


# -- the cards -----------------------------------------------------------------------------------------------------


def depends_view(m: Masks, node: fx.Node, value: Any) -> Tensor:
    """The mask under the new sizes: reshaped, as the operator itself may not take the mask's memory layout."""
    mask = m.mask(node.args[0])
    if mask.numel() != value.numel():
        raise NoAnswer
    return mask.reshape(value.shape)


def written_sizes(node: fx.Node) -> tuple[str, int] | None:
    """(the argument that lists sizes, the output's dimension of its first entry), where the operator has one."""
    arguments = bind(node)
    name = next((n for n in ("size", "shape", "sizes") if n in arguments), None)
    if name is None:
        return None
    # unflatten: the entries replace one dimension of the operand
    split = name == "sizes"
    return name, arguments["dim"] % len(node.args[0].meta["val"].shape) if split else 0  # type: ignore[union-attr]


def edit_sizes(c: Cut, node: fx.Node) -> None:
    """Sizes written in a view follow the kept counts."""
    if c.note(node, Shuffle) is not None:
        edit_shuffled(c, node)
        return
    value, written = c.value(node), written_sizes(node)
    assert written is not None
    name, first = written
    with c.editor.before(c.new_of[node]):
        sizes = [
            c.size(c.twin(e), c.count(value.atoms[first + k], value.shape[first + k]), value.shape[first + k])
            for k, e in enumerate(bind(node)[name])
        ]
    c.set(node, **{name: sizes})


@family(
    Card("view", edit=edit_sizes, depends=depends_view, carries=through_view),
    "view", "reshape", "_unsafe_view", "unflatten", "_reshape_copy", "view_copy", "_reshape_alias",
)  # fmt: skip
def view(t: Trace, node: fx.Node) -> Value:
    """A view is a product of factors; the last one of a channel shuffle (see `find_shuffles`) stands for all of it."""
    shuffle = t.notes.get(node)
    if isinstance(shuffle, Shuffle):
        return shuffled(t, shuffle)
    a = bind(node)
    if not isinstance(a.get("size", a.get("shape", a.get("sizes"))), (list, tuple)):
        raise NoRule("views the bits as another type")
    return reshape_value(t, node, t.value(node.args[0]), t.shape(node))


@family(Card("view", depends=depends_view, carries=through_view), "flatten", "view_as", "reshape_as", "ravel")
def flatten(t: Trace, node: fx.Node) -> Value:
    """Views without a size of their own; where another tensor gives the sizes, the two live together."""
    value = reshape_value(t, node, t.value(node.args[0]), t.shape(node))
    other = bind(node).get("other")
    for own, given in zip(value.atoms, t.value(other).atoms, strict=True) if other is not None else ():
        t.tie(own, given, node)
    return value
