"""Operators that multiply and sum over a dimension: convolutions, linear layers, matrix products, einsum, embeddings.

y[o] = Σ_i w[o, i]·x[i] + b[o]: the output lives with the rows and the bias, the input with the columns; index i may
go only where x[i] or w[·, i] is exactly zero (`Trace.contract`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import fx

from pipeline.channels.operators.cut import Cut
from pipeline.channels.operators.layout import merge_dims
from pipeline.channels.operators.table import bind, rule
from pipeline.channels.operators.trace import ROWS, SPACE, NoRule, Trace
from pipeline.channels.operators.values import Atoms, Flags, Value, both, either


def _bias(t: Trace, node: fx.Node, bias: Any, atoms: Atoms | None, zeros: Flags | None) -> tuple[Any, Any]:
    """Rows with their bias: zero only when both are."""
    if bias is None:
        return atoms, zeros
    b = t.value(bias)
    if not b.shape or b.shape[-1] == 1:
        return atoms, None
    t.tie(atoms, b.atoms[-1], node)
    return (None if b.atoms[-1] is None else atoms), both(zeros, b.zeros[-1])


@rule("linear")
def linear(t: Trace, node: fx.Node) -> Value:
    """y[..., o] = Σ_i x[..., i]·w[o, i] + b[o]."""
    a = bind(node)
    x, w = t.value(a["input"]), t.value(a["weight"])
    t.contract(node, [(a["input"], len(x.shape) - 1), (a["weight"], len(w.shape) - 1)])
    t.reading(w.atoms[-1])
    if len(w.shape) == 1:
        return Value(x.shape[:-1], x.atoms[:-1], (None,) * (len(x.shape) - 1), x.derived and w.derived)
    atoms, zeros = _bias(t, node, a["bias"], w.atoms[0], w.zeros[0])
    lead = _lead_zeros(x.zeros[:-1], a["bias"])
    return Value((*x.shape[:-1], w.shape[0]), (*x.atoms[:-1], atoms), (*lead, zeros), x.derived and w.derived)


def _lead_zeros(zeros: tuple[Flags | None, ...], bias: Any) -> tuple[Flags | None, ...]:
    """A slice of the input that is zero gives a slice of the output that is zero, unless a bias is added."""
    return zeros if bias is None else (None,) * len(zeros)


@rule("addmm", "addbmm", "baddbmm", "addmv")
def addmm(t: Trace, node: fx.Node) -> Value:
    """bias + a·b."""
    a = bind(node)
    left, right = [a[k] for k in list(a)[1:3]]
    if t.shape(node) != _matmul_shape(t.shape(left), t.shape(right)):
        raise NoRule("sums over the batch")
    product = _matmul(t, node, left, right)
    bias = t.value(a["self"])
    atoms, zeros = list(product.atoms), []
    lead = len(product.shape) - len(bias.shape)
    for d in range(len(product.shape)):
        k = d - lead
        if k >= 0 and bias.shape[k] == product.shape[d]:
            t.tie(atoms[d], bias.atoms[k], node)
            atoms[d] = None if bias.atoms[k] is None else atoms[d]
            zeros.append(both(product.zeros[d], bias.zeros[k]))
        else:
            zeros.append(None)
    return Value(product.shape, tuple(atoms), tuple(zeros))


@rule("matmul", "mm", "bmm", "mv", "dot")
def matmul(t: Trace, node: fx.Node) -> Value:
    """a·b over the last dimension of a and the last but one of b, batch dimensions broadcast."""
    return _matmul(t, node, *node.args[:2])  # type: ignore[arg-type]


def _matmul_shape(left: Sequence[int], right: Sequence[int]) -> tuple[int, ...]:
    return (*np.broadcast_shapes(tuple(left[:-2]), tuple(right[:-2])), left[-2], right[-1])


def _matmul(t: Trace, node: fx.Node, left: fx.Node, right: fx.Node) -> Value:
    a, b = t.value(left), t.value(right)
    activations = not (a.derived or b.derived)
    inner = max(len(b.shape) - 2, 0)
    if activations:
        t.role("position", a.atoms[-1])
        t.role("position", b.atoms[inner])
    t.contract(node, [(left, len(a.shape) - 1), (right, inner)])
    for v, d in ((a, len(a.shape) - 1), (b, inner)):
        if v.derived:
            t.reading(v.atoms[d])
    rank = max(len(a.shape), len(b.shape)) - 2
    atoms: list[Atoms | None] = []
    zeros: list[Flags | None] = []
    for d in range(max(rank, 0)):
        ka, kb = d - rank + len(a.shape) - 2, d - rank + len(b.shape) - 2
        wide_a = ka >= 0 and a.shape[ka] > 1
        wide_b = kb >= 0 and b.shape[kb] > 1
        if wide_a and wide_b:
            t.tie(a.atoms[ka], b.atoms[kb], node)
        fixed = (wide_a and a.atoms[ka] is None) or (wide_b and b.atoms[kb] is None) or not (wide_a or wide_b)
        batch = None if fixed else a.atoms[ka] if wide_a else b.atoms[kb]
        if activations:
            t.role("head", batch)
        atoms.append(batch)
        zeros.append(None if fixed else either(a.zeros[ka] if wide_a else None, b.zeros[kb] if wide_b else None))
    if len(a.shape) > 1:
        atoms.append(a.atoms[-2])
        zeros.append(a.zeros[-2])
    if len(b.shape) > 1:
        atoms.append(b.atoms[-1])
        zeros.append(b.zeros[-1])
        if activations:
            t.role("position", b.atoms[-1])
    return Value(t.shape(node), tuple(atoms), tuple(zeros), a.derived and b.derived)


@rule("einsum")
def einsum(t: Trace, node: fx.Node) -> Value:
    """Letters tie dimensions; a letter that is not in the output is summed."""
    operands = list(node.args[1])  # type: ignore[arg-type]
    letters, output = parse_einsum(str(node.args[0]), [len(t.shape(n)) for n in operands])
    where: dict[str, list[tuple[fx.Node, int]]] = {}
    for source, names in zip(operands, letters, strict=True):
        for d, name in enumerate(names):
            if t.shape(source)[d] > 1:
                where.setdefault(name, []).append((source, d))
    activations = all(not t.value(n).derived for n in operands)
    atoms: dict[str, Atoms | None] = {}
    zeros: dict[str, Flags | None] = {}
    for name, sides in where.items():
        values = [(t.value(n), d) for n, d in sides]
        if name not in output:
            t.contract(node, sides)
            for v, d in values:
                if v.derived:
                    t.reading(v.atoms[d])
                if activations and len(sides) > 1:
                    t.role("position", v.atoms[d])
            continue
        first = values[0][0].atoms[values[0][1]]
        flags: Flags | None = None
        for v, d in values:
            t.tie(first, v.atoms[d], node)
            flags = either(flags, v.zeros[d])
        fixed = any(v.atoms[d] is None for v, d in values)
        atoms[name], zeros[name] = (None, None) if fixed else (first, flags)
        if activations and len(sides) > 1:
            t.role("head", atoms[name])
    return Value(
        t.shape(node),
        tuple(atoms.get(n) for n in output),
        tuple(zeros.get(n) for n in output),
        all(t.value(n).derived for n in operands),
    )


def parse_einsum(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """Letters of each operand and of the output, an ellipsis spelled out in capitals that nobody uses."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    spare = [c for c in map(chr, range(0x391, 0x3AA)) if c not in equation]
    hidden = max((r - len(s.replace("...", "")) for s, r in zip(terms, ranks, strict=True) if "..." in s), default=0)
    dots = "".join(spare[:hidden])

    def spell(term: str, rank: int) -> str:
        own = rank - len(term.replace("...", ""))
        return term.replace("...", dots[len(dots) - own :] if own else "")

    names = [spell(s, r) for s, r in zip(terms, ranks, strict=True)]
    if arrow:
        return names, right.replace("...", dots)
    joined = "".join(names)
    return names, dots + "".join(sorted(c for c in set(joined) - set(dots) if joined.count(c) == 1))


