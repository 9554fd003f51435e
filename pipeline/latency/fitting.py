"""From operators' times at a few widths to their times at any: one small regression per kind of operator.

An operator's time is a sum of few terms that grow with its sizes (a constant, multiplications, elements read and
written), none of them negative (Lawson and Hanson's NNLS). Operators that do the same work on other widths share
the terms; what one of them costs more or less than its kind, by its place in the caches, is a factor of its own. Which
operator of one model is which of another, and which widths have it at all, is found in `matching`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import nnls

from pipeline.latency.matching import (
    Beside,
    Flags,
    Inside,
    Operator,
    Seen,
    Where,
    joined,
    likeliest,
    matched,
    nearest,
    where,
)
from pipeline.latency.sizes import Numbers, Sizes, Slot, slot

Shapes = Sequence[Sequence[Any]]
"""Of an operator's tensors: each dimension a number, or an array of one number per model."""

PRODUCTS = (
    "MatMul",
    "Gemm",
    "MatMulInteger",
    "QGemm",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "QLinearMatMul",
)
RECURRENT = ("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM")
LEFT = 0.2
"""Of an operator's time, at least, is its own and not that of writing it down."""
BENDING = 1.5
"""Power of the term by which a whole model takes longer than its operators say. Of a ResNet-50 at 32x32, models left
out were 6 % off without it and 3 % with it, 3.7 % with a power of 2; of a MobileNetV2 and a DeiT-tiny 5 and 7 % always.
"""
HUBER = 1.345
"""Standard deviations from where an error counts by its size, not by its square (Huber's 95 % efficiency)."""
LEAST = 0.01
"""Of a model's time: what counts as an error like any other, however well the rest is met."""
ROUNDS = 8
"""Of weighing the models anew."""
OWN = 3.0
"""Of how many measurements' worth a kind's terms outweigh what one operator showed."""
PULL = 0.1
"""How much a factor on costs that is not 1 weighs, beside the same relative error of one whole model. With 0.3 a BERT
with cut streams kept an error of 5 %, with 0.1 and 0.03 of 2 %; elsewhere they are alike.
"""


class Work(NamedTuple):
    """What kind of work an operator does, and the terms that its time is a sum of, the first of them a constant."""

    key: Hashable
    terms: list[Any]
    shared: bool = True
    """Whether two operators of one key cost alike; not where shapes do not say what decides it, such as the kernel of
    a convolution whose weight the runtime has packed away.
    """


def work(kind: str, inputs: Shapes, outputs: Shapes, block: int) -> Work:
    """What an operator does, told by its kind and its shapes.

    `block`: channels that the kernels take together; widths count as rounded up to that.
    """
    out = outputs[0] if outputs else ()
    first = inputs[0] if inputs else ()
    if min(len(first), len(out)) > 2 and _channels_last(kind, inputs, out):
        first, out = ((shape[0], shape[-1], *shape[1:-1]) for shape in (first, out))
    if "Conv" in kind and min(len(first), len(out)) > 2:
        return _convolution(kind, inputs, first, out, block)
    if kind.removeprefix("Fused") in PRODUCTS and len(first):
        products = _elements(out) * first[-1]
        rows = out[-2] if len(out) > 1 and np.ndim(out[-2]) == 0 else 0
        return Work((kind, len(first), rows), [1.0, products, _elements(first), _elements(out)])
    if kind in RECURRENT and len(out):
        hidden = out[-1]
        return Work((kind, *_fixed(first[:2])), [1.0, hidden * (first[-1] + hidden), hidden])
    read = sum((_elements(one) for one in inputs), 0.0)
    written = sum((_elements(one) for one in outputs), 0.0)
    if "Pool" in kind and len(first) > 2:
        return Work((kind, *_fixed(first[2:]), *_fixed(out[2:])), [1.0, read, written, _odd(first, block) * read])
    return Work((kind, len(inputs), len(out)), [1.0, read, written])


def _has_weights(kind: str) -> bool:
    """Whether an operator of a kind is a layer: one goes with a branch only where its own width does."""
    return "Conv" in kind or kind.removeprefix("Fused") in PRODUCTS or kind in RECURRENT


