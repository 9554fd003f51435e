"""What kind of work one of the runtime's operators does, and the terms that its time is a sum of."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

Shapes = Sequence[Sequence[Any]]
"""Of an operator's tensors: each dimension a number, or an array of one number per model."""

PRODUCTS = (
    "MatMul",
    "Gemm",
    "MatMulInteger",
    "QGemm",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "QLinearMatMul",
)
RECURRENT = ("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM")


class Work(NamedTuple):
    """What kind of work an operator does, and the terms that its time is a sum of, the first of them a constant."""

    key: Hashable
    terms: list[Any]
    shared: bool = True
    """Whether two operators of one key cost alike; not where shapes do not say what decides it, such as the kernel of
    a convolution whose weight the runtime has packed away.
    """


def work(kind: str, inputs: Shapes, outputs: Shapes, block: int) -> Work:
    """What an operator does, told by its kind and its shapes.

    `block`: channels that the kernels take together; widths count as rounded up to that.
    """
    out = outputs[0] if outputs else ()
    first = inputs[0] if inputs else ()
    if min(len(first), len(out)) > 2 and _channels_last(kind, inputs, out):
        first, out = ((shape[0], shape[-1], *shape[1:-1]) for shape in (first, out))
    if "Conv" in kind and min(len(first), len(out)) > 2:
        return _convolution(kind, inputs, first, out, block)
    if kind.removeprefix("Fused") in PRODUCTS and len(first):
        products = _elements(out) * first[-1]
        rows = out[-2] if len(out) > 1 and np.ndim(out[-2]) == 0 else 0
        return Work((kind, len(first), rows), [1.0, products, _elements(first), _elements(out)])
    if kind in RECURRENT and len(out):
        hidden = out[-1]
        return Work((kind, *_fixed(first[:2])), [1.0, hidden * (first[-1] + hidden), hidden])
    read = sum((_elements(one) for one in inputs), 0.0)
    written = sum((_elements(one) for one in outputs), 0.0)
    if "Pool" in kind and len(first) > 2:
        return Work((kind, *_fixed(first[2:]), *_fixed(out[2:])), [1.0, read, written, _odd(first, block) * read])
    return Work((kind, len(inputs), len(out)), [1.0, read, written])


def has_weights(kind: str) -> bool:
    """Whether an operator of a kind is a layer: one goes with a branch only where its own width does."""
    return "Conv" in kind or kind.removeprefix("Fused") in PRODUCTS or kind in RECURRENT


def _channels_last(kind: str, inputs: Shapes, out: Sequence[Any]) -> bool:
    """Whether a convolution or a pool has its channels behind its positions, as onnxruntime's of 8-bit integers have:
    a convolution has as many scales and biases, and a pool leaves as many.
    """
    if kind.startswith("Nhwc"):
        return True
    if kind == "QLinearConv":
        return any(len(one) == 1 and np.array_equal(one[0], out[-1]) for one in inputs)
    if kind.startswith("QLinear") and "Pool" in kind:
        return np.array_equal(inputs[0][-1], out[-1])
    return False


def _convolution(kind: str, inputs: Shapes, first: Sequence[Any], out: Sequence[Any], block: int) -> Work:
    """`first`, `out`: shapes read and written, the channels in second place."""
    weight = next((one for one in inputs[1:] if len(one) == len(first)), None)
    whole_in, whole_out = _up(first[1], block), _up(out[1], block)
    key = (kind, *_fixed(first[2:]), *_fixed(out[2:]), sum(len(one) == len(first) for one in inputs))
    if weight is None:
        return Work(key, [1.0, whole_out * whole_in, out[1] * np.asarray(first[1]), whole_in, whole_out], shared=False)
    per_group = weight[1]
    key = (*key, *_fixed(weight[2:]))
    if _always(per_group, 1) and not _always(first[1], 1):
        return Work(("depthwise", *key), [1.0, whole_out, _odd(out, block) * out[1]])
    both = whole_out * (_up(per_group, block) if np.array_equal(per_group, first[1]) else per_group)
    odd = _odd(first, block)
    plain = out[1] * np.asarray(per_group)
    return Work(key, [1.0, both, plain, whole_in, whole_out, odd * plain, odd * out[1]])


def _elements(shape: Sequence[Any]) -> Any:
    total: Any = 1.0
    for size in shape:
        total = total * size
    return total


def _up(size: Any, block: int) -> Any:
    return np.ceil(np.asarray(size) / block) * block


def _odd(shape: Sequence[Any], block: int) -> Any:
    """Whether channels are off the block: such a tensor is not read in blocks, which is several times as fast."""
    return np.asarray(shape[1]) % block != 0


def _always(size: Any, value: int) -> bool:
    return bool(np.all(np.asarray(size) == value))


def _fixed(shape: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(size for size in shape if np.ndim(size) == 0)
