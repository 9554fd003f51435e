"""Weights as length and direction: v·g/‖v‖, the norm over all dimensions but one."""

from __future__ import annotations

from typing import Any

from torch import fx

from pipeline.channels.operators.card import Card
from pipeline.channels.operators.table import bind, family
from pipeline.channels.operators.trace import Trace
from pipeline.channels.operators.values import Value, opaque


@family(Card("weight norm"), "_weight_norm", "_weight_norm_interface")
def weight_norm(t: Trace, node: fx.Node) -> Any:
    """v·g/‖v‖, the norm over all dimensions but one: computed once, at full size, and sliced."""
    a = bind(node)
    v, g = t.value(a["v"]), t.value(a["g"])
    if not g.shape:  # one length for all of v (dim=None)
        t.pin_value(v, node, "normalised over")
        return opaque(v.shape, v.derived)
    dim = a["dim"] % len(v.shape)
    if v.derived:
        t.frozen.add(node)
    else:
        t.pin_value(v, node, "normalised over", [d for d in range(len(v.shape)) if d != dim])
    for d, (n, atoms) in enumerate(zip(g.shape, g.atoms, strict=True)):
        if n > 1:
            t.tie(v.atoms[d], atoms, node)
    # 0/‖0‖ is not a number, so along `dim` masks write their zeros into g alone (see `walk`).
    zeros = tuple(g.zeros[d] if d == dim else v.zeros[d] for d in range(len(v.shape)))
    y = Value(v.shape, v.atoms, zeros, v.derived)
    return (y, t.opaque_like(node)[1]) if isinstance(node.meta["val"], (tuple, list)) else y
