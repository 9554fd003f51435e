"""From operators' times at a few widths to their times at any: one small regression per kind of operator.

An operator's time is a sum of few terms that grow with its sizes (a constant, multiplications, elements read and
written), none of them negative (Lawson and Hanson's NNLS). Operators that do the same work on other widths share
the terms; what one of them costs more or less than its kind, by its place in the caches, is a factor of its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

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
OFTEN = 0.75
"""An operator counts as the model's own when it is in at least this share of the measured models."""
COVERED, FORM = 0.9, 3
"""One graph serves all widths when operators that most of them have take this share of the time; else a graph of its
own counts that this many models have.
"""
LEFT = 0.2
"""Of an operator's time, at least, is its own and not that of writing it down."""
BENDING = 1.5
"""Power of the term by which a whole model takes longer than its operators say. Of a ResNet-50 at 32x32, models left
out were 6 % off without it and 3 % with it, 3.7 % with a power of 2; of a MobileNetV2 and a DeiT-tiny 5 and 7 % always.
"""
OWN = 3.0
"""Of how many measurements' worth a kind's terms outweigh what one operator showed."""


def work(kind: str, inputs: Shapes, outputs: Shapes, block: int) -> tuple[Hashable, list[Any]]:
    """What kind of work an operator does, and the terms that its time is a sum of.

    `block`: channels that the kernels take together; widths count as rounded up to that.
    """
    out = outputs[0] if outputs else ()
    first = inputs[0] if inputs else ()
    weight = next((one for one in inputs[1:] if len(one) == len(first) >= 3), None) if "Conv" in kind else None
    if weight is not None:
        whole_in, whole_out, per_group = _up(first[1], block), _up(out[1], block), weight[1]
        key = (kind, *weight[2:], *_fixed(first[2:]), *_fixed(out[2:]), sum(len(one) == len(first) for one in inputs))
        if _always(per_group, 1) and not _always(first[1], 1):
            return ("depthwise", *key), [1.0, whole_out]
        both = whole_out * (_up(per_group, block) if np.array_equal(per_group, first[1]) else per_group)
        odd = np.asarray(first[1]) % block != 0  # such an input is not read in blocks
        plain = out[1] * np.asarray(per_group)
        return key, [1.0, both, plain, whole_in, whole_out, odd * plain, odd * out[1]]
    if kind.removeprefix("Fused") in PRODUCTS and len(first):
        products = _elements(out) * first[-1]
        rows = out[-2] if len(out) > 1 and np.ndim(out[-2]) == 0 else 0
        return (kind, len(first), rows), [1.0, products, _elements(first), _elements(out)]
    if kind in RECURRENT and len(out):
        hidden = out[-1]
        return (kind, *_fixed(first[:2])), [1.0, hidden * (first[-1] + hidden), hidden]
    read = sum((_elements(one) for one in inputs), 0.0)
    return (kind, len(inputs), len(out)), [1.0, read, sum((_elements(one) for one in outputs), 0.0)]


def _elements(shape: Sequence[Any]) -> Any:
    total: Any = 1.0
    for size in shape:
        total = total * size
    return total


def _up(size: Any, block: int) -> Any:
    return np.ceil(np.asarray(size) / block) * block


def _always(size: Any, value: int) -> bool:
    return bool(np.all(np.asarray(size) == value))


