"""Transforms between space and frequency, and between complex numbers and pairs of real ones."""

from __future__ import annotations

from torch import fx

from pipeline.channels.operators.card import Card
from pipeline.channels.operators.table import bind, family
from pipeline.channels.operators.trace import Trace
from pipeline.channels.operators.values import Value


@family(
    Card("transform"),
    "fft_rfft", "fft_irfft", "fft_fft", "fft_ifft", "fft_rfft2", "fft_irfft2", "fft_fft2", "fft_ifft2", "fft_rfftn",
    "fft_irfftn", "fft_fftn", "fft_ifftn",
)  # fmt: skip
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


@family(Card("transform"), "view_as_complex", "view_as_real")
def complex_view(t: Trace, node: fx.Node) -> Value:
    """The pair (real, imaginary) as a last dimension, or without it."""
    x, shape = t.value(node.args[0]), t.shape(node)
    if len(shape) > len(x.shape):
        return x.pick([*range(len(x.shape)), -1], shape)
    t.pin(x.atoms[-1], node, "real and imaginary part")
    return x.pick(list(range(len(shape))), shape)
