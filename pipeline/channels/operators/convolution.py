"""Convolutions: input = groups × inputs of a group, output = groups × outputs of a group; space stays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, fx

from pipeline.channels.operators.card import Card, Shape, WeightedSum
from pipeline.channels.operators.cut import Cut
from pipeline.channels.operators.linear import with_bias
from pipeline.channels.operators.masks import Masks, number
from pipeline.channels.operators.table import bind, family
from pipeline.channels.operators.trace import SPACE, NoRule, Trace
from pipeline.channels.operators.values import Atoms, Flags, Value
from pipeline.channels.operators.views import merge_dims


@dataclass(frozen=True, eq=False)
class Groups:
    """The atoms of a convolution's groups."""

    group: Atoms


def edit_groups(c: Cut, node: fx.Node) -> None:
    """The number of groups follows the groups that stay."""
    found = c.note(node, Groups)
    if found is not None:
        given, before = bind(node)["groups"], found.group.shape[0]
        with c.editor.before(c.new_of[node]):  # a node where it is the groups of one sample times the batch
            c.set(node, groups=c.size(c.twin(given), c.count(found.group, before), before))


def depends_convolution(m: Masks, node: fx.Node, value: Any) -> Tensor:
    """The convolution of the masks counts the inputs that reach an output."""
    a = bind(node)
    m.ask(a["weight"], a["bias"])
    a |= {"input": number(m.mask(a["input"])), "weight": number(m.filled(a["weight"])), "bias": None}
    out: Tensor = node.target(**a)  # type: ignore[operator]
    return out > 0.5  # a count of ones, up to rounding


def macs_convolution(node: fx.Node, shape: Shape) -> int:
    """The kernel of one group at every place: of the output, transposed of the input."""
    a = bind(node)
    per_position = math.prod(shape(a["weight"])[1:])  # inputs (transposed: outputs) of one group × kernel
    return math.prod(shape(a["input"]) if _is_transposed(node, a) else shape(node)) * per_position


def _is_transposed(node: fx.Node, a: dict[str, Any]) -> bool:
    return "transpose" in str(node.target) or bool(a.get("transposed"))


_FORWARD = WeightedSum("input", "weight", "bias", 1, 1, weight_in=1, weight_out=0, windows=True)
_TRANSPOSED = WeightedSum("input", "weight", "bias", 1, 1, weight_in=0, weight_out=1, windows=True)


def _card(weighted: WeightedSum | None) -> Card:
    return Card("contraction", None, edit_groups, depends_convolution, macs_convolution, weighted)


@family(_card(_FORWARD), "conv1d", "conv2d", "conv3d")
@family(_card(_TRANSPOSED), "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
@family(_card(None), "convolution")  # either, as an argument says
def convolution(t: Trace, node: fx.Node) -> Value:
    """y[o] = Σ_i w[o, i] ∗ x[i] + b[o], within each group."""
    a = bind(node)
    x, w, shape = t.value(a["input"]), t.value(a["weight"]), t.shape(node)
    if isinstance(a.get("padding"), str) is False and len(x.shape) != len(w.shape):
        raise NoRule("an input without a batch")
    transposed = _is_transposed(node, a)
    groups = a["groups"]
    t.pin_value(w, node, SPACE, range(2, len(w.shape)))
    t.pin_value(x, node, SPACE, range(2, len(x.shape)))
    into, out = (0, 1) if transposed else (1, 0)  # weight dims: [out, in/groups, ...], transposed [in, out/groups, ...]
    if isinstance(groups, fx.Node):
        atoms, zeros = _per_sample(t, node, a, groups, transposed)
    elif groups == 1:
        t.contract(node, [(a["input"], 1), (a["weight"], into)])
        t.reading(w.atoms[into])
        atoms, zeros = w.atoms[out], w.zeros[out]
    else:
        atoms, zeros = _grouped(t, node, a, groups, transposed)
    atoms, zeros = with_bias(t, node, a["bias"], atoms, zeros)
    rest = [None] * (len(shape) - 2)
    return Value(shape, (x.atoms[0], atoms, *rest), (None, zeros, *rest), x.derived and w.derived)


def _grouped(t: Trace, node: fx.Node, a: dict[str, Any], groups: int, transposed: bool) -> tuple[Any, Any]:
    """Dimension 0 of the weight is groups × positions, dimension 1 the positions of one group on the other side."""
    x, w = t.value(a["input"]), t.value(a["weight"])
    free = x.atoms[1] is not None and w.atoms[0] is not None
    if not free:
        return _nothing_goes(t, node, x, w)
    group = t.fresh(groups)
    t.notes[node] = Groups(group)
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


def _per_sample(t: Trace, node: fx.Node, a: dict[str, Any], groups: fx.Node, transposed: bool) -> tuple[Any, Any]:
    """The batch folded into the groups, every sample with weights of its own: input [1, batch × channels, …], weight
    [batch × outputs, inputs of a group, …]. Channels are those of one sample, alike in all.
    """
    x, w = t.value(a["input"]), t.value(a["weight"])
    expression = groups.meta["val"].node.expr
    own = int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))  # groups of one sample
    batch = t.size_of(groups.meta["val"]) // own
    if x.atoms[1] is None or w.atoms[0] is None:
        return _nothing_goes(t, node, x, w)
    inputs, outputs = _of_one(x.atoms[1], batch), _of_one(w.atoms[0], batch)
    if transposed or inputs is None or outputs is None:
        raise NoRule("weights of its own for every sample, in a form that is not known")
    inside, outside = inputs.shape[0] // own, outputs.shape[0] // own
    per_group = w.atoms[1]
    if inside > 1:  # the sum is over the weight's dimension, which is that of one sample
        t.contract(node, [(a["weight"], 1)])
    if own == 1:
        t.tie(inputs, per_group, node)
    else:
        group = t.fresh(own)
        t.notes[node] = Groups(group)
        _product(t, node, inputs, group, per_group if inside > 1 else None, (own, inside))
        _product(t, node, outputs, group, t.fresh(outside) if outside > 1 else None, (own, outside))
    return w.atoms[0], w.zeros[0]


def _nothing_goes(t: Trace, node: fx.Node, x: Value, w: Value) -> tuple[None, None]:
    """Where one of the two has no channels that could go, neither has."""
    t.pin(x.atoms[1], node, "tied to a fixed dimension")
    t.pin_value(w, node, "tied to a fixed dimension", [0, 1])
    return None, None


def _of_one(atoms: Atoms, batch: int) -> Atoms | None:
    """The atoms of one sample, of a dimension batch × channels that holds the same for each; None where it does not."""
    grid = atoms.reshape(batch, -1)
    return grid[0] if (grid == grid[0]).all() else None


def _tile_or(flags: Flags | None, times: int) -> Flags | None:
    return None if flags is None else np.tile(flags, times)


def _product(t: Trace, node: fx.Node, flat: Any, group: Atoms, inner: Atoms | None, sizes: tuple[int, int]) -> None:
    if math.prod(sizes) != flat.shape[0]:
        raise ValueError(f"{node}: {flat.shape[0]} channels are not {sizes[0]} groups of {sizes[1]}")
    t.product(node, flat, (group if sizes[0] > 1 else None, inner), sizes)
