"""What is exactly zero in a tensor, read off its bits, and linear layers and convolutions that leave it out.

Bits, because adding them up with OR takes a quarter of the time of the smallest and the largest value, and NumPy's own
arrays, because large ones come in huge pages: on a large model the page faults cost more than the arithmetic.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from pipeline.channels.operators.table import bind, find
from pipeline.channels.operators.values import Flags

_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Weights below this are multiplied faster than looked through.
_LARGE = 1 << 16
# What has to be left of a weight for leaving out the rest to cost less than it saves.
_LEFT = 0.7


def bits(tensor: Tensor) -> npt.NDArray[Any]:
    """A real tensor's elements as whole numbers of the same size and shape; shares memory where it lies in order."""
    plain = tensor.detach().contiguous()
    return plain.view(_WHOLE[plain.element_size()]).numpy()


def masked(tensor: Tensor, mask: npt.NDArray[np.bool_]) -> Tensor:
    """A copy of `tensor` with zero where `mask` is False, whatever stood there."""
    return torch.from_numpy(np.multiply(bits(tensor), mask)).view(tensor.dtype)


def zero_slices(tensor: Tensor, dim: int) -> Flags:
    """For every index of dimension `dim`: whether its slice is exactly zero (-0.0 is, NaN is not)."""
    if tensor.dtype.is_complex or not tensor.numel():
        return (tensor == 0).movedim(dim, 0).reshape(tensor.shape[dim], -1).all(1).numpy()
    dim %= tensor.dim()
    inner = math.prod(tensor.shape[dim + 1 :])
    if tensor.dtype == torch.bool:
        tensor = tensor.to(torch.uint8)
    seen = bits(tensor).reshape(-1, tensor.shape[dim] * inner)
    any_bit = np.bitwise_or.reduce(seen, axis=0) if seen.shape[0] > 1 else seen[0]
    if inner > 1:
        any_bit = np.bitwise_or.reduce(any_bit.reshape(-1, inner), axis=1)
    if tensor.dtype.is_floating_point:  # without the sign
        any_bit = any_bit & np.iinfo(any_bit.dtype).max
    zero: Flags = any_bit == 0
    return zero


def without_zeros(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `node` computes of `args` and `kwargs`; rows and columns of a large weight that are exactly zero are left
    out of the product.

    The same numbers in another order of summation: a left out product is 0·x = 0 (for finite x; NaN otherwise).
    """
    card = find(node.target)
    weighted = card.weighted if card is not None else None
    if weighted is None or weighted.input_dim is None or weighted.transposed or kwargs:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    a = dict(zip(bind(node), args, strict=False))
    x, weight = a[weighted.input], a[weighted.weight]
    fits = weight.dim() > 1 and (not weighted.windows or x.dim() == weight.dim())
    if fits and weight.numel() >= _LARGE and a.get("groups", 1) == 1:
        rows, columns = (torch.from_numpy(np.flatnonzero(~zero_slices(weight, d))) for d in (0, 1))
        if 0 < len(rows) * len(columns) <= _LEFT * weight.shape[0] * weight.shape[1]:
            return _product(node, args, a, rows, columns, dim=weighted.input_dim % x.dim())
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _product(
    node: fx.Node, args: tuple[Any, ...], a: dict[str, Any], rows: Tensor, columns: Tensor, dim: int
) -> Tensor:
    """The product of the kept rows and columns, at their places among the others, plus the bias."""
    x, weight, bias = a["input"], a["weight"], a.get("bias")
    kept = weight.index_select(0, rows).index_select(1, columns)
    y = node.target(x.index_select(dim, columns), kept, None, *args[3:])  # type: ignore[operator]
    shape = list(y.shape)
    shape[dim] = weight.shape[0]
    whole: Tensor = y.new_zeros(shape).index_copy_(dim, rows, y)
    return whole if bias is None else whole.add_(bias.reshape(-1, *[1] * (y.dim() - 1 - dim)))
