"""How much a channel group matters, as a table: a criterion is one row. The groups with the lowest scores go.

A row says where it comes from, what it has to see besides the weights (`observe` gathers it), what that costs, and how
it is told in words. The recipe's `prune.criterion`, `leanort plan` and `leanort why` read this table; to add a
criterion is to add its row. docs/choice.md compares them.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from foundation.errors import ConfigError, nearest
from pipeline.channels.coupling.groups import Cluster
from pipeline.selection.activations import ReaderInput
from pipeline.selection.elimination import Reading, eliminated, together

Scores = npt.NDArray[np.float64]
"""One score per group of a cluster."""

Observation = Literal["samples", "activations", "grams", "gradients", "effects", "sampled effects"]
"""What a criterion or a scope may ask for besides the weights; `pipeline.selection.observe` gathers it."""

GONE = 1e-300
"""Below zero by so much is the score of a group whose weights are all zero; it weighs nothing in a mean."""
RIDGE = 0.01
"""Of the mean diagonal of a Gram matrix: how strongly a refit is pulled to the weights that were there."""


@dataclass(frozen=True)
class Evidence:
    """What criteria look at, all of it by the model's own names; what nobody asked for is empty or None.

    `weights`: the state dict as the masked model sees it. `scales`: the parameters among them that are scales of norms.
    `seed`: the recipe's. `gradients`: of the task's loss, mean over the calibration part, one per trained parameter.
    `effects`: cluster -> mean over samples of (Σ g·w over the group)². `readers`: weight -> what the contractions with
    it read. `samples`: of the calibration part, without labels; `others` of it are what readers were observed on.
    """

    weights: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    samples: tuple[Tensor, ...] | None = None
    scales: frozenset[str] = frozenset()
    seed: int = 0
    effects: Mapping[str, Scores] = field(default_factory=dict)
    readers: Mapping[str, tuple[ReaderInput, ...]] = field(default_factory=dict)
    others: tuple[Tensor, ...] | None = None
    _ranked: dict[tuple[str, str], tuple[Cluster, Ranked]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """What `rank` has answered: a choice is made again and again from what was seen once."""


@dataclass(frozen=True)
class Criterion:
    """One way to score groups.

    `words` name what goes: "the groups with ...". `score` gives an array of shape (cluster.size,), NaN for a group of
    which the criterion can tell nothing, for the reason `lacks`. `source`: where it was published; `cost`: in words.
    """

    words: str
    score: Callable[[Cluster, Evidence], Scores]
    source: str
    cost: str = "none"
    observes: frozenset[Observation] = frozenset()
    lacks: str = ""

    @property
    def labels(self) -> bool:
        """Whether the calibration samples need labels."""
        return not self.observes.isdisjoint({"gradients", "effects"})

    @property
    def sees(self) -> str:
        """What it looks at besides the weights: "nothing", "activations" or "gradients"."""
        if not self.observes:
            return "nothing"
        return "activations" if self.observes <= {"activations", "grams"} else "gradients"


@dataclass(frozen=True)
class Ranked:
    """Scores of a cluster's groups; `by` which criterion, and the `reason` where it is not the one asked for."""

    scores: Scores
    by: str
    reason: str = ""


def rank(name: str, cluster: Cluster, seen: Evidence) -> Ranked:
    """The scores of `cluster` by the criterion `name`, below zero for groups whose weights are all zero.

    Groups of one cluster are ranked by one criterion: where it can tell nothing of some of them (no norm scales them,
    say), the L2 norm ranks them all, and `reason` says so. Raises ConfigError for a name that is not in the table.
    """
    known = seen._ranked.get((name, cluster.name))
    if known is None or known[0] is not cluster:
        known = cluster, _rank(name, cluster, seen)
        seen._ranked[name, cluster.name] = known
    return known[1]


def _rank(name: str, cluster: Cluster, seen: Evidence) -> Ranked:
    row = find(name)
    scores = row.score(cluster, seen)
    # What is masked goes before what merely never fires, or pruning in rounds would bring some of it back.
    masked = over_groups(cluster, {name: seen.weights[name] != 0 for name, _ in cluster.labels}) == 0
    if np.isfinite(scores).all():
        return Ranked(np.where(masked, -GONE, scores), name)
    return Ranked(np.where(masked, -GONE, _l2(cluster, seen)), "l2", row.lacks)


