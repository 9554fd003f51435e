"""From operators' times at a few widths to their times at any: one small regression per kind of operator.

An operator's time is a sum of few terms that grow with its sizes (a constant, multiplications, elements read and
written), none of them negative (Lawson and Hanson's NNLS). Operators that do the same work on other widths share
the terms; what one of them costs more or less than its kind, by its place in the caches, is a factor of its own. Which
operator of one model is which of another, and which widths have it at all, is found in `matching`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import nnls

from pipeline.latency.matching import (
    BranchClusters,
    Operator,
    Seen,
    Where,
    WithBranch,
    joined,
    likeliest,
    matched,
    nearest,
    where,
)
from pipeline.latency.prediction import Fit, Key, Placed, Sides, grown
from pipeline.latency.sizes import Numbers, Sizes, Slot, slot
from pipeline.latency.work import has_weights, work

LEFT = 0.2
"""Of an operator's time, at least, is its own and not that of writing it down."""
HUBER = 1.345
"""Standard deviations from where an error counts by its size, not by its square (Huber's 95 % efficiency)."""
LEAST = 0.01
"""Of a model's time: what counts as an error like any other, however well the rest is met."""
ROUNDS = 8
"""Of weighing the models anew."""
OWN = 3.0
"""Of how many measurements' worth a kind's terms outweigh what one operator showed."""
PULL = 0.03
"""How much a factor on costs that is not 1 weighs, beside the same relative error of one whole model. Left-out models
of a ResNet-50 at 32x32 were 8 % off with 0.1 and 6 % with 0.03; with 0.3 a BERT with cut streams kept an error of 5 %,
with less of 2 %; elsewhere they are alike.
"""

KNEES = (0.035, 0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4, 0.56, 0.8)
"""Of the dense model's time: where models begin that do not fit into the caches. A ResNet-50 at 32x32, whose dense
weights are three times as large as these, takes half of what its operators say where they fit: models left out were
12 % off without any and 5 % with a knee of 0.2, and one that took 0.147 of dense 0.161 and 0.147 by them.
"""
FEWEST = 3
"""Models on either side of a knee. Of a BERT with one alone below it, three unseen ones were told a third too fast."""

_Pairs = list[tuple[float, float]]
"""(predicted, measured) times of models that were left out of the fit."""
_Follows = Callable[[tuple[int, ...], tuple[int, ...]], Slot]
"""(a size as each model has it, numbers of these models) -> what it follows."""


@dataclass(frozen=True)
class Sample:
    """One measured model: groups kept of each cluster, its time of the dense model's, and its operators."""

    kept: Mapping[str, int]
    ratio: float
    operators: tuple[Operator, ...]


def _levelled(samples: Sequence[Sample]) -> list[Sample]:
    """Samples whose operators add up to what the whole model took when nothing was written down beside.

    Writing down costs about the same for every operator; where a model takes longer than its operators, that is the
    runtime's own work. The rest of the difference is what the machine did meanwhile.
    """
    sums = np.array([sum(o.share for o in one.operators) for one in samples])
    counts = np.array([max(1, len(one.operators)) for one in samples])
    ratios = np.array([one.ratio for one in samples])
    around = float(np.median(ratios - sums))
    each = max(0.0, float(np.median((sums - ratios) / counts)))
    made = []
    for one in samples:
        shares = np.array([max(o.share - each, o.share * LEFT) for o in one.operators])
        own = max(one.ratio - max(0.0, around), one.ratio * LEFT)
        scale = own / max(float(shares.sum()), 1e-12)
        operators = [replace(o, share=float(s) * scale) for o, s in zip(one.operators, shares, strict=True)]
        made.append(replace(one, operators=tuple(operators)))
    return made


@dataclass(frozen=True)
class _Samples:
    """All measured models: groups `kept` (models, clusters) and `ratios` (models,) of dense, what the `sizes` of their
    operators are made of and what a size `follows`, which operators are the `same`, and which models are `bare`, that
    is without one of `branches`.
    """

    kept: Numbers
    ratios: Numbers
    sizes: Sizes
    follows: _Follows
    same: Sequence[Seen]
    bare: frozenset[int]
    branches: Sequence[BranchClusters]

    def usual(self, numbers: Iterable[int]) -> list[int]:
        """Those of `numbers` that have all branches."""
        return [number for number in numbers if number not in self.bare]

    def stays(self, column: int) -> bool:
        """Whether an operator is in a model without branches."""
        return any(number in self.bare for number, _ in self.same[column])

    def without(self, left_out: Collection[int]) -> list[int]:
        """The numbers of all models but those `left_out`."""
        return [number for number in range(len(self.kept)) if number not in left_out]


