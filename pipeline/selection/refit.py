"""Readers fitted anew to what they gave before some of their columns went: in closed form, from their Gram matrices."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.channels.coupling.groups import Cluster
from pipeline.selection.activations import ReaderInput
from pipeline.selection.criteria import RIDGE


def refitted(
    cluster: Cluster,
    gone: npt.NDArray[np.bool_],
    state: Mapping[str, Tensor],
    readers: Mapping[str, tuple[ReaderInput, ...]],
) -> dict[str, Tensor]:
    """Weights of the readers of `cluster` without the groups that are `gone`, and what takes the means that they lack.

    The columns K that stay take over from those, S, that go: W_K + W_S G_SK (G_KK + λ)⁻¹, ridge regression pulled to
    the weights that were there, G as `readers` hold it and λ as the criterion `reconstruction` takes it. Weights whose
    Gram matrix is not known, or that several operators read, are absent: they stay as they are.
    """
    made: dict[str, Tensor] = {}
    for name, dim in cluster.readers:
        seen = readers.get(name, ())
        if len(seen) != 1 or seen[0].gram is None:
            continue
        read, weight = seen[0], state[name]
        columns = read.columns(weight.shape, dim, torch.from_numpy(cluster.labels[name, dim]))
        if columns is None:
            continue
        old = read.fold.to_matrix(weight).detach().double()
        going = (columns >= 0) & torch.from_numpy(gone)[columns.clamp_min(0)]
        new, second = old.clone(), read.second()
        for group, taken in enumerate(going):
            if bool(taken.any()) and not bool(taken.all()):
                new[group][:, ~taken] += _taken_over(old[group][:, taken], second[group], taken)
        made[name] = read.fold.from_matrix(new).to(weight.dtype)
        lacks = (((old - new.masked_fill(going.unsqueeze(1), 0.0)) @ read.mean.unsqueeze(2)).squeeze(2)).flatten()
        if read.bias:
            made[read.bias] = state[read.bias] + lacks.to(state[read.bias].dtype)
        elif read.running_mean:
            made[read.running_mean] = state[read.running_mean] - lacks.to(state[read.running_mean].dtype)
    return made


def _taken_over(lost: Tensor, gram: Tensor, taken: Tensor) -> Tensor:
    """What the columns that stay gain, (outputs, columns that stay), for the weights `lost` of those `taken`."""
    moving = gram.diagonal() > 0  # what never changes, such as a tap that meets padding only, can take nothing over
    stay = (~taken & moving).nonzero().flatten()
    gained = torch.zeros(len(lost), int((~taken).sum()), dtype=torch.float64)
    if len(stay):
        loaded = gram[stay][:, stay]
        loaded.diagonal().add_(RIDGE * gram.diagonal().mean().clamp_min(1e-30))
        found = torch.cholesky_solve(gram[stay][:, taken] @ lost.mT, torch.linalg.cholesky(loaded)).mT
        gained[:, moving[~taken]] = found
    return gained