def require_classes(name: str, classes: bool) -> None:
    """Raise ConfigError where the criterion `name` draws classes from the outputs, and the task has none."""
    if "sampled effects" in find(name).observes and not classes:
        raise ConfigError(
            f"prune.criterion {name!r} draws class labels from the model's own outputs, and this task has none.",
            "Take fisher or taylor, or one that needs no labels: reconstruction.",
        )


def require_labels(name: str, labelled: bool) -> None:
    """Raise ConfigError where the criterion `name` needs labels and the calibration samples have none."""
    if find(name).labels and not labelled:
        free = [other for other, row in CRITERIA.items() if not row.labels and row.sees != "nothing"]
        raise ConfigError(
            f"prune.criterion {name!r} needs the labels of the calibration samples, and this data has none.",
            f"Take one that needs none: {', '.join(free)}.",
        )


# ── sums over coupled groups ─────────────────────────────────────────────────────────────────────────────────────────


def over_groups(cluster: Cluster, values: Mapping[str, Tensor]) -> Scores:
    """Sum of `values` (per weight, named and shaped like the parameters) over everything that each group couples.

    The weights of a group are the rows that produce it (convolution or linear rows, biases, norm scale and shift) and
    the columns that read it, in every layer of the cluster. Tensors that `values` lacks count nothing.
    """
    sums = {(name, dim): per_index(values[name], dim) for name, dim in cluster.labels if name in values}
    return over_indices(cluster, sums)


def per_index(value: Tensor, dim: int) -> Scores:
    """Sum over all dimensions but `dim`, in float64."""
    others = [d for d in range(value.dim()) if d != dim]
    found = value.detach().sum(others, dtype=torch.float64) if others else value.detach().double()
    summed: Scores = found.numpy()
    return summed


def over_indices(cluster: Cluster, sums: Mapping[tuple[str, int], Scores]) -> Scores:
    """Sum over each group of what `sums` has for the indices of (parameter, dimension); others count nothing."""
    total = np.zeros(cluster.size)
    for place, labels in cluster.labels.items():
        if place in sums:
            mine = labels >= 0
            total += np.bincount(labels[mine], weights=sums[place][mine], minlength=cluster.size)
    return total


def squares(value: Tensor) -> Tensor:
    """|w|² of each weight."""
    return value.abs().square() if value.is_complex() else value.square()


def effects(gradient: Tensor, weight: Tensor) -> Tensor:
    """g·w of each weight: by how much the loss would rise, to first order, were the weight twice as large."""
    return (gradient.conj() * weight).real if weight.is_complex() else gradient * weight


def relative(scores: Scores) -> Scores:
    """Scores divided by their own mean, so that clusters of different size and scale can be ranked against each other.

    Without it, a layer with small fan-in would lose all its channels before a large one loses any.
    """
    mean = scores.mean() if scores.size else 0.0
    return scores / mean if mean > 0 else scores


# ── nothing but the weights ──────────────────────────────────────────────────────────────────────────────────────────


def _l1(cluster: Cluster, seen: Evidence) -> Scores:
    """Σ|w| over the coupled group."""
    return over_groups(cluster, {name: seen.weights[name].abs() for name, _ in cluster.labels})


def _l2(cluster: Cluster, seen: Evidence) -> Scores:
    """√Σw² over the coupled group."""
    return np.sqrt(over_groups(cluster, {name: squares(seen.weights[name]) for name, _ in cluster.labels}))


def _norm_scale(cluster: Cluster, seen: Evidence) -> Scores:
    """Σ|γ| over the scales of all norms in the group; NaN for groups that no norm scales."""
    scales = {name: seen.weights[name] for name, _ in cluster.labels if name in seen.scales}
    there = over_groups(cluster, {name: torch.ones_like(value) for name, value in scales.items()})
    found = over_groups(cluster, {name: value.abs() for name, value in scales.items()})
    return np.where(there > 0, found, np.nan)


