"""What became of a weight, and the reasons that several kinds of fits have to leave one as it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from pipeline.recovery import regression, tied
from pipeline.recovery.contractions import whole_channels

LARGEST_SPARSE = 1 << 31
"""Outputs times columns squared of a weight of which single ones are masked: multiply-accumulates in each step of the
conjugate gradients.
"""
NOTHING_KEPT = "nothing of it is kept"
TOO_FEW = "too few of its rows can be held back"
NOT_FINITE = "it reads or gave values that are not finite"


@dataclass(frozen=True)
class Fitted:
    """What became of one weight. `reason` says why it stayed as it was; errors as in `regression.Fit`."""

    name: str
    rows: int = 0
    columns: int = 0
    strength: float = 0.0
    error_before: float = 0.0
    error_after: float = 0.0
    reason: str = ""


def of_groups(name: str, rows: int, columns: Tensor, fits: Sequence[regression.Fit | tied.TiedFit]) -> Fitted:
    """What became of a weight by the fits of its groups, their errors on average; `columns`: kept, (groups, all)."""
    return Fitted(
        name=name,
        rows=rows,
        columns=int(columns.sum(1).max()),
        strength=fits[0].strength,
        error_before=sum(fit.error_before for fit in fits) / len(fits),
        error_after=sum(fit.error_after for fit in fits) / len(fits),
    )


def not_real(*values: Tensor) -> str:
    """The reason where one of them does not hold real numbers."""
    real = all(v.is_floating_point() for v in values)
    return "" if real else "it is no matter of real numbers"


def without_samples(node: fx.Node, x: Tensor, weight: Tensor) -> str:
    """The reason where the input of `node` is a single sample."""
    return f"the input of {node.name} has no dimension for the samples" if x.dim() < weight.dim() else ""


def too_sparse(kept: Tensor) -> str:
    """The reason where single weights of a mask (groups, outputs, columns) are gone, and it is too large for that."""
    if whole_channels(kept) or kept.numel() * kept.shape[2] <= LARGEST_SPARSE:
        return ""
    return "single weights are masked, of too many to fit each output alone"
