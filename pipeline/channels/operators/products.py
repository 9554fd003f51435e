"""Products of two tensors summed over a dimension: matrix products and einsum.

Index i of what is summed over may go only where one of the two is exactly zero there (`Trace.contract`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from pipeline.channels.operators.card import Card, Shape
from pipeline.channels.operators.masks import Masks, NoAnswer, number
from pipeline.channels.operators.table import bind, family
from pipeline.channels.operators.trace import NoRule, Trace
from pipeline.channels.operators.values import Atoms, Flags, Value, both, either


def _product_depends(m: Masks, a: Any, b: Any, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Where one factor depends and the other is not zero, at any index of the sum."""
    one = product(number(m.mask(a)), number(m.filled(b)))
    return (one + product(number(m.filled(a)), number(m.mask(b)))) > 0.5


# -- matrix products with something added --------------------------------------------------------------------------


def depends_addmm(m: Masks, node: fx.Node, value: Any) -> Tensor:
    """From the product, and from what is added."""
    bias, a, b = node.args[:3]
    return m.mask(bias) | _product_depends(m, a, b, torch.matmul)


def macs_addmm(node: fx.Node, shape: Shape) -> int:
    """The product's; what is added is not counted."""
    left, right = shape(node.args[1]), shape(node.args[2])  # type: ignore[arg-type]
    return math.prod(left) * (right[-1] if len(right) > 1 else 1)


@family(Card("contraction", depends=depends_addmm, macs=macs_addmm, matrices=(1, 2)), "addmm")
@family(Card("contraction", depends=depends_addmm, macs=macs_addmm), "addbmm", "baddbmm", "addmv")
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


# -- matrix products -----------------------------------------------------------------------------------------------


def depends_matmul(m: Masks, node: fx.Node, value: Any) -> Tensor:
    """From the product."""
    a, b = node.args[:2]
    return _product_depends(m, a, b, node.target)  # type: ignore[arg-type]


def macs_matmul(node: fx.Node, shape: Shape) -> int:
    """One per output and index of the sum."""
    return math.prod(shape(node)) * shape(node.args[0])[-1]  # type: ignore[arg-type]


@family(Card("contraction", depends=depends_matmul, macs=macs_matmul, matrices=(0, 1)), "matmul", "mm")
@family(Card("contraction", depends=depends_matmul, macs=macs_matmul), "bmm", "mv", "dot")
def matmul(t: Trace, node: fx.Node) -> Value:
    """a·b over the last dimension of a and the last but one of b, batch dimensions broadcast."""
    return _matmul(t, node, *node.args[:2])  # type: ignore[arg-type]


def _matmul_shape(left: Sequence[int], right: Sequence[int]) -> tuple[int, ...]:
    return (*np.broadcast_shapes(tuple(left[:-2]), tuple(right[:-2])), left[-2], right[-1])


def _matmul(t: Trace, node: fx.Node, left: fx.Node, right: fx.Node) -> Value:
    a, b = t.value(left), t.value(right)
    activations = not (a.derived or b.derived)  # as in attention: batch dimensions are heads
    inner = max(len(b.shape) - 2, 0)
    if activations:
        t.role("position", a.atoms[-1])
        t.role("position", b.atoms[inner])
    t.contract(node, [(left, len(a.shape) - 1), (right, inner)])
    for v, d in ((a, len(a.shape) - 1), (b, inner)):
        if v.derived:
            t.reading(v.atoms[d])
    # Batch dimensions broadcast: counted from the right, and one that is one wide follows the other.
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


# -- distances -----------------------------------------------------------------------------------------------------


def macs_cdist(node: fx.Node, shape: Shape) -> int:
    """One per pair and index of the sum."""
    return math.prod(shape(node)) * shape(node.args[0])[-1]  # type: ignore[arg-type]


def depends_cdist(m: Masks, node: fx.Node, value: Any) -> Tensor:
    """From each of the two vectors."""
    one, other = (m.mask(n).any(-1) for n in node.args[:2])
    return one.unsqueeze(-1) | other.unsqueeze(-2)


@family(Card("contraction", depends=depends_cdist, macs=macs_cdist), "cdist")
def cdist(t: Trace, node: fx.Node) -> Value:
    """y[..., i, j] = ‖a[..., i, :] − b[..., j, :]‖: an index of the vectors may go where it is zero in both."""
    left, right = node.args[:2]
    a, b = t.value(left), t.value(right)
    for side, v in ((left, a), (right, b)):
        t.contract(node, [(side, len(v.shape) - 1)], "both vectors have to be zero there")  # type: ignore[list-item]
    t.tie(a.atoms[-1], b.atoms[-1], node)
    shape = t.shape(node)
    rank = len(shape)
    atoms: list[Atoms | None] = [None] * (rank - 2)
    for v in (a, b):  # batch dimensions, broadcast: no channels by custom
        t.pin_value(v, node, "a batch of vectors", range(len(v.shape) - 2))
    return Value(shape, (*atoms, a.atoms[-2], b.atoms[-2]), (None,) * rank, a.derived and b.derived)


@family(Card("reduction"), "cosine_similarity", "pairwise_distance")
def similarity(t: Trace, node: fx.Node) -> Value:
    """Two vectors along one dimension, compared by products: an index may go where it is zero in both."""
    a = bind(node)
    if "dim" not in a:
        raise NoRule("its eps is added to every difference, so that an index that is zero in both still counts")
    one, other = t.value(a["x1"]), t.value(a["x2"])
    if one.shape != other.shape:
        raise NoRule("compares vectors of two shapes")
    dim = a["dim"] % len(one.shape)
    for side in (a["x1"], a["x2"]):
        t.contract(node, [(side, dim)], "both vectors have to be zero there")
    for x, y in zip(one.atoms, other.atoms, strict=True):
        t.tie(x, y, node)
    rest = [d for d in range(len(one.shape)) if d != dim]
    atoms = tuple(None if other.atoms[d] is None else one.atoms[d] for d in rest)
    return Value(t.shape(node), atoms, (None,) * len(rest), one.derived and other.derived)


# -- einsum --------------------------------------------------------------------------------------------------------


def depends_einsum(m: Masks, node: fx.Node, value: Any) -> Tensor:
    """From the product, where there are two operands."""
    equation = str(node.args[0])
    operands: Any = node.args[1]
    if len(operands) != 2:
        raise NoAnswer
    return _product_depends(m, operands[0], operands[1], lambda a, b: torch.einsum(equation, a, b))


def macs_einsum(node: fx.Node, shape: Shape) -> int:
    """One per combination of all letters, for every operand but the first."""
    operands: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    letters, _ = parse_einsum(str(node.args[0]), [len(shape(n)) for n in operands])
    size = {
        name: n
        for names, source in zip(letters, operands, strict=True)
        for name, n in zip(names, shape(source), strict=True)
    }
    return math.prod(size.values()) * (len(operands) - 1)


@family(Card("contraction", depends=depends_einsum, macs=macs_einsum), "einsum")
def einsum(t: Trace, node: fx.Node) -> Value:
    """Letters tie dimensions; a letter that is not in the output is summed."""
    operands = list(node.args[1])  # type: ignore[arg-type]
    letters, output = parse_einsum(str(node.args[0]), [len(t.shape(n)) for n in operands])
    where: dict[str, list[tuple[fx.Node, int]]] = {}  # letter -> every (operand, dimension) that has it
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
