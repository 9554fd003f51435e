"""Padding: places put in at the ends. On a channel dimension they are free, and zero where zeros are put in."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from pipeline.channels.operators.card import Card
from pipeline.channels.operators.cut import Cut
from pipeline.channels.operators.movement import depends_moved
from pipeline.channels.operators.table import bind, family
from pipeline.channels.operators.trace import Trace
from pipeline.channels.operators.values import Value


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


@family(
    Card("arrangement", edit=edit_pad, depends=depends_moved),
    "pad",
    "constant_pad_nd",
    "reflection_pad1d",
    "reflection_pad2d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
    "reflection_pad3d",
)
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
