"""Sums over many float32 numbers: added in float32, which torch does in blocks of blocks, and only what comes out is
float64. To convert each number first takes twenty times as long, and differs by less than the numbers are rounded by.
"""

from __future__ import annotations

import torch
from torch import Tensor


def over(x: Tensor, dims: int | list[int], *, keepdim: bool = False) -> Tensor:
    """Sums over `dims`, float64."""
    return x.sum(dims, keepdim=keepdim).double()


def squares(x: Tensor) -> float:
    """The sum of squares, of numbers of any size."""
    longest = max(range(x.dim()), key=lambda dim: x.shape[dim])
    total = float(torch.linalg.vector_norm(x, dim=longest).double().square().sum())
    # Beyond that single squares may be too large for float32, or too small.
    return total if 1e-30 < total < 1e30 else float(x.double().square().sum())


def finite(x: Tensor) -> bool:
    """Whether every number of a real tensor is finite: where their sum is, in a tenth of the time."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())