def _random(cluster: Cluster, seen: Evidence) -> Scores:
    """A number in 0..1 that the seed and the cluster's name decide."""
    drawn: Scores = np.random.default_rng([seen.seed, zlib.crc32(cluster.name.encode())]).random(cluster.size)
    return drawn


# ── gradients ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _taylor(cluster: Cluster, seen: Evidence) -> Scores:
    """|Σ g·w| over the coupled group: by how much the loss would change to first order without it.

    With the weights in the place of the activations. A parameter that takes no part in the loss has no gradient, and
    counts nothing.
    """
    return np.abs(over_groups(cluster, _products(cluster, seen)))


def _taylor_elements(cluster: Cluster, seen: Evidence) -> Scores:
    """Σ (g·w)² over the coupled group: effects of single weights, which cannot cancel each other."""
    return over_groups(cluster, {name: value.double().square() for name, value in _products(cluster, seen).items()})


def _products(cluster: Cluster, seen: Evidence) -> dict[str, Tensor]:
    names = {name for name, _ in cluster.labels if name in seen.gradients}
    return {name: effects(seen.gradients[name], seen.weights[name]) for name in names}


def _fisher(cluster: Cluster, seen: Evidence) -> Scores:
    """Mean over samples of (Σ g·w over the coupled group)² / 2: to second order, with the Fisher information."""
    return seen.effects[cluster.name] / 2


# ── what readers see ─────────────────────────────────────────────────────────────────────────────────────────────────


def _reads(cluster: Cluster, seen: Evidence) -> Iterator[tuple[ReaderInput, Tensor, Tensor]]:
    """What each contraction sees that reads channels of the cluster, its weight's matrix, and its columns' groups."""
    for name, dim in cluster.readers:
        weight = seen.weights[name]
        labels = torch.from_numpy(cluster.labels[name, dim])
        for read in seen.readers.get(name, ()):
            columns = read.columns(weight.shape, dim, labels)
            if columns is not None:
                yield read, read.fold.to_matrix(weight).detach().double(), columns


def _over_columns(cluster: Cluster, seen: Evidence, worth: Callable[[ReaderInput, Tensor], Tensor]) -> Scores:
    """Sum over the group's columns, in all readers, of `worth` (groups, columns); NaN for a group that none reads."""
    total, count = np.zeros(cluster.size), np.zeros(cluster.size)
    for read, matrix, columns in _reads(cluster, seen):
        mine = columns >= 0
        values = worth(read, matrix)[mine].numpy()
        total += np.bincount(columns[mine].numpy(), weights=values, minlength=cluster.size)
        count += np.bincount(columns[mine].numpy(), minlength=cluster.size)
    return np.where(count > 0, total, np.nan)


def _wanda(cluster: Cluster, seen: Evidence) -> Scores:
    """Σ|w|·‖x‖ over the columns that read the group, ‖x‖ the root mean square of what the column reads."""
    return _over_columns(cluster, seen, lambda read, matrix: matrix.abs().sum(1) * read.square.sqrt())


def _flap(cluster: Cluster, seen: Evidence) -> Scores:
    """Σ var(x)·‖w‖² over the columns that read the group: what its mean, put into a bias, could not replace."""
    return _over_columns(cluster, seen, lambda read, matrix: matrix.square().sum(1) * read.variance)


def _reconstruction(cluster: Cluster, seen: Evidence) -> Scores:
    """What the readers lose when the group goes *after* the best refit of their other columns, as shares of what they
    give, summed: of each group as if it were the only one.
    """
    return _by_refit(cluster, seen, lambda readings: together(readings, cluster.size))


def _elimination(cluster: Cluster, seen: Evidence) -> Scores:
    """The same, of one group after another, each the one that is missed least beside those that are gone already."""
    return _by_refit(cluster, seen, lambda readings: eliminated(readings, cluster.size))


