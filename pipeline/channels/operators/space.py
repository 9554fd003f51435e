"""Operators on space: pooling, resizing, sampling. Channels pass, space stays."""

from __future__ import annotations

from typing import Any

from torch import fx

from pipeline.channels.operators.table import base_name, bind, rule
from pipeline.channels.operators.trace import SPACE, Trace
from pipeline.channels.operators.values import Value

_SPACE = {"1d": 1, "2d": 2, "3d": 3, "bilinear": 2, "linear": 1, "trilinear": 3, "bicubic": 2}


@rule(
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "max_pool1d_with_indices", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d",
    "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
)  # fmt: skip
def pooled(t: Trace, node: fx.Node) -> Any:
    """Pooling and resizing of the last one, two or three dimensions."""
    x = t.value(node.args[0])
    name = base_name(node.target)
    space = next(int(name[k - 1]) for k in range(len(name), 1, -1) if name[k - 1] in "123" and name[k : k + 1] == "d")
    lead = len(x.shape) - space
    indexed = "with_indices" in name  # they count through all of space
    over = {lead + k for k in range(space) if indexed or not _passes(bind(node), k)}
    t.pin_value(x, node, SPACE, sorted(over))

    def alike(val: Any) -> Value:
        atoms = [None if d in over else at for d, at in enumerate(x.atoms)]
        zeros = [None if d in over else z for d, z in enumerate(x.zeros)]
        return Value(t.shape_of(val), tuple(atoms), tuple(zeros), x.derived)

    val = node.meta["val"]
    return tuple(alike(v) for v in val) if isinstance(val, (tuple, list)) else alike(val)


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


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def sampled(t: Trace, node: fx.Node) -> Value:
    """Samples at places of a grid [B, H, W, 2]: channels pass, the grid stays."""
    a = bind(node)
    x, grid = t.value(a["input"]), t.value(a["grid"])
    t.pin_value(grid, node, "coordinates")
    t.pin_value(x, node, SPACE, range(2, len(x.shape)))
    rest = [None] * (len(x.shape) - 2)
    return Value(t.shape(node), (None, x.atoms[1], *rest), (None, x.zeros[1], *rest))


@rule("fft_rfft", "fft_irfft", "fft_fft", "fft_ifft", "fft_rfft2", "fft_irfft2", "fft_fft2", "fft_ifft2", "fft_rfftn",
      "fft_irfftn", "fft_fftn", "fft_ifftn")  # fmt: skip
def fourier(t: Trace, node: fx.Node) -> Value:
    """A transform of some dimensions: these stay, the others pass."""
    a = bind(node)
    x = t.value(a["self"])
    dims = a["dim"]
    named = range(len(x.shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    over = {d % len(x.shape) for d in named}
    t.pin_value(x, node, "transformed over", sorted(over))
    y = x.pick(list(range(len(x.shape))), t.shape(node))
    return Value(
        y.shape,
        tuple(None if d in over else at for d, at in enumerate(y.atoms)),
        tuple(None if d in over else z for d, z in enumerate(y.zeros)),
        y.derived,
    )


@rule("view_as_complex", "view_as_real")
def complex_view(t: Trace, node: fx.Node) -> Value:
    """The pair (real, imaginary) as a last dimension, or without it."""
    x, shape = t.value(node.args[0]), t.shape(node)
    if len(shape) > len(x.shape):
        return x.pick([*range(len(x.shape)), -1], shape)
    t.pin(x.atoms[-1], node, "real and imaginary part")
    return x.pick(list(range(len(shape))), shape)
