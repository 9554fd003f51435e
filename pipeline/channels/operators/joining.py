"""Tensors put together: one after the other, or side by side. Their other dimensions live together."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from pipeline.channels.operators.card import Card
from pipeline.channels.operators.movement import depends_moved
from pipeline.channels.operators.table import bind, family
from pipeline.channels.operators.trace import Trace
from pipeline.channels.operators.values import PINNED, Atoms, Flags, Value, both


@family(Card("arrangement", depends=depends_moved), "cat", "concat", "concatenate")
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


@family(Card("arrangement", depends=depends_moved), "stack")
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