def _channels_last(kind: str, inputs: Shapes, out: Sequence[Any]) -> bool:
    """Whether a convolution or a pool has its channels behind its positions, as onnxruntime's of 8-bit integers have:
    a convolution has as many scales and biases, and a pool leaves as many.
    """
    if kind.startswith("Nhwc"):
        return True
    if kind == "QLinearConv":
        return any(len(one) == 1 and np.array_equal(one[0], out[-1]) for one in inputs)
    if kind.startswith("QLinear") and "Pool" in kind:
        return np.array_equal(inputs[0][-1], out[-1])
    return False


def _convolution(kind: str, inputs: Shapes, first: Sequence[Any], out: Sequence[Any], block: int) -> Work:
    """`first`, `out`: shapes read and written, the channels in second place."""
    weight = next((one for one in inputs[1:] if len(one) == len(first)), None)
    whole_in, whole_out = _up(first[1], block), _up(out[1], block)
    key = (kind, *_fixed(first[2:]), *_fixed(out[2:]), sum(len(one) == len(first) for one in inputs))
    if weight is None:
        return Work(key, [1.0, whole_out * whole_in, out[1] * np.asarray(first[1]), whole_in, whole_out], shared=False)
    per_group = weight[1]
    key = (*key, *_fixed(weight[2:]))
    if _always(per_group, 1) and not _always(first[1], 1):
        return Work(("depthwise", *key), [1.0, whole_out, _odd(out, block) * out[1]])
    both = whole_out * (_up(per_group, block) if np.array_equal(per_group, first[1]) else per_group)
    odd = _odd(first, block)
    plain = out[1] * np.asarray(per_group)
    return Work(key, [1.0, both, plain, whole_in, whole_out, odd * plain, odd * out[1]])


def _elements(shape: Sequence[Any]) -> Any:
    total: Any = 1.0
    for size in shape:
        total = total * size
    return total


def _up(size: Any, block: int) -> Any:
    return np.ceil(np.asarray(size) / block) * block


def _odd(shape: Sequence[Any], block: int) -> Any:
    """Whether channels are off the block: such a tensor is not read in blocks, which is several times as fast."""
    return np.asarray(shape[1]) % block != 0


def _always(size: Any, value: int) -> bool:
    return bool(np.all(np.asarray(size) == value))