def _fixed(shape: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(size for size in shape if np.ndim(size) == 0)


@dataclass(frozen=True)
class Operator:
    """One of the runtime's operators as it was measured, `share` of the dense model's time."""

    name: str
    kind: str
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    share: float


@dataclass(frozen=True)
class Sample:
    """One measured model: groups kept of each cluster, its time of the dense model's, and its operators."""

    kept: Mapping[str, int]
    ratio: float
    operators: tuple[Operator, ...]


_Sides = tuple[tuple[Slot, ...], ...]
"""Of an operator's tensors on one side: what each dimension follows."""


@dataclass(frozen=True)
class _Placed:
    """Operators that every width has, alike in what their sizes follow: their own factors on what their kind costs,
    added up.
    """

    kind: str
    inputs: _Sides
    outputs: _Sides
    factor: float

    @cached_property
    def follows(self) -> list[int]:
        """The program's dimensions that any of their sizes follows."""
        return sorted(
            {s.of for side in (self.inputs, self.outputs) for shape in side for s in shape if s.of is not None}
        )


@dataclass(frozen=True)
class _Form:
    """A graph that some widths give, others another: a stream of features that stays whole needs no centring, say.

    `placed`: its operators. `whole`: of the models of this form, the share that kept each cluster whole.
    """

    placed: tuple[_Placed, ...]
    whole: Numbers


@dataclass(frozen=True)
class Fit:
    """Predicts a model's time of the dense model's. `error`: of the log of a ratio, a standard deviation, from models
    left out of the fit one after another, which `checked` lists as (predicted, measured).
    """

    sizes: Sizes
    forms: tuple[_Form, ...]
    terms: Mapping[Hashable, Numbers]
    block: int
    scale: tuple[float, float, float]
    error: float = 0.0
    checked: tuple[tuple[float, float], ...] = field(default=(), repr=False)

    def ratio(self, kept: Numbers) -> Numbers:
        """(choices, clusters) groups kept -> (choices,) time of the dense model's."""
        made: Numbers = _grown(_total(self, kept)) @ np.array(self.scale)
        return made


def _grown(total: Numbers) -> Numbers:
    """Terms that a whole model's time is a sum of, (choices, 3), given what its operators take together: the session's
    own time, as much as they say, and more the larger the model is, whose tensors push each other out of the caches.
    """
    return np.stack([np.ones_like(total), total, total**BENDING], axis=1)


def _total(made: Fit, kept: Numbers) -> Numbers:
    """What the operators of each choice take together."""
    dimensions, total = made.sizes.at(kept), np.zeros(len(kept))
    numbers = _form_of(made.forms, kept == made.sizes.whole)
    for number, form in enumerate(made.forms):
        rows = numbers == number
        if rows.any():
            total[rows] = _sum(form.placed, made.terms, made.block, dimensions[rows])
    return total


def _form_of(forms: Sequence[_Form], whole: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """(choices, clusters) whether a cluster is whole -> the form whose models are most like that, in the clusters that
    tell the forms apart.
    """
    means = np.stack([form.whole for form in forms])
    weight = (means.max(axis=0) - means.min(axis=0)) ** 4
    found: npt.NDArray[np.int64] = np.argmin((weight * (whole[:, None] - means) ** 2).sum(axis=-1), axis=1)
    return found


def _sum(placed: Sequence[_Placed], terms: Mapping[Hashable, Numbers], block: int, dimensions: Numbers) -> Numbers:
    """What all operators take together. A file has none of those of a branch that goes as a whole, whose sizes are
    zero: they do not even cost their constant.
    """
    total, left = np.zeros(len(dimensions)), dimensions > 0
    for one in placed:
        inputs, outputs = ([[s.at(dimensions) for s in shape] for shape in side] for side in (one.inputs, one.outputs))
        key, values = work(one.kind, inputs, outputs, block)
        cost = terms.get(key)
        if cost is not None:
            took = one.factor * sum(c * v for c, v in zip(cost, values, strict=True))
            total += left[:, one.follows].all(axis=1) * took
    return total


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
        made.append(replace(one, operators=_named(operators)))
    return made


def _named(operators: Sequence[Operator]) -> tuple[Operator, ...]:
    """Operators that the runtime put in named after the one before them: it numbers its own anew in each session."""
    made: list[Operator] = []
    before = ""
    for one in operators:
        own = one.name == one.kind or one.name.startswith(f"{one.kind}_token_")
        before = f"{before}>{one.kind}" if own else one.name
        made.append(replace(one, name=before))
    return tuple(made)


def fit(samples: Sequence[Sample], sizes: Sizes, blocks: Sequence[int]) -> Fit:
    """The fit of all samples, by the block of `blocks` that predicts left-out ones best; and how well it does."""
    samples = _levelled(samples)
    tried: list[tuple[float, int, tuple[tuple[float, float], ...]]] = []
    for block in blocks:
        pairs: list[tuple[float, float]] = []
        parts = min(len(samples), 6)
        for part in range(parts):
            rest = [one for number, one in enumerate(samples) if number % parts != part]
            out = [one for number, one in enumerate(samples) if number % parts == part]
            made = _fit(rest, sizes, block)
            found = made.ratio(np.array([sizes.kept(one.kept) for one in out]))
            pairs += [(float(p), one.ratio) for p, one in zip(found, out, strict=True)]
        logs = np.log([p / max(r, 1e-9) for p, r in pairs])
        tried.append((float(np.sqrt(np.mean(logs**2))), block, tuple(pairs)))
    error, block, checked = min(tried)
    made = _fit(samples, sizes, block)
    return replace(made, error=error, checked=checked)


def _fit(samples: Sequence[Sample], sizes: Sizes, block: int) -> Fit:
    rows: dict[Hashable, list[tuple[list[Any], float]]] = {}
    for sample in samples:
        for operator in sample.operators:
            key, values = work(operator.kind, operator.inputs, operator.outputs, block)
            rows.setdefault(key, []).append((values, operator.share))
    terms = {key: _terms(found) for key, found in rows.items()}
    kept = np.array([sizes.kept(one.kept) for one in samples])
    forms = tuple(
        _Form(
            _placed([samples[n] for n in numbers], terms, block, sizes.at(kept[numbers])),
            (kept[numbers] == sizes.whole).mean(axis=0),
        )
        for numbers in _alike(samples)
    )
    made = Fit(sizes, forms, terms, block, (0.0, 1.0, 0.0))
    ratios = np.array([one.ratio for one in samples])
    found, _ = nnls(_grown(_total(made, kept)) / ratios[:, None], np.ones(len(samples)))
    fixed, growing, bending = found.tolist()
    return replace(made, scale=(fixed, growing, bending))


def _alike(samples: Sequence[Sample]) -> list[list[int]]:
    """Numbers of the samples that have one graph, where the graph hangs on the widths: together, if operators that most
    of them have take nearly all the time, else by the names of their operators.
    """
    own = _own(samples)
    covered = [sum(o.share for o in one.operators if o.name in own) / max(one.ratio, 1e-9) for one in samples]
    if np.mean(covered) >= COVERED:
        return [list(range(len(samples)))]
    groups: dict[frozenset[str], list[int]] = {}
    for number, one in enumerate(samples):
        groups.setdefault(frozenset(o.name for o in one.operators), []).append(number)
    large = {names: numbers for names, numbers in groups.items() if len(numbers) >= FORM}
    if not large:
        return [list(range(len(samples)))]
    for names, numbers in groups.items():
        if names not in large:  # too few to tell what its sizes follow: it goes with those that it has most in common
            large[max(large, key=lambda other: len(other & names) / len(other | names))].extend(numbers)
    return [sorted(numbers) for numbers in large.values()]


def _own(samples: Sequence[Sample]) -> dict[str, list[tuple[int, Operator]]]:
    """Operators by name that are in most of the samples, and the same there apart from their sizes."""
    by_name: dict[str, list[tuple[int, Operator]]] = {}
    for number, sample in enumerate(samples):
        for operator in sample.operators:
            by_name.setdefault(operator.name, []).append((number, operator))
    return {
        name: seen
        for name, seen in by_name.items()
        if len(seen) >= OFTEN * len(samples)
        and len({(o.kind, tuple(map(len, o.inputs)), tuple(map(len, o.outputs))) for _, o in seen}) == 1
    }


def _placed(
    samples: Sequence[Sample], terms: Mapping[Hashable, Numbers], block: int, dimensions: Numbers
) -> tuple[_Placed, ...]:
    """The operators that all widths of one form have; `dimensions` (samples, sizes) of their programs."""
    made: dict[tuple[str, _Sides, _Sides], float] = {}
    known: dict[tuple[Any, ...], Slot] = {}

    def follows(sizes: tuple[int, ...], numbers: tuple[int, ...]) -> Slot:
        """`slot`, asked once for what many operators share."""
        key = sizes, numbers
        if key not in known:
            known[key] = slot(sizes, dimensions[list(numbers)])
        return known[key]

    for seen in _own(samples).values():
        numbers = tuple(number for number, _ in seen)
        sides = [
            tuple(
                tuple(follows(tuple(getattr(o, side)[i][d] for _, o in seen), numbers) for d in range(len(shape)))
                for i, shape in enumerate(getattr(seen[0][1], side))
            )
            for side in ("inputs", "outputs")
        ]
        told = (work(o.kind, o.inputs, o.outputs, block) for _, o in seen)
        predicted = np.array([float(np.dot(terms[key], values)) for key, values in told])
        shares = np.array([o.share for _, o in seen])
        pull = OWN * float(np.mean(predicted**2)) + 1e-18
        factor = (float(predicted @ shares) + pull) / (float(predicted @ predicted) + pull)
        alike = seen[0][1].kind, sides[0], sides[1]
        made[alike] = made.get(alike, 0.0) + factor
    return tuple(_Placed(kind, inputs, outputs, factor) for (kind, inputs, outputs), factor in made.items())


def _terms(rows: Sequence[tuple[list[Any], float]]) -> Numbers:
    """Non-negative costs of the terms, by least squares between absolute and relative error."""
    values = np.array([[float(v) for v in row] for row, _ in rows])
    shares = np.array([share for _, share in rows])
    weight = 1 / np.sqrt(np.maximum(shares, 1e-12) * max(float(shares.mean()), 1e-12))
    size = np.maximum(np.abs(values).max(axis=0), 1e-12)
    found, _ = nnls(values / size * weight[:, None], shares * weight)
    return np.asarray(found / size)
