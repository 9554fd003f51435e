"""Operators on space: pooling, resizing, sampling. Channels pass, space stays."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from pipeline.channels.operators.card import Card
from pipeline.channels.operators.masks import Masks, alike, number
from pipeline.channels.operators.table import base_name, bind, family
from pipeline.channels.operators.trace import SPACE, Trace
from pipeline.channels.operators.values import Value


def depends_pooled(m: Masks, node: fx.Node, value: Any) -> Any:
    """The operator itself on the mask: its weights are never negative, so nothing cancels out."""
    source: Any = node.args[0]
    out = m.run(node, {source: number(m.mask(source))})
    if isinstance(out, Tensor):
        return out > 0
    return (out[0] > 0, *alike(value[1:], True))  # which place held the maximum is anyone's guess


@family(
    Card("pooling", depends=depends_pooled),
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "max_pool1d_with_indices", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d",
    "upsample_bilinear2d", "upsample_trilinear3d", "_upsample_bilinear2d_aa",
)  # fmt: skip
@family(Card("pooling"), "upsample_bicubic2d", "_upsample_bicubic2d_aa")  # weights of both signs may cancel out
def pooled(t: Trace, node: fx.Node) -> Any:
    """Pooling and resizing of the last one, two or three dimensions."""
    x = t.value(node.args[0])
    name = base_name(node.target)
    space = next(n for n in (1, 2, 3) if f"{n}d" in name)
    lead = len(x.shape) - space
    indexed = "with_indices" in name  # they count through all of space
    over = {lead + k for k in range(space) if indexed or not _passes(bind(node), k)}
    t.pin_value(x, node, SPACE, sorted(over))

    def channels_of(val: Any) -> Value:
        atoms = [None if d in over else at for d, at in enumerate(x.atoms)]
        zeros = [None if d in over else z for d, z in enumerate(x.zeros)]
        return Value(t.shape_of(val), tuple(atoms), tuple(zeros), x.derived)

    val = node.meta["val"]
    return tuple(channels_of(v) for v in val) if isinstance(val, (tuple, list)) else channels_of(val)


def _passes(a: dict[str, Any], k: int) -> bool:
    """Whether a pooling's window is one wide in its `k`th dimension: it leaves every index as it is."""
    if "kernel_size" not in a:
        return False

    def entry(name: str, default: int) -> int:
        given = a.get(name)
        if isinstance(given, int):
            return given
        return int(given[k if len(given) > 1 else 0]) if given else default

    kernel = entry("kernel_size", 0)
    return (kernel, entry("stride", kernel), entry("padding", 0)) == (1, 1, 0)


@family(Card("pooling"), "grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def sampled(t: Trace, node: fx.Node) -> Value:
    """Samples at places of a grid [B, H, W, 2]: channels pass, the grid stays."""
    a = bind(node)
    x, grid = t.value(a["input"]), t.value(a["grid"])
    t.pin_value(grid, node, "coordinates")
    t.pin_value(x, node, SPACE, range(2, len(x.shape)))
    rest = [None] * (len(x.shape) - 2)
    return Value(t.shape(node), (None, x.atoms[1], *rest), (None, x.zeros[1], *rest))