def fit(samples: Sequence[Sample], sizes: Sizes, blocks: Sequence[int], branches: Sequence[Sequence[str]] = ()) -> Fit:
    """The fit of all samples, by the block of `blocks` and the knee that predict left-out ones best; and how well they
    do. `branches`: the clusters inside each residual branch that some sample is without.
    """
    measured = _measured(samples, sizes, branches)
    tried: list[tuple[float, Fit, _Pairs]] = []
    for block in blocks:
        made = _fit(measured, measured.without(()), block)
        total = made.total(measured.kept)
        for knee, pairs in _left_out(measured, block, (None, math.inf, *_told_knees(total))).items():
            logs = np.log([p / max(r, 1e-9) for p, r in pairs])
            deviation = float(np.mean(np.abs(logs))) * (np.pi / 2) ** 0.5  # a few outliers do not decide
            tried.append((deviation, _corrected(made, total, measured.ratios, knee), pairs))
    error, best, checked = min(tried, key=lambda one: one[0])
    return replace(best, error=error, checked=tuple(checked))


def _left_out(measured: _Samples, block: int, knees: Iterable[float | None]) -> dict[float | None, _Pairs]:
    """What a fit of the others says of each sample by each of `knees`, and what it took."""
    pairs: dict[float | None, _Pairs] = {knee: [] for knee in knees}
    usual = measured.usual(range(len(measured.kept)))
    parts = min(len(usual), 6)
    for part in range(parts):
        left_out = usual[part::parts]
        others = measured.without(left_out)
        made = _fit(measured, others, block)
        seen, unseen = made.total(measured.kept[others]), made.total(measured.kept[left_out])
        for knee, found in pairs.items():
            predicted = _corrected(made, seen, measured.ratios[others], knee).scaled(unseen)
            found.extend(zip(predicted.tolist(), measured.ratios[left_out].tolist(), strict=True))
    return pairs


def _measured(samples: Sequence[Sample], sizes: Sizes, branches: Sequence[Sequence[str]]) -> _Samples:
    """What is known of the samples, those without one of `branches` last."""
    inside = [branch for branch in (_inside(names, sizes) for names in branches) if branch is not None]
    samples = sorted(_levelled(samples), key=lambda one: _is_bare(sizes.kept(one.kept), inside))
    kept = np.array([sizes.kept(one.kept) for one in samples])
    bare = frozenset(number for number, row in enumerate(kept) if _is_bare(row, inside))
    follows = _following(sizes.at(kept))
    same = _same([one.operators for one in samples], len(samples) - len(bare), sizes, follows, inside)
    return _Samples(kept, np.array([one.ratio for one in samples]), sizes, follows, same, bare, inside)


def _inside(names: Sequence[str], sizes: Sizes) -> BranchClusters | None:
    """The clusters of a branch, and a dimension that is zero where all of it is gone; None where there is none."""
    clusters = [sizes.clusters.index(name) for name in names if name in sizes.clusters]
    others = np.delete(sizes.each, clusters, axis=1).any(axis=1)
    gone = np.flatnonzero(~others & (sizes.base == sizes.each[:, clusters] @ sizes.whole[clusters]))
    return BranchClusters(frozenset(clusters), int(gone[0])) if gone.size else None


def _clusters(branches: Sequence[BranchClusters]) -> frozenset[int]:
    """The clusters inside any of `branches`."""
    return frozenset().union(*(one.clusters for one in branches))


def _is_bare(kept: Numbers, branches: Sequence[BranchClusters]) -> bool:
    """Whether a model that keeps so many groups, (clusters,), is without any of `branches`."""
    return any((kept[list(one.clusters)] == 0).all() for one in branches)


