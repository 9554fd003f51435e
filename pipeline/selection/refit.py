"""Readers fitted anew to what they gave before some of their columns went: in closed form, from their Gram matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.channels.coupling.groups import Cluster
from pipeline.selection.activations import ReaderInput
from pipeline.selection.criteria import RIDGE, Scores
from pipeline.selection.elimination import factored


class Refits:
    """The readers of `cluster` fitted anew, whatever number of its groups went in the order of their `scores`.

    The columns K that stay take over from those, S, that go: W_K + W_S G_SK (G_KK + λ)⁻¹, ridge regression pulled to
    the weights that were there, G as `readers` hold it and λ as the criterion `reconstruction` takes it. With the
    columns in the order in which they go, the last ones first, what stays is always the beginning: one Cholesky factor
    of G + λ begins with that of every G_KK + λ, and serves all of them.
    Weights whose Gram matrix is not known, or that several operators read, stay as they are.
    """

    def __init__(
        self,
        cluster: Cluster,
        scores: Scores,
        state: Mapping[str, Tensor],
        readers: Mapping[str, tuple[ReaderInput, ...]],
    ) -> None:
        turn = np.empty(cluster.size, np.int64)
        turn[np.argsort(scores, kind="stable")] = np.arange(cluster.size)
        self._readers = [
            _Reader(name, read, columns, state) for name, read, columns in _known(cluster, turn, state, readers)
        ]

    def without(self, count: int) -> dict[str, Tensor]:
        """The readers' weights without the lowest `count` groups, and what takes the means that they lack."""
        made: dict[str, Tensor] = {}
        for reader in self._readers:
            made |= reader.without(count)
        return made


def flops(
    cluster: Cluster,
    counts: Sequence[int],
    state: Mapping[str, Tensor],
    readers: Mapping[str, tuple[ReaderInput, ...]],
) -> float:
    """Roughly, what `Refits` computes when so many groups of a cluster go, one after another."""
    total = 0.0
    for name, _, columns in _known(cluster, np.arange(cluster.size), state, readers):
        groups, size = columns.shape
        outputs = state[name].numel() / max(1, columns.numel())
        left = [size * (1 - count / cluster.size) for count in counts]
        total += groups * (size**3 / 3 + sum(outputs * (k * k + 2 * k * (size - k)) for k in left))
    return total


def _known(
    cluster: Cluster,
    turn: npt.NDArray[np.int64],
    state: Mapping[str, Tensor],
    readers: Mapping[str, tuple[ReaderInput, ...]],
) -> Iterator[tuple[str, ReaderInput, Tensor]]:
    """(weight, what it reads, the turn of each of its columns (groups, columns)) of the readers with a Gram matrix; a
    column that no group takes has the turn after all.
    """
    for name, dim in cluster.readers:
        seen = readers.get(name, ())
        if len(seen) != 1 or seen[0].gram is None:
            continue
        group = seen[0].columns(state[name].shape, dim, torch.from_numpy(cluster.labels[name, dim]))
        if group is not None:
            yield name, seen[0], torch.where(group >= 0, torch.from_numpy(turn)[group.clamp_min(0)], cluster.size)


class _Reader:
    """One weight: `turn` (groups, columns) says after how many groups each of its columns goes."""

    def __init__(self, name: str, read: ReaderInput, turn: Tensor, state: Mapping[str, Tensor]) -> None:
        self.name, self.read, self.turn, self.state = name, read, turn, state
        self.old = read.fold.to_matrix(state[name]).detach().double()
        self.order, self.factors = [], []
        for gram, when in zip(read.second(), turn, strict=True):
            # What never changes, such as a tap that meets padding only, can take nothing over.
            moving = (gram.diagonal() > 0).nonzero().flatten()
            order = moving[when[moving].argsort(descending=True, stable=True)]
            self.order.append(order)
            ridge = max(RIDGE * float(gram.diagonal().mean()), 1e-30)
            self.factors.append(factored(gram[order][:, order], ridge))

    def without(self, count: int) -> dict[str, Tensor]:
        """The weight, and its bias or the running mean behind it, without the columns whose turn has come."""
        name, read, state, old = self.name, self.read, self.state, self.old
        going = self.turn < count
        new = old.clone()
        for at, (order, factor) in enumerate(zip(self.order, self.factors, strict=True)):
            left = int((~going[at][order]).sum())
            if 0 < left < len(order):
                lost = old[at][:, order[left:]] @ factor[left:, :left]
                new[at][:, order[:left]] += torch.linalg.solve_triangular(
                    factor[:left, :left], lost, upper=False, left=False
                )
        made = {name: read.fold.from_matrix(new).to(state[name].dtype)}
        lacks = (((old - new.masked_fill(going.unsqueeze(1), 0.0)) @ read.mean.unsqueeze(2)).squeeze(2)).flatten()
        if read.bias:
            made[read.bias] = state[read.bias] + lacks.to(state[read.bias].dtype)
        elif read.running_mean:
            made[read.running_mean] = state[read.running_mean] - lacks.to(state[read.running_mean].dtype)
        return made
