"""Operators that act on each element alone.

y[i] = f(x[i], z[i], ...): index i of the output lives with index i of every operand that has that dimension. Whether a
zero survives is not looked up in a list but *asked of the operator*: it is run on zeros in the places of the operands
that are zero and on random numbers elsewhere, and the answer must be exactly zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from pipeline.channels.operators.card import Card
from pipeline.channels.operators.carry import times_number
from pipeline.channels.operators.masks import Masks
from pipeline.channels.operators.table import bind, family, tensors
from pipeline.channels.operators.trace import Trace
from pipeline.channels.operators.values import Flags, Value

_PROBES = 64
_answers: dict[tuple[Any, ...], bool] = {}


def depends_pointwise(m: Masks, node: fx.Node, value: Any) -> Tensor:
    """An element depends where any of its operands does."""
    found = torch.zeros(value.shape, dtype=torch.bool)
    for source in tensors(node):
        found = found | m.mask(source)
    return found


def depends_multiplied(m: Masks, node: fx.Node, value: Any) -> Tensor:
    """A product: a factor that is zero whatever the input cuts the other off."""
    a, b = node.args[:2]
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return depends_pointwise(m, node, value)
    return (m.mask(a) & m.filled(b)) | (m.filled(a) & m.mask(b))


@family(Card("pointwise", depends=depends_multiplied, carries=times_number), "mul")
@family(Card("pointwise", depends=depends_pointwise, carries=times_number), "div")
@family(
    Card("pointwise", depends=depends_pointwise),
    "type_as", "hardswish", "hardtanh", "nan_to_num", "where", "masked_fill", "copy", "fill", "zero", "lerp",
    "real", "imag", "complex", "polar",
    "__and__", "__or__",  # `&` and `|`, which PyTorch does not tag, as it does `^`
    tag=torch.Tag.pointwise,
)  # fmt: skip
def pointwise(t: Trace, node: fx.Node) -> Value:
    """Broadcast: tie the operands index by index."""
    operands = tensors(node)
    values = [t.value(n) for n in operands]
    shape = t.shape(node)
    rank = len(shape)
    atoms: list[Any] = [None] * rank
    zeros: list[Any] = [None] * rank
    for d in range(rank):
        if shape[d] == 1:
            continue
        present = [(v, d - rank + len(v.shape)) for v in values]
        here = [(v, k) for v, k in present if k >= 0 and v.shape[k] == shape[d]]
        if not here:
            continue
        reference = here[0][0].atoms[here[0][1]]
        for v, k in here[1:]:
            t.tie(reference, v.atoms[k], node, "shares a dimension with something fixed")
            reference = None if v.atoms[k] is None else reference
        atoms[d] = reference
        if reference is not None:
            zeros[d] = _zeros(
                node, operands, [v.zeros[k] if k >= 0 and v.shape[k] == shape[d] else None for v, k in present]
            )
    return Value(shape, tuple(atoms), tuple(zeros), all(v.derived for v in values))


@family(Card("pointwise"), "prelu", "_prelu_kernel")
def prelu(t: Trace, node: fx.Node) -> Value:
    """One slope per channel (dimension 1), or one for all."""
    x, slope = t.value(node.args[0]), t.value(node.args[1])
    if slope.shape and slope.shape[-1] > 1 and len(slope.shape) == 1:
        t.tie(x.atoms[1], slope.atoms[0], node)
    elif len(slope.shape) > 1:
        return pointwise(t, node)
    return x


@family(Card("pointwise"), "glu")
def glu(t: Trace, node: fx.Node) -> Value:
    """a·sigmoid(b) of the two halves of one dimension: the halves stay equally long."""
    a = bind(node)
    x = t.value(a["self"])
    dim = a["dim"] % len(x.shape)
    atoms, flags, half = x.atoms[dim], x.zeros[dim], x.shape[dim] // 2
    if atoms is None:
        return x.replace_dim(dim, None, None, half)
    t.tie(atoms[:half], atoms[half:], node)
    return x.replace_dim(dim, atoms[:half], None if flags is None else flags[:half], half)


def _zeros(node: fx.Node, operands: list[fx.Node], flags: list[Flags | None]) -> Flags | None:
    """Where the output is exactly zero, given where each operand is."""
    length = next((f.shape[0] for f in flags if f is not None), 0)
    if not length:
        return None
    table = np.stack([np.zeros(length, np.bool_) if f is None else f for f in flags])
    codes = (1 << np.arange(len(flags))) @ table
    out = np.zeros(length, np.bool_)
    for code in (codes[0],) if (codes == codes[0]).all() else np.unique(codes):
        if keeps_zero(node, operands, tuple(bool(code >> k & 1) for k in range(len(flags)))):
            out |= codes == code
    return out if out.any() else None


def keeps_zero(node: fx.Node, operands: list[fx.Node], zero: tuple[bool, ...]) -> bool:
    """Whether the operator's output is exactly zero when the operands marked in `zero` are, whatever the others are."""
    if not any(zero):
        return False
    dtypes = tuple(n.meta["val"].dtype for n in operands)
    rest = str(_plain(node.args)), str(_plain(tuple(node.kwargs.items())))
    same = tuple(operands.index(n) for n in operands)
    key = (node.target, zero, dtypes, rest, same)
    if key not in _answers:
        _answers[key] = _probe(node, operands, zero)
    return _answers[key]


def _probe(node: fx.Node, operands: list[fx.Node], zero: tuple[bool, ...]) -> bool:
    draw = torch.Generator().manual_seed(0)
    stand_in: dict[fx.Node, Tensor] = {}
    for source, is_zero in zip(operands, zero, strict=True):
        dtype = source.meta["val"].dtype
        if is_zero:
            probe = torch.zeros(_PROBES, dtype=dtype)
        elif dtype == torch.bool:
            probe = torch.rand(_PROBES, generator=draw) > 0.5
        elif dtype.is_floating_point:
            probe = torch.randn(_PROBES, generator=draw) * 3
            probe[::4] *= 1e3  # far out, and at zero itself
            probe[:2] = 0
            probe = probe.to(dtype)
        else:
            probe = torch.randint(-4, 9, (_PROBES,), generator=draw).to(dtype)
        stand_in[source] = probe

    def swap(n: fx.Node) -> Any:
        return stand_in[n].clone() if n in stand_in else 1

    try:
        with torch.no_grad():
            out = node.target(*fx.node.map_arg(node.args, swap), **fx.node.map_arg(node.kwargs, swap))  # type: ignore[operator]
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    # 0/0 and 0·inf are not numbers in the folded model either.
    return isinstance(out, Tensor) and bool((torch.nan_to_num(out, nan=0.0) == 0).all())


def _plain(args: Any) -> Any:
    return fx.node.map_arg(args, lambda n: "tensor" if isinstance(n.meta.get("val"), Tensor) else "size")
