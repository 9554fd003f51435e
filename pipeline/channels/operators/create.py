"""Tensors made from sizes: a written size may follow any count, so each index is free until something ties it."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from pipeline.channels.operators.cut import Cut
from pipeline.channels.operators.layout import edit_expand
from pipeline.channels.operators.table import base_name, rule
from pipeline.channels.operators.trace import Trace
from pipeline.channels.operators.values import Value, opaque


def edit_created(c: Cut, node: fx.Node) -> None:
    """A written length follows the kept count."""
    edit_expand(c, node)


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "rand", "randn",
      edit=edit_created)  # fmt: skip
def created(t: Trace, node: fx.Node) -> Value:
    """Free atoms in every dimension; zero where the operator writes zeros."""
    shape = t.shape(node)
    zero = base_name(node.target) in ("zeros", "new_zeros")
    return Value(
        shape,
        tuple(t.fresh(n) if n > 1 else None for n in shape),
        tuple(np.full(n, True) if zero and n > 1 else None for n in shape),
    )


@rule("arange", "scalar_tensor", "linspace", "eye", "tensor", "empty_permuted")
def counted(t: Trace, node: fx.Node) -> Any:
    """Numbers that mean positions: they stay."""
    return opaque(t.shape(node))