def _fixed(shape: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(size for size in shape if np.ndim(size) == 0)


@dataclass(frozen=True)
class Sample:
    """One measured model: groups kept of each cluster, its time of the dense model's, and its operators."""

    kept: Mapping[str, int]
    ratio: float
    operators: tuple[Operator, ...]


_Key = tuple[Hashable, int | None]
"""Of costs: the kind of work, and the number of the operator where others of its kind do not share them."""
_Sides = tuple[tuple[Slot, ...], ...]
"""Of an operator's tensors on one side: what each dimension follows."""


@dataclass(frozen=True)
class _Placed:
    """Operators that are alike in what their sizes follow, and in `where` they are: their own factors on what their
    kind costs, added up.
    """

    kind: str
    inputs: _Sides
    outputs: _Sides
    where: Where
    beside: Beside
    column: int | None
    """Number of the operator, where its costs are its own."""
    factor: float

    @cached_property
    def follows(self) -> list[int]:
        """The program's dimensions that their sizes, or their being there, follow."""
        sizes = {s.of for side in (self.inputs, self.outputs) for shape in side for s in shape if s.of is not None}
        return sorted(sizes | ({self.beside.of} if self.beside.of is not None else set()))

    def at(self, dimensions: Numbers, whole: Flags, terms: Mapping[_Key, Numbers], block: int) -> Numbers:
        """What it takes at each choice, of which these are the program's `dimensions` (choices, dimensions) and the
        clusters that are `whole` (choices, clusters). A file has nothing of a branch that goes as a whole, whose sizes
        are zero: it does not even cost its constant.
        """
        sides = self.inputs, self.outputs
        inputs, outputs = ([[s.at(dimensions) for s in shape] for shape in side] for side in sides)
        found = work(self.kind, inputs, outputs, block)
        cost = terms.get((found.key, self.column))
        if cost is None:
            return np.zeros(len(dimensions))
        took = self.factor * sum(c * v for c, v in zip(cost, found.terms, strict=True))
        there = (dimensions[:, [d for d in self.follows if d != self.beside.of]] > 0).all(axis=1)
        made: Numbers = (there & self.where.at(whole) & self.beside.at(dimensions)) * took
        return made


@dataclass(frozen=True)
class Fit:
    """Predicts a model's time of the dense model's. `error`: of the log of a ratio, a standard deviation, from the mean
    error of models left out of the fit one after another, which `checked` lists as (predicted, measured).
    """

    sizes: Sizes
    placed: tuple[_Placed, ...]
    terms: Mapping[_Key, Numbers]
    block: int
    scale: tuple[float, float, float]
    error: float = 0.0
    checked: tuple[tuple[float, float], ...] = field(default=(), repr=False)

    def ratio(self, kept: Numbers) -> Numbers:
        """(choices, clusters) groups kept -> (choices,) time of the dense model's."""
        return self._scaled(self._total(kept))

    def of(self, kept: Numbers) -> float:
        """(clusters,) groups kept -> time of the dense model's: `ratio` of one choice. An operator that is asked again
        for the sizes that it had is not worked out again: a choice is mostly one of many that differ in a layer.
        """
        return float(self._scaled(self._each(kept).sum(keepdims=True))[0])

    def along(self, kept: Numbers, counts: Sequence[tuple[int, Sequence[int]]]) -> list[Numbers]:
        """(clusters,) groups kept -> for each (number of a cluster, counts of groups) the time of the dense model's
        when that cluster keeps so many, and all else is as in `kept`: `ratio` of these, for which an operator is worked
        out for the clusters alone that it follows.
        """
        of = np.repeat([number for number, _ in counts], [len(each) for _, each in counts]).astype(int)
        values = np.array([n for _, each in counts for n in each], float)
        dimensions = self.sizes.at(kept[None]) + (values - kept[of])[:, None] * self.sizes.each.T[of]
        whole = np.repeat((kept == self.sizes.whole)[None], len(of), axis=0)
        whole[np.arange(len(of)), of] = values == self.sizes.whole[of]
        here = self._each(kept)
        total = np.full(len(of), here.sum())
        for one, clusters, now in zip(self.placed, self._clusters, here, strict=True):
            at = np.flatnonzero(clusters[of])
            if at.size:
                total[at] += one.at(dimensions[at], whole[at], self.terms, self.block) - now
        return np.split(self._scaled(total), np.cumsum([len(each) for _, each in counts]))[: len(counts)]

    def _scaled(self, total: Numbers) -> Numbers:
        """(choices,) what the operators take together -> time of the dense model's."""
        made: Numbers = _grown(total) @ np.array(self.scale)
        return made

    def _total(self, kept: Numbers) -> Numbers:
        """What the operators of each choice take together."""
        dimensions, whole = self.sizes.at(kept), kept == self.sizes.whole
        return sum((one.at(dimensions, whole, self.terms, self.block) for one in self.placed), np.zeros(len(kept)))

    def _each(self, kept: Numbers) -> Numbers:
        """What each operator takes at one choice, (clusters,)."""
        dimensions, whole = self.sizes.at(kept[None]), (kept == self.sizes.whole)[None]
        sizes, flags = dimensions[0].tolist(), whole[0].tolist()
        found = np.empty(len(self.placed))
        for number, one in enumerate(self.placed):
            key = number, one.where.of is None or flags[one.where.of], *[sizes[d] for d in one.follows]
            took = self._known.get(key)
            if took is None:
                took = self._known[key] = float(one.at(dimensions, whole, self.terms, self.block)[0])
            found[number] = took
        return found

    @cached_property
    def _known(self) -> dict[tuple[Any, ...], float]:
        """(number of an operator, whether the cluster that decides on it is whole, sizes that it follows) -> share."""
        return {}

    @cached_property
    def _clusters(self) -> list[Flags]:
        """Of each operator: which clusters what it takes depends on."""
        made = []
        for one in self.placed:
            depends = (self.sizes.each[one.follows] != 0).any(axis=0)
            if one.where.of is not None:
                depends[one.where.of] = True
            made.append(depends)
        return made


def _grown(total: Numbers) -> Numbers:
    """Terms that a whole model's time is a sum of, (choices, 3), given what its operators take together: the session's
    own time, as much as they say, and more the larger the model is, whose tensors push each other out of the caches.
    """
    return np.stack([np.ones_like(total), total, total**BENDING], axis=1)


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


def fit(samples: Sequence[Sample], sizes: Sizes, blocks: Sequence[int], branches: Sequence[Sequence[str]] = ()) -> Fit:
    """The fit of all samples, by the block of `blocks` and the one of `CORRECTIONS` that predict left-out ones best;
    and how well they do. `branches`: the clusters inside each residual branch that some sample is without.
    """
    inside = [branch for branch in (_inside(names, sizes) for names in branches) if branch is not None]
    samples = sorted(_levelled(samples), key=lambda one: _is_bare(sizes.kept(one.kept), inside))
    kept = np.array([sizes.kept(one.kept) for one in samples])
    usual = np.flatnonzero([not _is_bare(row, inside) for row in kept])
    same = _same([one.operators for one in samples], len(usual), sizes, kept, inside)
    ratios = np.array([one.ratio for one in samples])

    def corrected(numbers: Sequence[int], block: int) -> list[Fit]:
        made = _fit(same, numbers, sizes, kept, block, inside)
        return [correct(made, kept[list(numbers)], ratios[list(numbers)]) for correct in CORRECTIONS]

    tried: list[tuple[float, int, int, tuple[tuple[float, float], ...]]] = []
    parts = min(len(usual), 6)
    for block in blocks:
        pairs: list[list[tuple[float, float]]] = [[] for _ in CORRECTIONS]
        for part in range(parts):
            left_out = usual[part::parts]
            rest = [number for number in range(len(samples)) if number not in left_out]
            for found, made in zip(pairs, corrected(rest, block), strict=True):
                predicted = made.ratio(kept[left_out]).tolist()
                found += zip(predicted, ratios[left_out].tolist(), strict=True)
        for number, found in enumerate(pairs):
            logs = np.log([p / max(r, 1e-9) for p, r in found])
            deviation = float(np.mean(np.abs(logs))) * (np.pi / 2) ** 0.5  # a few outliers do not decide
            tried.append((deviation, block, number, tuple(found)))
    error, block, number, checked = min(tried)
    return replace(corrected(range(len(samples)), block)[number], error=error, checked=checked)


def _inside(names: Sequence[str], sizes: Sizes) -> Inside | None:
    """The clusters of a branch, and a dimension that is zero where all of it is gone; None where there is none."""
    clusters = [sizes.clusters.index(name) for name in names if name in sizes.clusters]
    others = np.delete(sizes.each, clusters, axis=1).any(axis=1)
    gone = np.flatnonzero(~others & (sizes.base == sizes.each[:, clusters] @ sizes.whole[clusters]))
    return Inside(frozenset(clusters), int(gone[0])) if gone.size else None


def _is_bare(kept: Numbers, branches: Sequence[Inside]) -> bool:
    """Whether a model that keeps so many groups, (clusters,), is without any of `branches`."""
    return any((kept[list(one.clusters)] == 0).all() for one in branches)


def _same(
    models: Sequence[Sequence[Operator]], usual: int, sizes: Sizes, kept: Numbers, branches: Sequence[Inside]
) -> list[Seen]:
    """Which operators of all models are one; those after the first `usual` are without branches, and so without any
    operator whose sizes follow a cluster inside one.
    """
    columns = matched(models[:usual])
    if len(models) == usual:
        return columns
    dimensions = sizes.at(kept)
    inside = frozenset().union(*(one.clusters for one in branches))

    def follows(values: tuple[int, ...], having: tuple[int, ...]) -> Slot:
        return slot(values, dimensions[list(having)])

    for number in range(usual, len(models)):
        stays = [not _followed(_sides(seen, follows), sizes) & inside for seen in columns]
        columns = joined(columns, number, models[number], stays)
    return columns


def _fit(
    same: Sequence[Seen], numbers: Sequence[int], sizes: Sizes, kept: Numbers, block: int, branches: Sequence[Inside]
) -> Fit:
    """The fit of the samples of these `numbers`; `same`: which operators of all samples are one. `kept` (samples,
    clusters): groups of all samples. `branches`: those that some of them are without.
    """
    told, bare = set(numbers), frozenset(n for n, row in enumerate(kept) if _is_bare(row, branches))
    stays = [any(number in bare for number, _ in seen) for seen in same]
    same = [[(number, o) for number, o in seen if number in told] for seen in same]
    rows: dict[_Key, list[tuple[list[Any], float]]] = {}
    for column, seen in enumerate(same):
        for _, operator in seen:
            key, values = _told(operator, column, block)
            rows.setdefault(key, []).append((values, operator.share))
    terms = {key: _terms(found) for key, found in rows.items()}
    placed = _placed(same, numbers, terms, block, sizes, kept, branches, bare, stays)
    return Fit(sizes, placed, terms, block, (0.0, 1.0, 0.0))


def _bent(made: Fit, kept: Numbers, ratios: Numbers) -> Fit:
    """The fit by which models of `kept` groups (models, clusters) take the `ratios` that they took as a whole: `_grown`
    of what their operators take together.
    """
    fixed, growing, bending = _steady(_grown(made._total(kept)) / ratios[:, None]).tolist()
    return replace(made, scale=(fixed, growing, bending))


def _divided(made: Fit, kept: Numbers, ratios: Numbers) -> Fit:
    """The same by two factors, one on the constants of all operators and one on what grows with their sizes. Operators
    do not say well how their time divides into both: what writing down costs looks like a constant, and where a small
    model fits into the caches, what grows takes less.
    """

    def times(constants: float, rest: float) -> Fit:
        terms = {key: np.r_[costs[:1] * constants, costs[1:] * rest] for key, costs in made.terms.items()}
        return replace(made, terms=terms)

    columns = np.stack([times(1, 0)._total(kept), times(0, 1)._total(kept)], axis=1)
    return times(*_steady(columns / ratios[:, None], PULL).tolist())


def _steady(rows: Numbers, pull: float = 0.0) -> Numbers:
    """Non-negative factors by which each of `rows` (models, terms) comes to 1, `pull`ed towards 1 themselves. What a
    model is off by more than others are counts less (Huber 1964, by weights that are found anew): a session that
    happened to lie well or badly in memory would bend the whole table.
    """
    weights = np.ones(len(rows))
    held = pull * np.eye(rows.shape[1])[: rows.shape[1] if pull else 0]
    for _ in range(ROUNDS):
        found, _ = nnls(np.vstack([rows * weights[:, None], held]), np.r_[weights, held.sum(axis=1)])
        off = np.abs(rows @ found - 1)
        usual = HUBER * max(float(np.median(off)) / 0.6745, LEAST)  # 0.6745: of a standard deviation, the median error
        weights = np.sqrt(np.minimum(1, usual / np.maximum(off, 1e-12)))
    return np.asarray(found)


CORRECTIONS = (_bent, _divided)
"""Of what operators say by what whole models took. A BERT with cut streams is 6 % off by the first and 2 % by the
second, a made-up model of which each operator takes longer in a larger one 1 and 4 %.
"""


def _placed(
    same: Sequence[Seen],
    numbers: Sequence[int],
    terms: Mapping[_Key, Numbers],
    block: int,
    sizes: Sizes,
    kept: Numbers,
    branches: Sequence[Inside],
    bare: frozenset[int],
    stays: Sequence[bool],
) -> tuple[_Placed, ...]:
    """The operators whose presence in the samples of these `numbers` can be told from the widths; `kept` (samples,
    clusters) groups of all samples, of which those `bare` are without `branches`; `stays`: whether an operator is in
    one of these.
    """
    dimensions, full = sizes.at(kept), kept == sizes.whole
    usual = [number for number in numbers if number not in bare]
    made: dict[tuple[str, _Sides, _Sides, Where, Beside, int | None], float] = {}
    known: dict[tuple[Any, ...], Slot] = {}
    rules: dict[tuple[int, ...], tuple[Where, ...]] = {}

    def follows(sizes: tuple[int, ...], having: tuple[int, ...]) -> Slot:
        """`slot`, asked once for what many operators share."""
        key = sizes, having
        if key not in known:
            known[key] = slot(sizes, dimensions[list(having)])
        return known[key]

    sides = [_sides([one for one in seen if one[0] not in bare] or seen, follows) for seen in same]
    followed = [_followed(one, sizes) for one in sides]
    inside = frozenset().union(*(one.clusters for one in branches))
    for column, seen in enumerate(same):
        if not seen:
            continue
        having = tuple(number for number, _ in seen if number not in bare)
        rule, beside = Where(), Beside()
        if having:
            if having not in rules:
                rules[having] = where(np.isin(usual, having), full[usual])
            if not rules[having]:
                continue
            rule = likeliest(rules[having], column, followed)
            expected = bool(bare) and bool(rule.at(full[sorted(bare)]).any())
            if expected and not stays[column] and not followed[column] & inside and not _has_weights(seen[0][1].kind):
                beside = Beside(nearest(column, followed, branches))
        elif _has_weights(seen[0][1].kind):
            continue  # a layer that was not found again
        else:  # what stands only where branches are gone
            beside = Beside(nearest(column, followed, branches), going=False)
        told = [_told(o, column, block) for _, o in seen]
        predicted = np.array([float(np.dot(terms[key], values)) for key, values in told])
        shares = np.array([o.share for _, o in seen])
        pull = OWN * float(np.mean(predicted**2)) + 1e-18
        factor = (float(predicted @ shares) + pull) / (float(predicted @ predicted) + pull)
        alike = seen[0][1].kind, *sides[column], rule, beside, told[0][0][1]
        made[alike] = made.get(alike, 0.0) + factor
    return tuple(_Placed(*alike, factor) for alike, factor in made.items())


def _sides(seen: Seen, follows: Callable[[tuple[int, ...], tuple[int, ...]], Slot]) -> tuple[_Sides, _Sides]:
    """What each dimension of an operator's inputs and outputs `follows`, given its sizes in the models that have it."""
    having = tuple(number for number, _ in seen)

    def told(side: str) -> _Sides:
        shapes = [getattr(one, side) for _, one in seen]
        return tuple(
            tuple(follows(tuple(shape[i][d] for shape in shapes), having) for d in range(len(one)))
            for i, one in enumerate(shapes[0] if shapes else ())
        )

    return told("inputs"), told("outputs")


def _followed(sides: tuple[_Sides, _Sides], sizes: Sizes) -> frozenset[int]:
    """The clusters that any of an operator's sizes follows."""
    dimensions = {s.of for side in sides for shape in side for s in shape if s.of is not None}
    return frozenset(int(c) for d in dimensions for c in np.flatnonzero(sizes.each[d]))


def _told(operator: Operator, column: int, block: int) -> tuple[_Key, list[Any]]:
    """Which costs an operator's time is made of, and how much of each."""
    found = work(operator.kind, operator.inputs, operator.outputs, block)
    return (found.key, None if found.shared else column), found.terms


def _terms(rows: Sequence[tuple[list[Any], float]]) -> Numbers:
    """Non-negative costs of the terms, by least squares between absolute and relative error."""
    values = np.array([[float(v) for v in row] for row, _ in rows])
    shares = np.array([share for _, share in rows])
    weight = 1 / np.sqrt(np.maximum(shares, 1e-12) * max(float(shares.mean()), 1e-12))
    size = np.maximum(np.abs(values).max(axis=0), 1e-12)
    found, _ = nnls(values / size * weight[:, None], shares * weight)
    return np.asarray(found / size)
