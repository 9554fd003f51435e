"""Norms: batch, instance, layer, RMS and group norm.

A norm per channel (batch, instance) needs nothing but its own slices; a removed channel is zero after it when scale and
shift are. A norm over channels keeps the original count (see `original_count`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pipeline.channels.operators.card import Card
from pipeline.channels.operators.cut import Cut
from pipeline.channels.operators.masks import Masks, NoAnswer, per_channel, spread
from pipeline.channels.operators.original_count import centre_and_scale, kept_share, over_channels
from pipeline.channels.operators.table import bind, family
from pipeline.channels.operators.trace import SPACE, Trace
from pipeline.channels.operators.values import Atoms, Flags, Value, both
from pipeline.channels.operators.views import split_dim

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


# -- per channel ---------------------------------------------------------------------------------------------------


def depends_batch_norm(m: Masks, node: fx.Node, value: Any) -> Any:
    """Each element from itself; in training mode from all of its channel."""
    a = bind(node)
    if not isinstance(value, Tensor):
        raise NoAnswer
    m.ask(a["bias"])
    mask = m.mask(a["input"])
    if a.get("training"):
        mask = spread(mask, [d for d in range(mask.dim()) if d != 1])
    return per_channel(m, a["weight"], mask, 1)


@family(
    Card("norm", depends=depends_batch_norm, training="training"),
    "batch_norm", "cudnn_batch_norm", "_batch_norm_impl_index",
)  # fmt: skip
@family(Card("norm", depends=depends_batch_norm), "_native_batch_norm_legit_no_training")
def batch_norm(t: Trace, node: fx.Node) -> Any:
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
    rest = t.opaque_like(node)  # some forms give the statistics as well
    return (y, *rest[1:]) if isinstance(rest, tuple) else y


def depends_instance_norm(m: Masks, node: fx.Node, value: Any) -> Tensor:
    """Each element from all of its channel's space."""
    a = bind(node)
    mask = m.mask(a["input"])
    m.ask(a["bias"])
    return per_channel(m, a["weight"], spread(mask, list(range(2, mask.dim()))), 1)


@family(Card("norm", depends=depends_instance_norm), "instance_norm")
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


# -- over channels -------------------------------------------------------------------------------------------------


def depends_layer_norm(m: Masks, node: fx.Node, value: Any) -> Tensor:
    """Each element from all that it is normalised with, unless its scale is zero."""
    a = bind(node)
    mask = m.mask(a["input"])
    over = len(a["normalized_shape"])
    mask = spread(mask, list(range(mask.dim() - over, mask.dim())))
    m.ask(a["weight"], a.get("bias"))
    return mask if a["weight"] is None else mask & (m.values[a["weight"]] != 0)


def edit_layer_norm(c: Cut, node: fx.Node) -> None:
    """LayerNorm with the original count.

    Over one dimension: padded with the zeros that went, normalised by the runtime's own kernel, cut again. Three
    operators, 0.6 to 0.9 of the time that the formula written out takes in onnxruntime (benchmarks/norm_forms.py);
    `centre` makes one operator of it where the whole stream allows.
    """
    a = bind(node)
    x = c.value(a["input"])
    dims = list(range(len(x.shape) - len(a["normalized_shape"]), len(x.shape)))
    ratio = kept_share(c, x, dims)
    sizes = list(c.shape(x)[dims[0] :])
    if ratio == 1.0:
        return

    def padded(new: fx.Node) -> fx.Node:
        # Over n channels again, the mean and the variance are the original ones, zeros included.
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


@family(Card("norm", edit=edit_layer_norm, depends=depends_layer_norm), "layer_norm")
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
    ratio = kept_share(c, x, dims)
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


@family(Card("norm", edit=edit_rms_norm, depends=depends_layer_norm), "rms_norm")
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


@dataclass(frozen=True, eq=False)
class Groups:
    """The atoms of a group norm's groups, and of the positions within a group; None = none that could go."""

    group: Atoms | None
    position: Atoms | None


def depends_group_norm(m: Masks, node: fx.Node, value: Any) -> Tensor:
    """Each element from all of its group."""
    a = bind(node)
    mask = m.mask(a["input"])
    m.ask(a["bias"])
    groups = mask.reshape(mask.shape[0], a["num_groups"], -1)
    return per_channel(m, a["weight"], spread(groups, [2]).reshape(mask.shape), 1)


def edit_group_norm(c: Cut, node: fx.Node) -> None:
    """Whole groups gone: fewer groups. Positions within groups gone: the original count."""
    a = bind(node)
    x = c.value(a["input"])
    found = c.note(node, Groups)
    assert found is not None
    groups, inside = a["num_groups"], x.shape[1] // a["num_groups"]
    kept_groups, kept_inside = c.count(found.group, groups), c.count(found.position, inside)
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


@family(Card("norm", edit=edit_group_norm, depends=depends_group_norm), "group_norm")
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
        t.notes[node] = Groups(group, inner)
        if inner is not None and t.policy.residual:
            t.role("residual", inner)
            t.contract(node, [(a["input"], 1)], "what is removed would not be zero under the norm")
        elif inner is not None:
            t.pin(inner, node, "normalised over, and the recipe keeps such streams")
    atoms, zeros = scale_and_shift(t, node, a["weight"], a["bias"], atoms, None)
    return Value(x.shape, (x.atoms[0], atoms, *x.atoms[2:]), (None, zeros, *[None] * (len(x.shape) - 2)), x.derived)
