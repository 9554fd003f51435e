"""Groups that go one after another, each the one that its readers then miss least.

What one group's going costs says little of many: of two channels that are alike either may go for nothing, but not
both. So after each round the columns that stay take over what those that went gave, as a fit would let them, and what
every other group costs is asked anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ROUND = 1 / 64
"""Of the groups that are left, how many go before the others are asked anew."""

COMPACT = 1 / 8
"""Of the columns, how many are gone before those that stay are moved together."""


@dataclass(frozen=True)
class Reading:
    """One matrix that reads groups: `weight` (outputs, columns), the Gram matrix of what it reads, (columns, columns),
    or only its diagonal, (columns,), how strongly a refit is pulled to the weights that were there, in the terms of
    that diagonal, and the group of each column, -1 for none.
    """

    weight: Tensor
    gram: Tensor
    columns: Tensor
    ridge: float


def together(readings: Sequence[Reading], size: int) -> npt.NDArray[np.float64]:
    """What all readings lose, together, when a group goes and no other: (size,)."""
    return _losses([_Left(one, size) for one in readings], size).numpy()


def eliminated(readings: Sequence[Reading], size: int) -> npt.NDArray[np.float64]:
    """What all readings have lost, together, once a group and all before it are gone, (size,): rising in the order in
    which they go.
    """
    left = [_Left(one, size) for one in readings]
    scores = np.zeros(size)
    waiting = torch.arange(size)
    lost = 0.0
    while len(waiting):
        losses = _losses(left, size)
        order = waiting[losses[waiting].argsort(stable=True)]
        going = order[: max(1, int(len(waiting) * ROUND))]
        scores[going.numpy()] = lost + losses[going].cumsum(0).numpy()
        lost = float(scores[int(going[-1])])
        waiting = order[len(going) :].sort().values
        gone = torch.zeros(size, dtype=torch.bool)
        gone[going] = True
        for one in left:
            one.let_go(gone)
    return scores


def factored(gram: Tensor, ridge: float) -> Tensor:
    """Cholesky's factor of a Gram matrix, (columns, columns) and finite, with `ridge` on its diagonal; ten times as
    much while it has none: means far larger than what varies about them leave the rounding of float32 behind.
    """
    while True:
        loaded = gram.clone()
        loaded.diagonal().add_(ridge)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(loaded)
        if not int(failed):
            return factor
        ridge *= 10


def _losses(left: Sequence[_Left], size: int) -> Tensor:
    return sum((one.losses() for one in left), torch.zeros(size, dtype=torch.float64))


class _Left:
    """What is left of a reading: the columns that stay, the weights that they have by now, and the inverse of their
    Gram matrix; of a column that is `gone` all of it is zero, and its group none.
    """

    def __init__(self, reading: Reading, size: int) -> None:
        self.size = size
        self.weight, self.columns = reading.weight.clone(), reading.columns.clone()
        self.gone = torch.zeros(len(self.columns), dtype=torch.bool)
        if reading.gram.dim() == 1:
            self.inverse = 1 / (reading.gram + reading.ridge)
        else:
            self.inverse = torch.cholesky_inverse(factored(reading.gram, reading.ridge))

    def losses(self) -> Tensor:
        """Per group (size,), 0 without columns. With H the Gram matrix of what stays and S a group's columns, the least
        of tr(Δ H Δᵀ) over all Δ that take S to zero is tr(W_S ((H⁻¹)_SS)⁻¹ W_Sᵀ).
        """
        found = torch.zeros(self.size, dtype=torch.float64)
        if self.inverse.dim() == 1:
            mine = self.columns >= 0
            return found.index_add(0, self.columns[mine], (self.weight.square().sum(0) / self.inverse)[mine])
        order = self.columns.argsort(stable=True)
        owned = self.columns[order]
        counts = torch.bincount(owned[owned >= 0], minlength=self.size)
        ends = counts.cumsum(0) + int((owned < 0).sum())
        for count in sorted(set(counts.tolist()) - {0}):  # groups of as many columns at once
            which = (counts == count).nonzero().flatten()
            places = order[(ends[which] - count).unsqueeze(1) + torch.arange(count)]  # groups, columns of each
            if count == 1:
                places = places.flatten()
                found[which] = self.weight.square().sum(0)[places] / self.inverse.diagonal()[places]
                continue
            blocks = self.inverse[places.unsqueeze(2), places.unsqueeze(1)]
            taken = self.weight.mT[places]  # groups, columns, outputs
            found[which] = torch.linalg.solve(blocks, taken @ taken.mT).diagonal(dim1=1, dim2=2).sum(1)
        return found.clamp_min(0.0)

    def let_go(self, groups: Tensor) -> None:
        """Take the columns of `groups`, flags (size,), out; those that stay take over."""
        going = ((self.columns >= 0) & groups[self.columns.clamp_min(0)]).nonzero().flatten()
        if not len(going):
            return
        self.columns[going] = -1
        self.gone[going] = True
        if self.inverse.dim() == 2:
            across = self.inverse[going]
            share = torch.cholesky_solve(across, torch.linalg.cholesky(across[:, going]))
            self.weight.addmm_(self.weight[:, going], share, alpha=-1.0)
            self.inverse.addmm_(across.mT, share, alpha=-1.0)
            self.inverse[going] = 0.0  # but for rounding
            self.inverse[:, going] = 0.0
        self.weight[:, going] = 0.0
        if int(self.gone.sum()) > COMPACT * len(self.gone):
            self._compact()

    def _compact(self) -> None:
        """Leave out what is gone. Moving a large matrix takes as long as changing it, so that not each round does."""
        stay = (~self.gone).nonzero().flatten()
        self.weight, self.columns, self.gone = self.weight[:, stay], self.columns[stay], self.gone[stay]
        self.inverse = self.inverse[stay] if self.inverse.dim() == 1 else self.inverse[stay][:, stay]
