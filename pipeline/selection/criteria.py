"""How much a channel group matters, as a table: a criterion is one row. The groups with the lowest scores go.

A row says what it has to see besides the weights (`observe` gathers it), and how it is told in words. The recipe's
`prune.criterion`, `leanort plan` and `leanort why` read this table; to add a criterion is to add its row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from foundation.errors import ConfigError, nearest
from pipeline.channels.coupling.groups import Cluster

Scores = npt.NDArray[np.float64]
"""One score per group of a cluster."""

Observation = Literal["gradients", "samples"]
"""What a criterion or a scope may ask for besides the weights; `pipeline.selection.observe` gathers it."""


@dataclass(frozen=True)
class Evidence:
    """What criteria look at, all of it by the model's own names.

    `weights`: the state dict as the masked model sees it. `gradients`: of the task's loss, mean over the calibration
    part, one per trained parameter; empty where no criterion asked for them. `samples`: of the calibration part,
    without labels; None where nothing asked for them.
    """

    weights: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    samples: Tensor | None = None


@dataclass(frozen=True)
class Criterion:
    """One way to score groups: `score` gives an array of shape (cluster.size,); `words` name what goes."""

    words: str
    score: Callable[[Cluster, Evidence], Scores]
    observes: frozenset[Observation] = frozenset()


def over_groups(cluster: Cluster, values: Mapping[str, Tensor]) -> Scores:
    """Sum of `values` (per weight, named and shaped like the parameters) over everything that each group couples.

    The weights of a group are the rows that produce it (convolution or linear rows, biases, norm scale and shift) and
    the columns that read it, in every layer of the cluster. Tensors that `values` lacks count nothing.
    """
    total = np.zeros(cluster.size)
    for (name, dim), labels in cluster.labels.items():
        if name not in values:
            continue
        value = values[name].detach().double()
        per_index = value.movedim(dim, 0).flatten(1).sum(1).numpy() if value.dim() > 1 else value.numpy()
        mine = labels >= 0
        total += np.bincount(labels[mine], weights=per_index[mine], minlength=cluster.size)
    return total


def relative(scores: Scores) -> Scores:
    """Scores divided by their own mean, so that clusters of different size and scale can be ranked against each other.

    Without it, a layer with small fan-in would lose all its channels before a large one loses any.
    """
    mean = scores.mean() if scores.size else 0.0
    return scores / mean if mean > 0 else scores


def _l1(cluster: Cluster, seen: Evidence) -> Scores:
    """Σ|w| (Li et al. 2017, "Pruning Filters for Efficient ConvNets"), over the coupled group."""
    return over_groups(cluster, {name: seen.weights[name].abs() for name, _ in cluster.labels})


def _l2(cluster: Cluster, seen: Evidence) -> Scores:
    """√Σw² over the coupled group (Fang et al. 2023, "DepGraph")."""
    return np.sqrt(over_groups(cluster, {name: seen.weights[name].square() for name, _ in cluster.labels}))


def _taylor(cluster: Cluster, seen: Evidence) -> Scores:
    """|Σ g·w| over the coupled group: by how much the loss would change to first order without it.

    Molchanov et al. 2017, arXiv:1611.06440, with the weights in the place of the activations as in Molchanov et al.
    2019, arXiv:1906.10771. A parameter that takes no part in the loss has no gradient, and counts nothing.
    """
    products = {name: seen.gradients[name] * seen.weights[name] for name, _ in cluster.labels if name in seen.gradients}
    return np.abs(over_groups(cluster, products))


CRITERIA: Mapping[str, Criterion] = {
    "l1": Criterion("the lowest L1 norms", _l1),
    "l2": Criterion("the lowest L2 norms", _l2),
    "taylor": Criterion("the least effect on the loss, to first order", _taylor, frozenset({"gradients"})),
}


def find(name: str) -> Criterion:
    """The row called `name`. Raises ConfigError, naming the nearest one."""
    if name not in CRITERIA:
        hint = nearest(name, CRITERIA) or f"There are {', '.join(CRITERIA)}."
        raise ConfigError(f"prune.criterion: there is no criterion {name!r}.", hint)
    return CRITERIA[name]
