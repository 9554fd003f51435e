"""Tensors made from sizes: a written size may follow any count, so each index is free until something ties it."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from pipeline.channels.operators.card import Card
from pipeline.channels.operators.repetition import edit_expand
from pipeline.channels.operators.table import base_name, family, register
from pipeline.channels.operators.trace import Trace
from pipeline.channels.operators.values import Value, opaque


@family(Card("creation", edit=edit_expand), "zeros", "ones", "full")
@family(Card("creation", edit=edit_expand, random=True), "rand", "randn")
@family(Card("creation", edit=edit_expand, undefined=True), "empty", "new_empty")
@family(Card("creation", edit=edit_expand, type_only=True), "new_zeros", "new_ones", "new_full")
def created(t: Trace, node: fx.Node) -> Value:
    """Free atoms in every dimension; zero where the operator writes zeros."""
    shape = t.shape(node)
    zero = base_name(node.target) in ("zeros", "new_zeros")
    return Value(
        shape,
        tuple(t.fresh(n) if n > 1 else None for n in shape),
        tuple(np.full(n, True) if zero and n > 1 else None for n in shape),
    )


@family(Card("creation"), "zeros_like", "ones_like", "full_like")
@family(Card("creation", random=True), "rand_like", "randn_like")
@family(Card("creation", undefined=True), "empty_like")
def like(t: Trace, node: fx.Node) -> Value:
    """A fresh tensor of the operand's shape loses what the operand loses."""
    x = t.value(node.args[0])
    filled = base_name(node.target) == "zeros_like"
    zeros = tuple(np.full(n, filled) if a is not None else None for a, n in zip(x.atoms, x.shape, strict=True))
    return Value(x.shape, x.atoms, zeros)


@family(Card("creation"), "arange", "scalar_tensor", "linspace", "eye", "tensor")
@family(Card("creation", undefined=True), "empty_permuted")
def counted(t: Trace, node: fx.Node) -> Any:
    """Numbers that mean positions: they stay."""
    return opaque(t.shape(node))


register(Card("creation", undefined=True), "empty_strided")