def _following(dimensions: Numbers) -> _Follows:
    """`slot` for programs of these `dimensions` (models, sizes), asked once for what many operators share."""
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], Slot] = {}

    def follows(seen: tuple[int, ...], having: tuple[int, ...]) -> Slot:
        key = seen, having
        if key not in known:
            known[key] = slot(seen, dimensions[list(having)])
        return known[key]

    return follows


def _same(
    models: Sequence[Sequence[Operator]],
    usual: int,
    sizes: Sizes,
    follows: _Follows,
    branches: Sequence[BranchClusters],
) -> list[Seen]:
    """Which operators of all models are one; those after the first `usual` are without branches, and so without any
    operator whose sizes follow a cluster inside one.
    """
    columns = matched(models[:usual])
    if len(models) == usual:
        return columns
    inside = _clusters(branches)
    for number in range(usual, len(models)):
        stays = [not _followed(_sides(seen, follows), sizes) & inside for seen in columns]
        columns = joined(columns, number, models[number], stays)
    return columns


def _fit(measured: _Samples, numbers: Sequence[int], block: int) -> Fit:
    """The fit of the samples of these `numbers`."""
    told = set(numbers)
    same = [[(number, o) for number, o in seen if number in told] for seen in measured.same]
    rows: dict[Key, list[tuple[list[Any], float]]] = {}
    for column, seen in enumerate(same):
        for _, operator in seen:
            key, values = _told(operator, column, block)
            rows.setdefault(key, []).append((values, operator.share))
    terms = {key: _terms(found) for key, found in rows.items()}
    placed = _placed(measured, same, numbers, terms, block)
    return Fit(measured.sizes, placed, terms, block, (0.0, 1.0, 1.0, 0.0))


def _corrected(made: Fit, total: Numbers, ratios: Numbers, knee: float | None) -> Fit:
    """The fit, with this `knee`, by which models whose operators take `total` together, (models, 2), take the `ratios`
    that they took as a whole.
    """
    fixed, constant, growing, more = _steady(grown(total, knee) / ratios[:, None]).tolist()
    return replace(made, scale=(fixed, constant, growing, more), knee=knee)


def _told_knees(total: Numbers) -> list[float]:
    """Of `KNEES` those that models whose operators take `total` together, (models, 2), can tell: enough on both sides
    of where half of the step is behind.
    """
    both = total.sum(axis=1)
    below = {knee: int((both < 1.5 * knee).sum()) for knee in KNEES}
    return [knee for knee, count in below.items() if FEWEST <= count <= len(both) - FEWEST]


def _steady(rows: Numbers) -> Numbers:
    """Non-negative factors by which each of `rows` (models, 4), as from `grown`, comes to 1; those on the two kinds of
    costs are pulled towards 1. What a model is off by more than others are counts less (Huber 1964, by weights that are
    found anew): a session that happened to lie well or badly in memory would bend the whole table.
    """
    weights = np.ones(len(rows))
    pulls = np.diag([0.0, PULL, PULL, 0.0])
    for _ in range(ROUNDS):
        found, _ = nnls(np.vstack([rows * weights[:, None], pulls]), np.r_[weights, pulls.sum(axis=1)])
        off = np.abs(rows @ found - 1)
        usual = HUBER * max(float(np.median(off)) / 0.6745, LEAST)  # 0.6745: of a standard deviation, the median error
        weights = np.sqrt(np.minimum(1, usual / np.maximum(off, 1e-12)))
    return np.asarray(found)