def _by_refit(cluster: Cluster, seen: Evidence, worth: Callable[[list[Reading]], Scores]) -> Scores:
    """`worth` of all that reads the cluster; NaN for a group that nothing reads. What readers give is 1 in all."""
    readings: list[Reading] = []
    count = np.zeros(cluster.size)
    for read, matrix, columns in _reads(cluster, seen):
        count += np.bincount(columns[columns >= 0].numpy(), minlength=cluster.size)
        second = read.second()
        moved = second if read.gram is None else second.diagonal(dim1=1, dim2=2)
        given = float((matrix.square().sum(1) * second if read.gram is None else matrix @ second * matrix).sum())
        for weight, gram, square, of in zip(matrix / math.sqrt(given or 1.0), second, moved, columns, strict=True):
            moving = square > 0  # what never changes loses nothing
            if bool(moving.any()):
                ridge = max(RIDGE * float(square.mean()), 1e-30)
                kept = gram[moving] if read.gram is None else gram[moving][:, moving]
                readings.append(Reading(weight[:, moving], kept, of[moving], ridge))
    return np.where(count > 0, worth(readings), np.nan)


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────

_UNREAD = "nothing that reads it is a contraction with a rule"
_FORWARD = "one forward pass over up to 512 samples"

CRITERIA: Mapping[str, Criterion] = {
    "l1": Criterion("the lowest L1 norms", _l1, "Li et al. 2017, arXiv:1608.08710"),
    "l2": Criterion("the lowest L2 norms", _l2, "Fang et al. 2023, arXiv:2301.12900"),
    "batch-norm": Criterion(
        "the smallest scales of norms", _norm_scale, "Liu et al. 2017, arXiv:1708.06519", lacks="no norm scales it"
    ),
    "taylor": Criterion(
        "the least effect on the loss, to first order",
        _taylor,
        "Molchanov et al. 2017, arXiv:1611.06440",
        "forward and backward over the calibration part",
        frozenset({"gradients"}),
    ),
    "taylor-elements": Criterion(
        "the least effects of single weights on the loss, squared",
        _taylor_elements,
        "Molchanov et al. 2019, arXiv:1906.10771",
        "forward and backward over the calibration part",
        frozenset({"gradients"}),
    ),
    "fisher": Criterion(
        "the least Fisher information",
        _fisher,
        "Theis et al. 2018, arXiv:1801.05787; Liu et al. 2021, arXiv:2108.00708",
        "forward and backward, one by one, for up to 256 samples",
        frozenset({"effects"}),
    ),
    "fisher-sampled": Criterion(
        "the least Fisher information, by labels drawn from the model itself",
        _fisher,
        "Theis et al. 2018, arXiv:1801.05787; Kunstner et al. 2019, arXiv:1905.12558",
        "forward and backward, one by one, for up to 256 samples",
        frozenset({"sampled effects"}),
    ),
    "wanda": Criterion(
        "the lowest norms weighted by activations",
        _wanda,
        "Sun et al. 2024, arXiv:2306.11695",
        _FORWARD,
        frozenset({"activations"}),
        _UNREAD,
    ),
    "flap": Criterion(
        "the least fluctuation, weighted",
        _flap,
        "An et al. 2024, arXiv:2312.11983",
        _FORWARD,
        frozenset({"activations"}),
        _UNREAD,
    ),
    "reconstruction": Criterion(
        "the least that their readers lose after a refit",
        _reconstruction,
        "Hassibi & Stork 1992, by columns as in Frantar & Alistarh 2022, arXiv:2208.11580",
        f"{_FORWARD}, and a matrix inverse for each reader",
        frozenset({"grams"}),
        _UNREAD,
    ),
    "elimination": Criterion(
        "the least that their readers lose after a refit, one after another",
        _elimination,
        "Hassibi & Stork 1992, one after another as in Kurtic et al. 2023, arXiv:2302.04089",
        f"{_FORWARD}, and a matrix inverse, taken apart again, for each reader",
        frozenset({"grams"}),
        _UNREAD,
    ),
    "random": Criterion("the lowest random numbers", _random, "a control: any other should be better"),
}


def find(name: str) -> Criterion:
    """The row called `name`. Raises ConfigError, naming the nearest one."""
    if name not in CRITERIA:
        hint = nearest(name, CRITERIA) or f"There are {', '.join(CRITERIA)}."
        raise ConfigError(f"prune.criterion: there is no criterion {name!r}.", hint)
    return CRITERIA[name]
