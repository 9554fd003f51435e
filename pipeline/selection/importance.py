"""How much a channel group matters: the norm of every weight that the group ties, in all the layers that it touches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pipeline.channels.coupling.groups import Cluster

Scores = npt.NDArray[np.float64]


def group_norms(cluster: Cluster, state: Mapping[str, Tensor], norm: Literal["l1", "l2"]) -> Scores:
    """Norm of each group over everything that it couples: shape (cluster.size,), one score per group.

    The weights of a group are the rows that produce it (convolution or linear rows, biases, norm scale and shift) and
    the columns that read it, in every layer of the cluster. L1 is Σ|w|, L2 is √Σw² over all of them (Li et al. 2017,
    "Pruning Filters for Efficient ConvNets", applied to the coupled group as in Fang et al. 2023, "DepGraph").
    """
    total = np.zeros(cluster.size)
    for (name, dim), labels in cluster.labels.items():
        weight = state[name].detach()
        powers = weight.abs() if norm == "l1" else weight.square()
        per_index = (
            powers.double().movedim(dim, 0).flatten(1).sum(1).numpy() if weight.dim() > 1 else powers.double().numpy()
        )
        mine = labels >= 0
        total += np.bincount(labels[mine], weights=per_index[mine], minlength=cluster.size)
    return total if norm == "l1" else np.sqrt(total)


def relative(scores: Scores) -> Scores:
    """Scores divided by their own mean, so that clusters of different size and scale can be ranked against each other.

    Without it, a layer with small fan-in would lose all its channels before a large one loses any.
    """
    mean = scores.mean() if scores.size else 0.0
    return scores / mean if mean > 0 else scores
