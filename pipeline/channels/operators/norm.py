"""Norms and reductions.

A norm over channels that go keeps its original count: with r = kept / original and every removed channel exactly zero,
    mean = r·mean(kept),   var = r·mean((kept − mean)²) + (1 − r)·mean².
A norm per channel (batch, instance) needs nothing but its own slices; a removed channel is zero after it when scale and
shift are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from pipeline.channels.operators.cut import Cut
from pipeline.channels.operators.layout import split_dim
from pipeline.channels.operators.pointwise import pointwise
from pipeline.channels.operators.table import base_name, bind, rule, writes
from pipeline.channels.operators.trace import SPACE, Trace
from pipeline.channels.operators.values import Atoms, Flags, Value, both

aten = torch.ops.aten
_PAD = aten.constant_pad_nd.default


def scale_and_shift(
    t: Trace, node: fx.Node, weight: Any, bias: Any, atoms: Atoms | None, inner: Flags | None
) -> tuple[Atoms | None, Flags | None]:
    """Atoms and zeros of x·weight + bias for one channel dimension; `inner`: the zeros of x."""
    for parameter in (weight, bias):
        if parameter is not None:
            value = t.value(parameter)
            t.tie(atoms, value.atoms[0], node)
            atoms = None if value.atoms[0] is None else atoms
    if atoms is None:
        return None, None
    scaled = t.value(weight).zeros[0] if weight is not None else inner
    return atoms, both(scaled, t.value(bias).zeros[0]) if bias is not None else scaled


@rule("batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "_batch_norm_impl_index")
def batch_norm(t: Trace, node: fx.Node) -> Value:
    """Each channel (dimension 1) by itself; in training mode over all other dimensions of the tensor."""
    a = bind(node)
    x = t.value(a["input"])
    if a.get("training"):
        # Weight standardisation: statistics of a weight run over its input channels. The parameter-only part of the
        # graph is then computed once, at full size, and sliced (`frozen`); on an activation they have to stay.
        if x.derived:
            t.frozen.add(node)
        else:
            t.pin_value(x, node, "statistics over this dimension", [d for d in range(len(x.shape)) if d != 1])
    atoms = x.atoms[1]
    for k in ("running_mean", "running_var"):
        if a.get(k) is not None:
            t.tie(atoms, t.value(a[k]).atoms[0], node)
    centred = x.zeros[1] if a.get("training") else None
    atoms, zeros = scale_and_shift(t, node, a["weight"], a["bias"], atoms, centred)
    lost: tuple[Any, ...] = (None,) * (len(x.shape) - 2)
    y = Value(x.shape, (x.atoms[0], atoms, *x.atoms[2:]), (None, zeros, *lost), x.derived)
    return y if node.target._schema.name == "aten::batch_norm" else _first_of(t, node, y)  # type: ignore[union-attr]


def _first_of(t: Trace, node: fx.Node, y: Value) -> Any:
    rest = t.opaque_like(node)
    return (y, *rest[1:]) if isinstance(rest, tuple) else y


@rule("instance_norm")
def instance_norm(t: Trace, node: fx.Node) -> Value:
    """Each channel of each sample by itself; statistics run over space."""
    a = bind(node)
    x = t.value(a["input"])
    t.pin_value(x, node, SPACE, range(2, len(x.shape)))
    atoms = x.atoms[1]
    for k in ("running_mean", "running_var"):
        if a[k] is not None:
            t.tie(atoms, t.value(a[k]).atoms[0], node)
    inner = x.zeros[1] if a["use_input_stats"] else None
    atoms, zeros = scale_and_shift(t, node, a["weight"], a["bias"], atoms, inner)
    return Value(x.shape, (x.atoms[0], atoms, *x.atoms[2:]), (None, zeros, *[None] * (len(x.shape) - 2)), x.derived)


# -- norms over channels -------------------------------------------------------------------------------------------


def over_channels(t: Trace, node: fx.Node, source: fx.Node, dims: Sequence[int]) -> list[int]:
    """Ask for a reduction over channel dimensions with the original count; returns the dims that may lose indices."""
    x = t.value(source)
    free = [d for d in dims if x.atoms[d] is not None]
    if free and x.derived:
        t.frozen.add(node)
        return free
    if free and not t.policy.residual:
        t.pin_value(x, node, "normalised over, and the recipe keeps such streams", free)
        return free
    for d in free:
        t.role("residual", x.atoms[d])
        t.contract(node, [(source, d)], "what is removed would not be zero under the norm")
    return free


def edit_layer_norm(c: Cut, node: fx.Node) -> None:
    """LayerNorm with the original count.

    Over one dimension: padded with the zeros that went, normalised by the runtime's own kernel, cut again. Three
    operators, 0.6 to 0.9 of the time that the formula written out takes in onnxruntime (benchmarks/norm_forms.py);
    `centre` makes one operator of it where the whole stream allows.
    """
    a = bind(node)
    x = c.value(a["input"])
    dims = list(range(len(x.shape) - len(a["normalized_shape"]), len(x.shape)))
    ratio = _ratio(c, x, dims)
    sizes = list(c.shape(x)[dims[0] :])
    if ratio == 1.0:
        return

    def padded(new: fx.Node) -> fx.Node:
        full, kept = x.shape[-1], sizes[0]
        missing = [0, full - kept]
        affine = [None if a[k] is None else c.call(_PAD, c.new_of[a[k]], missing) for k in ("weight", "bias")]
        y = c.call(aten.layer_norm.default, c.call(_PAD, new.args[0], missing), [full], *affine, a["eps"])
        return c.call(aten.slice.Tensor, y, -1, 0, kept)

    def written_out(new: fx.Node) -> fx.Node:
        source = new.args[0]
        new.args = (source, sizes, *new.args[2:])
        y = centre_and_scale(c, source, [d - len(x.shape) for d in dims], ratio, a["eps"])
        for operator, k in ((aten.mul.Tensor, "weight"), (aten.add.Tensor, "bias")):
            if a[k] is not None:
                y = c.call(operator, y, c.new_of[a[k]])
        return y

    build = padded if len(dims) == 1 else written_out
    c.replace(node, build, f"layer_norm with the original count (kept share {ratio:.6g})")


def _ratio(c: Cut, x: Value, dims: Sequence[int]) -> float:
    return math.prod(c.count(x.atoms[d], x.shape[d]) for d in dims) / math.prod(x.shape[d] for d in dims)


def centre_and_scale(c: Cut, source: Any, dims: list[int], ratio: float, eps: float) -> fx.Node:
    """(x − mean)/√(var + eps) over `dims`, of which the share `ratio` is left and the rest was zero."""
    mean = c.call(aten.mul.Tensor, c.call(aten.mean.dim, source, dims, True), ratio)
    centred = c.call(aten.sub.Tensor, source, mean)
    return c.call(aten.mul.Tensor, centred, c.call(aten.rsqrt.default, _spread(c, centred, mean, dims, ratio, eps)))


def _spread(c: Cut, centred: fx.Node, mean: fx.Node, dims: list[int], ratio: float, eps: float) -> fx.Node:
    var = _with_absent(c, c.call(aten.mean.dim, c.call(aten.mul.Tensor, centred, centred), dims, True), mean, ratio)
    return c.call(aten.add.Tensor, var, eps) if eps else var


def _with_absent(c: Cut, square: fx.Node, mean: fx.Node, ratio: float) -> fx.Node:
    """The mean squared deviation `square` of the share that is left, with that of the rest: each as far as zero is."""
    absent = c.call(aten.mul.Tensor, c.call(aten.mul.Tensor, mean, mean), 1.0 - ratio)
    return c.call(aten.add.Tensor, c.call(aten.mul.Tensor, square, ratio), absent)


@rule("layer_norm", edit=edit_layer_norm)
def layer_norm(t: Trace, node: fx.Node) -> Value:
    """(x − mean)/σ·weight + bias over the last dimensions."""
    a = bind(node)
    x = t.value(a["input"])
    rank = len(x.shape)
    dims = list(range(rank - len(a["normalized_shape"]), rank))
    over_channels(t, node, a["input"], dims)
    return _affine(t, node, x, dims, [a["weight"], a["bias"]], centred=True)


def edit_rms_norm(c: Cut, node: fx.Node) -> None:
    """RMSNorm with the original count: mean(x²) over n is r·mean over what is left."""
    a = bind(node)
    x = c.value(a["input"])
    dims = list(range(len(x.shape) - len(a["normalized_shape"]), len(x.shape)))
    ratio = _ratio(c, x, dims)
    if ratio == 1.0:
        return
    sizes = list(c.shape(x)[dims[0] :])
    eps = a["eps"] if a["eps"] is not None else float(torch.finfo(torch.float32).eps)

    # rms_norm over what is left with eps/r is √r too large: x/√(m + eps/r) = √r·x/√(r·m + eps).
    def build(new: fx.Node) -> fx.Node:
        new.args = (new.args[0], sizes, None, eps / ratio)
        new.kwargs = {}
        y = c.call(aten.mul.Tensor, new, ratio**-0.5)
        return y if a["weight"] is None else c.call(aten.mul.Tensor, y, c.new_of[a["weight"]])

    c.replace(node, build, f"rms_norm with the original count (kept share {ratio:.6g})")


@rule("rms_norm", edit=edit_rms_norm)
def rms_norm(t: Trace, node: fx.Node) -> Value:
    """x/√(mean(x²) + eps)·weight over the last dimensions."""
    a = bind(node)
    x = t.value(a["input"])
    rank = len(x.shape)
    dims = list(range(rank - len(a["normalized_shape"]), rank))
    over_channels(t, node, a["input"], dims)
    return _affine(t, node, x, dims, [a["weight"]], centred=False)


def _affine(t: Trace, node: fx.Node, x: Value, dims: list[int], parameters: list[Any], centred: bool) -> Value:
    """x times a weight, plus a bias, both of the shape of `dims`."""
    atoms = list(x.atoms)
    zeros: list[Flags | None] = [None] * len(atoms)
    for d in range(dims[0]):  # a sample or token that is zero stays so only without a bias
        zeros[d] = x.zeros[d] if len(parameters) < 2 or parameters[1] is None else None
    for k, d in enumerate(dims):
        given = [t.value(p) for p in parameters if p is not None]
        for v in given:
            t.tie(atoms[d], v.atoms[k], node)
            atoms[d] = None if v.atoms[k] is None else atoms[d]
        flags = None if centred else x.zeros[d]
        if parameters[0] is not None:
            flags = t.value(parameters[0]).zeros[k]
        if len(parameters) > 1 and parameters[1] is not None:
            flags = both(flags, t.value(parameters[1]).zeros[k])
        zeros[d] = flags if atoms[d] is not None else None
    return Value(x.shape, tuple(atoms), tuple(zeros), x.derived)


def edit_group_norm(c: Cut, node: fx.Node) -> None:
    """Whole groups gone: fewer groups. Positions within groups gone: the original count."""
    a = bind(node)
    x = c.value(a["input"])
    group, inner = c.notes[node]
    groups, inside = a["num_groups"], x.shape[1] // a["num_groups"]
    kept_groups, kept_inside = c.count(group, groups), c.count(inner, inside)
    if kept_inside == inside:
        if kept_groups != groups:
            c.set(node, num_groups=kept_groups)
        return
    ratio = kept_inside / inside
    rank = len(x.shape)

    def build(new: fx.Node) -> fx.Node:
        source = new.args[0]
        if groups == 1:
            y = centre_and_scale(c, source, list(range(1, rank)), ratio, a["eps"])
        else:
            split = c.call(aten.unflatten.int, source, 1, [kept_groups, kept_inside])
            y = c.call(
                aten.flatten.using_ints, centre_and_scale(c, split, list(range(2, rank + 1)), ratio, a["eps"]), 1, 2
            )
        for operator, k in ((aten.mul.Tensor, "weight"), (aten.add.Tensor, "bias")):
            if a[k] is not None:
                wide = c.call(aten.view.default, c.new_of[a[k]], [1, kept_groups * kept_inside, *[1] * (rank - 2)])
                y = c.call(operator, y, wide)
        return y

    c.replace(node, build, f"group_norm with the original count (kept share {ratio:.6g})")


@rule("group_norm", edit=edit_group_norm)
def group_norm(t: Trace, node: fx.Node) -> Value:
    """Channels = groups × positions; statistics over the positions of a group and space."""
    a = bind(node)
    x = t.value(a["input"])
    groups = a["num_groups"]
    t.pin_value(x, node, SPACE, range(2, len(x.shape)))
    atoms = x.atoms[1]
    if atoms is not None:
        inside = x.shape[1] // groups
        if groups == 1:
            group, inner = None, atoms
        elif inside == 1:
            group, inner = atoms, None
        else:
            (group, inner), _ = split_dim(t, node, atoms, None, [groups, inside])
        t.notes[node] = group, inner
        if inner is not None and t.policy.residual:
            t.role("residual", inner)
            t.contract(node, [(a["input"], 1)], "what is removed would not be zero under the norm")
        elif inner is not None:
            t.pin(inner, node, "normalised over, and the recipe keeps such streams")
    atoms, zeros = scale_and_shift(t, node, a["weight"], a["bias"], atoms, None)
    return Value(x.shape, (x.atoms[0], atoms, *x.atoms[2:]), (None, zeros, *[None] * (len(x.shape) - 2)), x.derived)


# -- reductions ----------------------------------------------------------------------------------------------------


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
    return a, dims, _ratio(c, x, dims)


def edit_mean(c: Cut, node: fx.Node) -> None:
    """The mean over n of which n' are left is n'/n times theirs; of squared deviations from the mean, what the absent
    ones had is added.
    """
    a, dims, ratio = _reduction(c, node)
    if ratio == 1.0:
        return
    if node not in c.notes:
        c.replace(node, lambda new: c.call(aten.mul.Tensor, new, ratio), f"mean·{ratio:.6g}")
        return

    def build(new: fx.Node) -> fx.Node:
        middle = c.new_of[c.notes[node]]
        return _with_absent(c, new, middle if a.get("keepdim") else c.call(aten.squeeze.dims, middle, dims), ratio)

    c.replace(node, build, f"variance with the original count (kept share {ratio:.6g})")


@rule("mean", edit=edit_mean)
def mean(t: Trace, node: fx.Node) -> Value:
    """A mean over channels keeps the original count, also of squared deviations, as a norm written out takes it."""
    a = bind(node)
    x = t.value(a["self"])
    dims = _dims(a, len(x.shape))
    source = a["self"]
    found = _deviation(t, source, dims)
    if found is not None:
        source, t.notes[node] = found
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
        spread = _spread(c, c.call(aten.sub.Tensor, source, mean), mean, dims, ratio, 0.0)
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


@rule("var", "std", "var_mean", "std_mean", edit=edit_var)
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


@rule("_weight_norm", "_weight_norm_interface")
def weight_norm(t: Trace, node: fx.Node) -> Any:
    """v·g/‖v‖, the norm over all dimensions but one: computed once, at full size, and sliced."""
    a = bind(node)
    v, g = t.value(a["v"]), t.value(a["g"])
    dim = a["dim"] % len(v.shape)
    if v.derived:
        t.frozen.add(node)
    else:
        t.pin_value(v, node, "normalised over", [d for d in range(len(v.shape)) if d != dim])
    for d, (n, atoms) in enumerate(zip(g.shape, g.atoms, strict=True)):
        if n > 1:
            t.tie(v.atoms[d], atoms, node)
    # 0/‖0‖ is not a number, so along `dim` masks write their zeros into g alone (see `couple`).
    zeros = tuple(g.zeros[d] if d == dim else v.zeros[d] for d in range(len(v.shape)))
    y = Value(v.shape, v.atoms, zeros, v.derived)
    return (y, t.opaque_like(node)[1]) if isinstance(node.meta["val"], (tuple, list)) else y


@rule("sum", "nansum", "linalg_vector_norm", "norm", "count_nonzero", "frobenius_norm")
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


@rule("amax", "amin", "prod", "logsumexp", "any", "all", "argmax", "argmin", "median", "aminmax", "max", "min")
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


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp", "sort", "topk",
      "softmin", "cummax", "cummin", "msort", "argsort", "renorm")  # fmt: skip
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