@rule("embedding")
def embedding(t: Trace, node: fx.Node) -> Value:
    """Rows of a table picked by an integer: the rows stay, the columns are channels."""
    a = bind(node)
    w = t.value(a["weight"])
    t.pin(w.atoms[0], node, ROWS)
    if a["indices"] in t.values:
        t.pin_value(t.value(a["indices"]), node, ROWS)
    lead = len(t.shape(node)) - 1
    return Value(
        t.shape(node),
        (*[None] * lead, w.atoms[1]),
        (*[None] * lead, w.zeros[1]),
        w.derived and a["indices"] in t.static,
    )


# -- convolution ---------------------------------------------------------------------------------------------------


def edit_groups(c: Cut, node: fx.Node) -> None:
    """The number of groups follows the groups that stay."""
    groups = c.notes.get(node)
    if groups is not None:
        c.set(node, groups=c.count(groups, groups.shape[0]))


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution",
      edit=edit_groups)  # fmt: skip
def convolution(t: Trace, node: fx.Node) -> Value:
    """Input = groups × inputs of a group, output = groups × outputs of a group; space stays."""
    a = bind(node)
    x, w, shape = t.value(a["input"]), t.value(a["weight"]), t.shape(node)
    if isinstance(a.get("padding"), str) is False and len(x.shape) != len(w.shape):
        raise NoRule("an input without a batch")
    transposed = "transpose" in str(node.target) or bool(a.get("transposed"))
    groups = a["groups"]
    t.pin_value(w, node, SPACE, range(2, len(w.shape)))
    t.pin_value(x, node, SPACE, range(2, len(x.shape)))
    into, out = (0, 1) if transposed else (1, 0)  # weight dims: [out, in/groups, ...], transposed [in, out/groups, ...]
    if groups == 1:
        t.contract(node, [(a["input"], 1), (a["weight"], into)])
        t.reading(w.atoms[into])
        atoms, zeros = w.atoms[out], w.zeros[out]
    else:
        atoms, zeros = _grouped(t, node, a, groups, transposed)
    atoms, zeros = _bias(t, node, a["bias"], atoms, zeros)
    rest = [None] * (len(shape) - 2)
    return Value(shape, (x.atoms[0], atoms, *rest), (None, zeros, *rest), x.derived and w.derived)


