"""Channels and space traded for one another: a channel of the one side is a block of places of the other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import fx

from pipeline.channels.operators.card import Card
from pipeline.channels.operators.movement import depends_moved
from pipeline.channels.operators.table import bind, family
from pipeline.channels.operators.trace import SPACE, Trace
from pipeline.channels.operators.values import Value
from pipeline.channels.operators.views import Shuffle, edit_shuffled, merge_dims, shuffled, split_dim


@family(Card("arrangement", depends=depends_moved), "pixel_shuffle")
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


@family(Card("arrangement", depends=depends_moved), "pixel_unshuffle")
def pixel_unshuffle(t: Trace, node: fx.Node) -> Value:
    """[*, C, H·r, W·r] -> [*, C·r·r, H, W]."""
    x, shape = t.value(node.args[0]), t.shape(node)
    r = bind(node)["downscale_factor"]
    t.pin_value(x, node, SPACE, [len(shape) - 2, len(shape) - 1])
    d = len(shape) - 3
    atoms, zeros = merge_dims(t, node, [x.atoms[d], None, None], [x.zeros[d], None, None], [x.shape[d], r, r])
    return Value(shape, (*x.atoms[:d], atoms, None, None), (*x.zeros[:d], zeros, None, None), x.derived)


@family(Card("arrangement", edit=edit_shuffled, depends=depends_moved), "channel_shuffle", "native_channel_shuffle")
def channel_shuffle(t: Trace, node: fx.Node) -> Value:
    """Channels dealt out over groups: a permutation of dimension 1."""
    source: Any = node.args[0]
    order = np.arange(t.value(source).shape[1]).reshape(bind(node)["groups"], -1).T.reshape(-1)
    shuffle = t.notes[node] = Shuffle(source, 1, order)
    return shuffled(t, shuffle)


@family(Card("arrangement", depends=depends_moved), "im2col")
def im2col(t: Trace, node: fx.Node) -> Value:
    """[B, C, H, W] -> [B, C·k·k, L]."""
    x, shape = t.value(node.args[0]), t.shape(node)
    t.pin_value(x, node, SPACE, [2, 3])
    block = math.prod(bind(node)["kernel_size"])
    atoms, zeros = merge_dims(t, node, [x.atoms[1], None], [x.zeros[1], None], [x.shape[1], block])
    return Value(shape, (x.atoms[0], atoms, None), (x.zeros[0], zeros, None), x.derived)


@family(Card("arrangement", depends=depends_moved), "col2im")
def col2im(t: Trace, node: fx.Node) -> Value:
    """[B, C·k·k, L] -> [B, C, H, W], overlaps summed."""
    x, shape = t.value(node.args[0]), t.shape(node)
    t.pin_value(x, node, SPACE, [2])
    block = math.prod(bind(node)["kernel_size"])
    factors, zeros = split_dim(t, node, x.atoms[1], x.zeros[1], [shape[1], block])
    t.pin(factors[1], node, "a place inside the block")
    return Value(shape, (x.atoms[0], factors[0], None, None), (x.zeros[0], zeros[0], None, None), x.derived)


@family(Card("arrangement", depends=depends_moved), "unfold")
def unfold(t: Trace, node: fx.Node) -> Value:
    """Windows of one dimension, laid along a new last one."""
    x, shape = t.value(node.args[0]), t.shape(node)
    dim = bind(node)["dimension"] % len(x.shape)
    t.pin(x.atoms[dim], node, "cut into windows")
    x = x.replace_dim(dim, None, None, shape[dim])
    return x.pick([*range(len(x.shape)), -1], shape)