def _placed(
    measured: _Samples, same: Sequence[Seen], numbers: Sequence[int], terms: Mapping[Key, Numbers], block: int
) -> tuple[Placed, ...]:
    """The operators, as the samples of these `numbers` have them (`same`), whose presence there can be told from the
    widths.
    """
    full = measured.kept == measured.sizes.whole
    usual, bare, branches = measured.usual(numbers), sorted(measured.bare), measured.branches
    made: dict[tuple[str, Sides, Sides, Where, WithBranch, int | None], float] = {}
    rules: dict[tuple[int, ...], tuple[Where, ...]] = {}
    having_all = [[one for one in seen if one[0] not in measured.bare] for seen in same]
    sides = [_sides(found or seen, measured.follows) for found, seen in zip(having_all, same, strict=True)]
    followed = [_followed(one, measured.sizes) for one in sides]
    inside = _clusters(branches)
    for column, seen in enumerate(same):
        if not seen:
            continue
        having = tuple(number for number, _ in having_all[column])
        rule, branch = Where(), WithBranch()
        if having:
            if having not in rules:
                rules[having] = where(np.isin(usual, having), full[usual])
            if not rules[having]:
                continue
            rule = likeliest(rules[having], column, followed)
            expected = bool(bare) and bool(rule.at(full[bare]).any())
            gone = expected and not measured.stays(column) and not followed[column] & inside
            if gone and not has_weights(seen[0][1].kind):
                branch = WithBranch(nearest(column, followed, branches))
        elif has_weights(seen[0][1].kind):
            continue  # a layer that was not found again
        else:  # what stands only where branches are gone
            branch = WithBranch(nearest(column, followed, branches), present=False)
            sides[column] = _as_beside(sides, column, measured.sizes.at(measured.kept[seen[0][0]][None]))
        told = [_told(o, column, block) for _, o in seen]
        predicted = np.array([float(np.dot(terms[key], values)) for key, values in told])
        shares = np.array([o.share for _, o in seen])
        pull = OWN * float(np.mean(predicted**2)) + 1e-18
        factor = (float(predicted @ shares) + pull) / (float(predicted @ predicted) + pull)
        alike = seen[0][1].kind, *sides[column], rule, branch, told[0][0][1]
        made[alike] = made.get(alike, 0.0) + factor
    return tuple(Placed(*alike, factor) for alike, factor in made.items())


def _sides(seen: Seen, follows: _Follows) -> tuple[Sides, Sides]:
    """What each dimension of an operator's inputs and outputs `follows`, given its sizes in the models that have it."""
    having = tuple(number for number, _ in seen)

    def told(side: str) -> Sides:
        shapes = [getattr(one, side) for _, one in seen]
        return tuple(
            tuple(follows(tuple(shape[i][d] for shape in shapes), having) for d in range(len(one)))
            for i, one in enumerate(shapes[0] if shapes else ())
        )

    return told("inputs"), told("outputs")


def _as_beside(sides: Sequence[tuple[Sides, Sides]], at: int, dimensions: Numbers) -> tuple[Sides, Sides]:
    """Sizes of operator number `at` that one model alone has, whose program has `dimensions` (1, sizes): each follows
    what the same dimension of a tensor nearest to it does, where that has the same size there.
    """
    known: dict[tuple[int, int, float], Slot] = {}
    for number in sorted(range(len(sides)), key=lambda n: abs(n - at)):
        for shape in (shape for side in sides[number] for shape in side):
            for place, one in enumerate(shape):
                if one.of is not None:
                    known.setdefault((len(shape), place, float(one.at(dimensions)[0])), one)

    def beside(side: Sides) -> Sides:
        return tuple(
            tuple(known.get((len(shape), place, one.factor), one) for place, one in enumerate(shape)) for shape in side
        )

    inputs, outputs = sides[at]
    return beside(inputs), beside(outputs)


def _followed(sides: tuple[Sides, Sides], sizes: Sizes) -> frozenset[int]:
    """The clusters that any of an operator's sizes follows."""
    dimensions = {s.of for side in sides for shape in side for s in shape if s.of is not None}
    return frozenset(int(c) for d in dimensions for c in np.flatnonzero(sizes.each[d]))


def _told(operator: Operator, column: int, block: int) -> tuple[Key, list[Any]]:
    """Which costs an operator's time is made of, and how much of each."""
    found = work(operator.kind, operator.inputs, operator.outputs, block)
    return (found.key, None if found.shared else column), found.terms


def _terms(rows: Sequence[tuple[list[Any], float]]) -> Numbers:
    """Non-negative costs of the terms, by least squares between absolute and relative error. What was seen at one size
    alone is taken to grow with it.
    """
    values = np.array([[float(v) for v in row] for row, _ in rows])
    if (values == values[0]).all() and values[0, 1:].any():
        values[:, 0] = 0.0
    shares = np.array([share for _, share in rows])
    weight = 1 / np.sqrt(np.maximum(shares, 1e-12) * max(float(shares.mean()), 1e-12))
    size = np.maximum(np.abs(values).max(axis=0), 1e-12)
    found, _ = nnls(values / size * weight[:, None], shares * weight)
    return np.asarray(found / size)