def _grouped(t: Trace, node: fx.Node, a: dict[str, Any], groups: int, transposed: bool) -> tuple[Any, Any]:
    """Dimension 0 of the weight is groups × positions, dimension 1 the positions of one group on the other side."""
    x, w = t.value(a["input"]), t.value(a["weight"])
    free = x.atoms[1] is not None and w.atoms[0] is not None
    if not free:
        t.pin(x.atoms[1], node, "tied to a fixed dimension")
        t.pin_value(w, node, "tied to a fixed dimension", [0, 1])
        return None, None
    group = t.fresh(groups)
    t.notes[node] = group
    inside, outside = x.shape[1] // groups, w.shape[0] // groups
    per_group = w.atoms[1]  # positions within a group, the same for every group
    if transposed:  # weight [groups × in per group, out per group]: the input is dimension 0
        _product(t, node, x.atoms[1], group, t.fresh(inside) if inside > 1 else None, (groups, inside))
        t.reading(w.atoms[0])
        t.contract(node, [(a["input"], 1), (a["weight"], 0)])
        sizes = (groups, w.shape[1])
        flat, _ = merge_dims(t, node, [group, per_group], [None, None], sizes)
        flags = _tile_or(w.zeros[1], groups)
        return flat, flags
    t.reading(per_group)
    if inside > 1 and w.zeros[1] is not None and w.zeros[1].all():
        t.contract(node, [(a["weight"], 1)])
    elif inside > 1:  # a weight that is computed (standardised) does not become zero: the input has to be
        t.contract(node, [(a["input"], 1)])
    _product(t, node, x.atoms[1], group, per_group if inside > 1 else None, (groups, inside))
    _product(t, node, w.atoms[0], group, t.fresh(outside) if outside > 1 else None, (groups, outside))
    return w.atoms[0], w.zeros[0]


def _tile_or(flags: Flags | None, times: int) -> Flags | None:
    return None if flags is None else np.tile(flags, times)


def _product(t: Trace, node: fx.Node, flat: Any, group: Atoms, inner: Atoms | None, sizes: tuple[int, int]) -> None:
    if math.prod(sizes) != flat.shape[0]:
        raise ValueError(f"{node}: {flat.shape[0]} channels are not {sizes[0]} groups of {sizes[1]}")
    t.product(node, flat, (group if sizes[0] > 1 else None, inner), sizes)


@rule("bilinear")
def bilinear(t: Trace, node: fx.Node) -> Value:
    """y[o] = Σ x1[i]·w[o, i, j]·x2[j] + b[o]."""
    a = bind(node)
    w = t.value(a["weight"])
    for side, dim in (("input1", 1), ("input2", 2)):
        t.contract(node, [(a[side], len(t.shape(a[side])) - 1), (a["weight"], dim)])
        t.reading(w.atoms[dim])
    atoms, zeros = _bias(t, node, a["bias"], w.atoms[0], w.zeros[0])
    x = t.value(a["input1"])
    return Value((*x.shape[:-1], w.shape[0]), (*x.atoms[:-1], atoms), (*[None] * (len(x.shape) - 1), zeros))
