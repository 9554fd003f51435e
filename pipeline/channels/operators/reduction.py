"""Dimensions taken together: means, variances, sums, extremes. And scans along a dimension, such as a softmax.

A mean or a variance over channels keeps the original count (see `original_count`), a sum loses nothing with a zero;
where a zero counts like any other number, the dimension stays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from foundation.editor import writes
from pipeline.channels.operators.card import Card
from pipeline.channels.operators.carry import without
from pipeline.channels.operators.cut import Cut
from pipeline.channels.operators.masks import Masks, NoAnswer, spread
from pipeline.channels.operators.original_count import kept_share, over_channels, variance, with_absent
from pipeline.channels.operators.pointwise import depends_pointwise, pointwise
from pipeline.channels.operators.table import base_name, bind, family
from pipeline.channels.operators.trace import Trace
from pipeline.channels.operators.values import Value

aten = torch.ops.aten


def depends_reduced(m: Masks, node: fx.Node, value: Any) -> Tensor:
    """Each result from all that it was made of."""
    a = bind(node)
    mask = m.mask(a["self"])
    if not isinstance(value, Tensor) or "dim" not in a:
        raise NoAnswer
    return mask.to(torch.uint8).amax(dim=_dims(a, mask.dim()), keepdim=bool(a.get("keepdim", False))) != 0


def depends_extreme(m: Masks, node: fx.Node, value: Any) -> Tensor:
    """The larger or smaller of two tensors is pointwise, of one tensor a reduction."""
    of_two = bind(node).get("other") is not None
    return depends_pointwise(m, node, value) if of_two else depends_reduced(m, node, value)


def _dims(a: dict[str, Any], rank: int) -> list[int]:
    dims = a.get("dim")
    if dims is None or dims == []:
        return list(range(rank))
    return [d % rank for d in ([dims] if isinstance(dims, int) else dims)]


def _reduced(t: Trace, node: fx.Node, x: Value, dims: list[int], keeps_zero: bool = True) -> Value:
    """`x` without `dims`, or with length one there."""
    shape = t.shape(node)
    gone = {d % len(x.shape) for d in dims}
    order = [(-1 if d in gone else d) for d in range(len(x.shape))]
    if len(shape) != len(x.shape):
        order = [d for d in order if d >= 0]
    y = x.pick(order, shape)
    return y if keeps_zero else Value(y.shape, y.atoms, (None,) * len(shape), y.derived)


def _reduction(c: Cut, node: fx.Node) -> tuple[dict[str, Any], list[int], float]:
    """Arguments and dimensions of a reduction, and the share of what it runs over that is left."""
    a = bind(node)
    x = c.value(a["self"])
    dims = _dims(a, len(x.shape))
    return a, dims, kept_share(c, x, dims)


@dataclass(frozen=True, eq=False)
class Deviation:
    """What is averaged are squared deviations from `mean`."""

    mean: fx.Node


def edit_mean(c: Cut, node: fx.Node) -> None:
    """The mean over n of which n' are left is n'/n times theirs; of squared deviations from the mean, what the absent
    ones had is added.
    """
    a, dims, ratio = _reduction(c, node)
    if ratio == 1.0:
        return
    deviation = c.note(node, Deviation)
    if deviation is None:
        c.replace(node, lambda new: c.call(aten.mul.Tensor, new, ratio), f"mean·{ratio:.6g}")
        return

    def build(new: fx.Node) -> fx.Node:
        middle = c.new_of[deviation.mean]
        return with_absent(c, new, middle if a.get("keepdim") else c.call(aten.squeeze.dims, middle, dims), ratio)

    c.replace(node, build, f"variance with the original count (kept share {ratio:.6g})")


@family(Card("reduction", edit=edit_mean, depends=depends_reduced, carries=without, averages=True), "mean")
def mean(t: Trace, node: fx.Node) -> Value:
    """A mean over channels keeps the original count, also of squared deviations, as a norm written out takes it."""
    a = bind(node)
    x = t.value(a["self"])
    dims = _dims(a, len(x.shape))
    source = a["self"]
    found = _deviation(t, source, dims)
    if found is not None:
        source, middle = found
        t.notes[node] = Deviation(middle)
    over_channels(t, node, source, dims)
    return _reduced(t, node, x, dims, keeps_zero=found is None)


def _deviation(t: Trace, square: Any, dims: Sequence[int]) -> tuple[fx.Node, fx.Node] | None:
    """(x, mean of x) where `square` is (x − mean of x)², the mean taken over `dims` and these kept with length one."""
    name, inner = base_name(square.target) if square.op == "call_function" else "", square.args
    if not (name == "square" or (name == "pow" and inner[1] == 2) or (name == "mul" and inner[0] is inner[1])):
        return None
    difference: Any = inner[0]
    if not isinstance(difference, fx.Node) or base_name(difference.target) != "sub" or difference.kwargs:
        return None
    x, middle = difference.args
    if writes(square) or writes(difference) or not isinstance(x, fx.Node) or not isinstance(middle, fx.Node):
        return None
    mean_node: Any = middle
    while base_name(mean_node.target) == "unsqueeze":
        mean_node = mean_node.args[0]
    if base_name(mean_node.target) != "mean" or mean_node.args[0] is not x:
        return None
    shape, rank = t.shape(middle), len(t.shape(x))
    fits = len(shape) == rank and all(shape[d] == 1 for d in dims)
    return (x, middle) if fits and sorted(_dims(bind(mean_node), rank)) == sorted(dims) else None


def edit_var(c: Cut, node: fx.Node) -> None:
    """Variance, standard deviation, or variance and mean with the original count."""
    a, dims, ratio = _reduction(c, node)
    if ratio == 1.0:
        return
    x = c.value(a["self"])
    n = math.prod(x.shape[d] for d in dims)
    correction = a["correction"] if "correction" in a else int(bool(a.get("unbiased", True)))
    bessel = n / (n - (1 if correction is None else correction))
    keepdim = bool(a.get("keepdim", False))

    def build(new: fx.Node) -> fx.Node:
        source = new.args[0]
        mean = c.call(aten.mul.Tensor, c.call(aten.mean.dim, source, dims, True), ratio)
        spread = variance(c, c.call(aten.sub.Tensor, source, mean), mean, dims, ratio, 0.0)
        var = c.call(aten.mul.Tensor, spread, bessel)
        if "std" in str(node.target):
            var = c.call(aten.sqrt.default, var)
        flat = [y if keepdim else c.call(aten.squeeze.dims, y, dims) for y in (var, mean)]
        if isinstance(c.values[node], tuple):
            for user in list(new.users):
                user.replace_all_uses_with(flat[user.args[1]])  # type: ignore[index]
            return new
        return flat[0]

    c.replace(node, build, f"variance with the original count (kept share {ratio:.6g})")


@family(Card("reduction", edit=edit_var, depends=depends_reduced), "var", "std", "var_mean", "std_mean")
def var(t: Trace, node: fx.Node) -> Any:
    """Variance over channels keeps the original count."""
    a = bind(node)
    x = t.value(a["self"])
    dims = _dims(a, len(x.shape))
    if "std_mean" in str(node.target) and any(x.atoms[d] is not None for d in dims):
        t.pin_value(x, node, "statistics over this dimension", dims)
    else:
        over_channels(t, node, a["self"], dims)
    if isinstance(node.meta["val"], (tuple, list)):
        shape = t.shape_of(node.meta["val"][0])
        order = [-1 if d in dims else d for d in range(len(x.shape))]
        y = x.pick(order if len(shape) == len(x.shape) else [d for d in order if d >= 0], shape)
        return y, y
    return _reduced(t, node, x, dims)


@family(Card("reduction", depends=depends_reduced, carries=without), "sum")
@family(
    Card("reduction", depends=depends_reduced),
    "nansum", "linalg_vector_norm", "norm", "count_nonzero", "frobenius_norm",
)  # fmt: skip
def total(t: Trace, node: fx.Node) -> Value:
    """A sum or norm over channels loses nothing with a zero."""
    a = bind(node)
    x = t.value(a["self"])
    dims = _dims(a, len(x.shape))
    order = a.get("ord", a.get("p", 2))
    if order is not None and isinstance(order, (int, float)) and order <= 0:
        t.pin_value(x, node, "reduced over", dims)
    for d in dims:
        if x.derived and x.atoms[d] is not None:
            t.frozen.add(node)
        elif x.atoms[d] is not None:
            t.contract(node, [(a["self"], d)])
    return _reduced(t, node, x, dims)


@family(
    Card("reduction", depends=depends_extreme),
    "amax", "amin", "prod", "logsumexp", "any", "all", "argmax", "argmin", "median", "aminmax", "max", "min",
)  # fmt: skip
def extreme(t: Trace, node: fx.Node) -> Any:
    """A reduction in which a zero counts: what it runs over stays."""
    a = bind(node)
    if "other" in a and a["other"] is not None:
        return pointwise(t, node)
    x = t.value(a["self"])
    dims = _dims(a, len(x.shape))
    if x.derived and any(x.atoms[d] is not None for d in dims):
        t.frozen.add(node)
    else:
        t.pin_value(x, node, "reduced over", dims)
    if isinstance(node.meta["val"], (tuple, list)):
        shape = t.shape_of(node.meta["val"][0])
        order = [-1 if d in dims else d for d in range(len(x.shape))]
        y = x.pick(order if len(shape) == len(x.shape) else [d for d in order if d >= 0], shape)
        return y, Value(y.shape, y.atoms, (None,) * len(shape))
    name = str(node.target)
    return _reduced(t, node, x, dims, keeps_zero="amax" in name or "amin" in name or "prod" in name)


# -- scans ---------------------------------------------------------------------------------------------------------


def depends_scan(m: Masks, node: fx.Node, value: Any) -> Tensor:
    """Each index from all others of the dimension."""
    a = bind(node)
    mask = m.mask(a["self"])
    return spread(mask, [(a["dim"] if a["dim"] is not None else -1) % mask.dim()])


@family(
    Card("scan", depends=depends_scan),
    "softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp",
)  # fmt: skip
@family(Card("scan"), "sort", "topk", "cummax", "cummin", "msort", "argsort", "renorm")
def along(t: Trace, node: fx.Node) -> Any:
    """Operators along one dimension, in which a zero counts: that dimension stays."""
    a = bind(node)
    x = t.value(a["self"])
    dim = (a["dim"] if a.get("dim") is not None else -1) % len(x.shape)
    t.pin(x.atoms[dim], node, "every index of this dimension has a part in the others")
    if x.derived and x.labelled:
        t.frozen.add(node)

    def alike(shape: tuple[int, ...]) -> Value:
        keeps = all(k not in str(node.target) for k in ("softm", "logcum", "arg"))
        atoms = tuple(None if d == dim else at for d, at in enumerate(x.atoms))
        zeros = tuple(z if keeps and d != dim else None for d, z in enumerate(x.zeros))
        return Value(shape, atoms, zeros, x.derived)

    val = node.meta["val"]
    if isinstance(val, (tuple, list)):
        return tuple(alike(t.shape_of(v)) for v in val)
    return alike(t.shape_of(val))
