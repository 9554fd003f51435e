"""Do two models compute the same?

The rule, for every output tensor of every feed, element by element:

    |candidate − reference| ≤ atol · max(1, max|reference|) + rtol · |reference|

where max|reference| runs over the whole tensor: float32 rounding grows with the size of what is summed, not with the
size of the one number that comes out. With rtol = 0 the first term is the whole rule. There are no default tolerances.

Where that does not hold and the caller can also run the function in float64 (`precise`), float32 rounding is measured
instead of assumed: let r be how far the first model of the chain, and runs in which every number is shaken by one
float32 rounding (`shaken`), come from the float64 result on this feed. Two correct float32 models may then differ by
ROUNDING_MARGIN · r. Inputs of ±1000 are such feeds: clamps and norms bring the outputs back to order one, and the
rounding of what lies between them with it. A feed on which float32 itself loses more than
ROUNDING_CEILING · max(1, max|reference|) tells nothing, and fails.

Two runtimes differ by more than rounding: each has its own exp, erf and tanh, on some processors another one. Where the
caller can also run a model that nobody doubts, the dense one, in the same two runtimes (`yardstick`), it is run on each
feed that still fails, and its own difference counts: with y = max|dense in one − dense in the other| / max(1,
max|dense|) of that output on that very feed, the candidate may differ by YARDSTICK_MARGIN · y · max(1, max|reference|),
and the report's `notes` say so. A feed on which the dense model itself differs by more than ROUNDING_CEILING grants
nothing.

These fail whatever the tolerance: another shape, type or set of outputs; a NaN on real inputs; a NaN or an infinity
that is not in both at the same place; integers or booleans that differ; a model that raises; and a comparison that
could not have failed, since there were no feeds, since an output was never finite, or since it stayed below the
tolerance in every feed (where all zeros would have passed) without agreeing to `atol` of its own scale.

Inputs that were made up may lie outside of what a model takes: the logarithm of a negative number, a division by a
spread of 0. There a NaN at the same places in both is agreement, though not evidence: what is finite beside it is
compared. Where no one said that a model takes such inputs at all (`origin` "tried": a batch size, a length, a range),
both models raising is agreement of the same kind.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

import numpy as np
from pydantic import BaseModel, ConfigDict

from foundation.errors import ValidationError
from foundation.rounding import allowance, scaled
from validators.feeds import Feed, Origin
from validators.runners import Array, Runner

# Either side of a comparison has its own rounding error, and an operator that sums has more than one rounding.
ROUNDING_MARGIN = 4.0
FEW = 16
"""Numbers in an output, below which its rounding is measured on so many copies of the feed."""
# Three decimal digits left: less is no comparison any more.
ROUNDING_CEILING = 1e-3
# The largest of some thousand rounding errors, on either side: two such draws are within this factor of each other.
YARDSTICK_MARGIN = 2.0


class OutputParity(BaseModel):
    """One output of one feed compared.

    Errors are |candidate − reference|; relative ones are divided by |reference|, leaving out elements so small that
    rounding at the tensor's scale alone exceeds them. `scale` is max|reference|, `tolerance` is atol · max(1, scale),
    or ROUNDING_MARGIN · `rounding` or YARDSTICK_MARGIN · `yardstick` · max(1, scale) where that is more; `rounding` is
    the measured float32 error of the first model, `yardstick` the dense model's own difference over max(1, its scale).
    `exact`: of integers, booleans or text, which have no tolerance. `compared` is False where made-up inputs gave
    nothing finite in either: no difference, and no evidence. `telling` whether all zeros would have failed, or
    agreement is within atol · scale. `ulp_*` count the representable numbers between the two values (median, 99th
    percentile, largest). `cosine` is over the flattened tensors. `top1` is the share of rows with the same largest
    element, `top5` of those with the same five, for 2-D outputs that have more than as many columns. What cannot be
    computed is None.
    """

    model_config = ConfigDict(frozen=True)

    feed: str
    output: str
    passed: bool
    reason: str
    exact: bool = False
    compared: bool = True
    shape: tuple[int, ...] | None = None
    elements: int = 0
    scale: float | None = None
    tolerance: float | None = None
    rounding: float | None = None
    yardstick: float | None = None
    telling: bool = False
    max_abs: float | None = None
    mean_abs: float | None = None
    max_rel: float | None = None
    mean_rel: float | None = None
    ulp_p50: float | None = None
    ulp_p99: float | None = None
    ulp_max: float | None = None
    cosine: float | None = None
    top1: float | None = None
    top5: float | None = None


class ParityReport(BaseModel):
    """Two models compared on several feeds. `reasons` is empty when it passed; `worst` is the largest error's entry.

    `notes` names what passed by the yardstick alone, and what made-up inputs could not tell. `max_abs` and `max_scaled`
    (max_abs / max(1, scale)) are the largest over all outputs and feeds, `top1` is the smallest. `judged` is what
    `atol` bounds when rtol is 0: `max_scaled`, but for outputs whose tolerance was measured the same share of that
    tolerance. All are None unless every output of every feed was compared, so that a limit on one of them cannot be met
    by what was left out.
    """

    model_config = ConfigDict(frozen=True)

    reference: str
    candidate: str
    atol: float
    rtol: float
    passed: bool
    reasons: tuple[str, ...]
    notes: tuple[str, ...] = ()
    feeds: tuple[str, ...]
    outputs: tuple[OutputParity, ...]
    worst: OutputParity | None
    max_abs: float | None
    max_scaled: float | None
    judged: float | None
    top1: float | None


class ChainReport(BaseModel):
    """A chain of models, each compared with the one before. `broken` names the first hop that failed."""

    model_config = ConfigDict(frozen=True)

    passed: bool
    broken: str | None
    hops: tuple[ParityReport, ...]


# What one model gave for one feed: its outputs, or why there are none.
_Answer = dict[str, Array] | str

# Opens a model when it is needed: a yardstick is, only where something missed its limit.
Opener = Callable[[], Runner]


@dataclass(frozen=True)
class _Grounds:
    """What was measured to judge one feed by, by output: float32's own error, and the dense model's own difference."""

    rounding: Mapping[str, float] = field(default_factory=dict)
    yardstick: Mapping[str, float] = field(default_factory=dict)


def compare(reference: Runner, candidate: Runner, feeds: Iterable[Feed], *, atol: float, rtol: float) -> ParityReport:
    """Compare two models on `feeds`, one after the other, by the rule at the top of this module."""
    return compare_chain([reference, candidate], feeds, atol=atol, rtol=rtol).hops[0]


def compare_chain(
    runners: Sequence[Runner],
    feeds: Iterable[Feed],
    *,
    atol: float,
    rtol: float,
    precise: Runner | None = None,
    shaken: Sequence[Runner] = (),
    yardstick: Sequence[Opener | None] = (),
) -> ChainReport:
    """Compare each model with the next, so that a failure names the hop; every model runs every feed once.

    `precise` computes the function of the first model in float64, `shaken` the same with every number shaken by a
    random float32 rounding (Monte Carlo arithmetic, Parker 1997). They run where the rule does not hold; without
    `precise`, or where it fails, the rule is all. `yardstick` opens, for each of `runners`, the dense model in the same
    runtime, or is None there; a hop has a yardstick where both its ends have one, and it runs on the feeds that fail.

    Raises ValidationError for fewer than two models, for yardsticks that are not as many, or a tolerance that is
    negative or not finite.
    """
    if len(runners) < 2:
        raise ValidationError("A comparison needs two models.")
    if not all(math.isfinite(tolerance) and tolerance >= 0 for tolerance in (atol, rtol)):
        raise ValidationError(f"Tolerances must be finite and not negative (atol={atol}, rtol={rtol}).")
    if yardstick and len(yardstick) != len(runners):
        raise ValidationError(f"{len(yardstick)} yardsticks for {len(runners)} models.")
    openers = [functools.cache(opener) if opener else None for opener in yardstick] or [None] * len(runners)
    tallies = [_Tally(left.name, right.name, atol, rtol) for left, right in pairwise(runners)]
    for feed in feeds:  # one at a time: the outputs of all of them may not fit into memory
        answers = [_answer(runner, feed) for runner in runners]
        measured: dict[str, float] | None = None
        for at, tally in enumerate(tallies):
            judged = partial(_judged_feed, feed, answers[at], answers[at + 1], atol, rtol)
            grounds = _Grounds()
            found = judged(grounds)
            if precise is not None and found.loose:
                measured = _rounding(answers[0], feed, precise, shaken) if measured is None else measured
                grounds = _Grounds(measured)
                found = judged(grounds)
            first_end, second_end = openers[at], openers[at + 1]
            if first_end is not None and second_end is not None and found.loose:
                found = judged(replace(grounds, yardstick=_own_difference(first_end(), second_end(), feed)))
            tally.add(feed, found)
    hops = [tally.report() for tally in tallies]
    broken = next((hop for hop in hops if not hop.passed), None)
    return ChainReport(
        passed=broken is None,
        broken=f"{broken.reference} -> {broken.candidate}" if broken else None,
        hops=tuple(hops),
    )


def compare_arrays(
    reference: Array,
    candidate: Array,
    *,
    atol: float,
    rtol: float,
    rounding: float | None = None,
    yardstick: float | None = None,
    feed: str = "",
    output: str = "",
    origin: Origin = "real",
) -> OutputParity:
    """Compare two tensors by the rule at the top of this module.

    `rounding` is the measured float32 error, `yardstick` the dense model's own difference over max(1, its scale), where
    they were measured. `origin` is that of the inputs.
    """

    def failed(reason: str) -> OutputParity:
        return OutputParity(feed=feed, output=output, passed=False, reason=reason, shape=reference.shape)

    if reference.shape != candidate.shape:
        return failed(f"shape {candidate.shape} instead of {reference.shape}")
    if reference.dtype != candidate.dtype:
        return failed(f"type {candidate.dtype} instead of {reference.dtype}")
    nothing = OutputParity(feed=feed, output=output, passed=True, reason="", compared=False, shape=reference.shape)
    if reference.size == 0:
        return nothing if origin == "tried" else failed("the output is empty")
    if reference.dtype.kind in "OUS":
        return _texts(reference, candidate, nothing)
    holes = np.isnan(reference), np.isnan(candidate)
    for owner, hole in zip(("the reference", "the candidate"), holes, strict=True):
        if hole.any() and (origin == "real" or not np.array_equal(holes[0], holes[1])):
            return failed(f"{int(hole.sum())} NaN in {owner}")
    finite = np.isfinite(reference)
    unlike = ~finite & ~holes[0]
    if not np.array_equal(reference[unlike], candidate[unlike]) or not np.isfinite(candidate[finite]).all():
        return failed("an infinity in one is not in the other")
    if not finite.any():
        return failed("no finite element to compare") if origin == "real" else nothing
    return _measured(reference, candidate, finite, atol, rtol, rounding, yardstick, feed, output)


def _texts(reference: Array, candidate: Array, nothing: OutputParity) -> OutputParity:
    bad = int((reference != candidate).sum())
    found = {"compared": True, "exact": True, "telling": True, "elements": int(reference.size), "scale": 1.0}
    said = {"passed": False, "reason": f"{bad} of {reference.size} texts differ"} if bad else {}
    return nothing.model_copy(update={**found, **said, "max_abs": float(bad > 0)})


def _measured(
    reference: Array,
    candidate: Array,
    finite: Array,
    atol: float,
    rtol: float,
    lost: float | None,
    own: float | None,
    feed: str,
    output: str,
) -> OutputParity:
    exact = not np.issubdtype(reference.dtype, np.floating)
    wanted = reference[finite].astype(np.float64)
    found = candidate[finite].astype(np.float64)
    size = np.abs(wanted)
    error = np.abs(found - wanted)
    if exact:  # float64 does not tell large integers apart
        error = np.maximum(error, reference[finite] != candidate[finite])
    scale = float(size.max())
    measured = max(ROUNDING_MARGIN * (lost or 0.0), YARDSTICK_MARGIN * allowance(own or 0.0, scale))
    tolerance = 0.0 if exact else max(allowance(atol, scale), measured)
    hopeless = lost is not None and lost > allowance(ROUNDING_CEILING, scale)
    excess = error - tolerance - (0.0 if exact else rtol * size)
    bad = int((excess > 0).sum())
    rounding = 0.0 if exact else float(np.finfo(reference.dtype).eps) * scale
    counted = size > rounding
    relative = error[counted] / size[counted]
    ulps = None if exact else _ulp_distance(reference[finite], candidate[finite])
    norms = float(np.linalg.norm(wanted) * np.linalg.norm(found))
    return OutputParity(
        feed=feed,
        output=output,
        passed=bad == 0 and not hopeless,
        reason=f"float32 itself is off by {lost:.3g} here, so nothing can be told"
        if hopeless
        else f"{bad} of {error.size} elements differ by up to {error.max():.3g}, allowed {tolerance:.3g}"
        if bad
        else "",
        exact=exact,
        shape=reference.shape,
        elements=int(error.size),
        scale=scale,
        tolerance=tolerance,
        rounding=lost,
        yardstick=own,
        telling=tolerance + rtol * scale < scale or float(error.max()) <= atol * scale,
        max_abs=float(error.max()),
        mean_abs=float(error.mean()),
        max_rel=float(relative.max()) if relative.size else None,
        mean_rel=float(relative.mean()) if relative.size else None,
        ulp_p50=None if ulps is None else float(np.quantile(ulps, 0.5)),
        ulp_p99=None if ulps is None else float(np.quantile(ulps, 0.99)),
        ulp_max=None if ulps is None else float(ulps.max()),
        cosine=min(1.0, float(wanted @ found) / norms) if norms else None,
        top1=float((reference.argmax(1) == candidate.argmax(1)).mean()) if reference.ndim == 2 else None,
        top5=_same_largest(reference, candidate, 5) if reference.ndim == 2 and reference.shape[1] > 5 else None,
    )


def _same_largest(reference: Array, candidate: Array, k: int) -> float:
    """The share of rows whose `k` largest elements are the same ones, in whatever order."""
    left, right = (np.sort(np.argpartition(array, -k, axis=1)[:, -k:], axis=1) for array in (reference, candidate))
    return float((left == right).all(axis=1).mean())


_ORDERED = {2: np.int16, 4: np.int32, 8: np.int64}


def _ulp_distance(reference: Array, candidate: Array) -> Array:
    """How many representable numbers lie between two arrays of one floating type, as float64.

    The bits of an IEEE float, read as a sign-magnitude integer, are in the order of the numbers.
    """

    def ordered(array: Array) -> Array:
        bits = np.ascontiguousarray(array).view(_ORDERED[array.dtype.itemsize])
        magnitude = (bits & np.iinfo(bits.dtype).max).astype(np.float64)
        return np.where(bits < 0, -magnitude, magnitude)

    distance: Array = np.abs(ordered(reference) - ordered(candidate))
    return distance


def _answer(runner: Runner, feed: Feed) -> _Answer:
    try:
        return runner.infer(feed.arrays)
    except Exception as error:  # whatever a model raises is a result of the comparison
        return f"{runner.name} fails: {error}"


def _rounding(first: _Answer, feed: Feed, precise: Runner, shaken: Sequence[Runner]) -> dict[str, float]:
    """Output name -> largest difference from the float64 answer, of the first model and of the shaken ones."""
    truth = _answer(precise, feed)
    found: dict[str, float] = {}
    pairs = [(first, truth), *((_answer(runner, feed), truth) for runner in shaken)]
    several = _repeated(feed, first)
    if several is not None:
        # Of one number, four roundings can all be small by luck; each sample of a batch is shaken by others.
        exactly = _answer(precise, several)
        wide = [(_answer(runner, several), exactly) for runner in shaken]
        if not any(isinstance(answer, str) for pair in wide for answer in pair):
            pairs += wide
    for answer, truth in pairs:
        if isinstance(answer, str) or isinstance(truth, str):
            return {}
        for name, value in answer.items():
            exact = truth.get(name)
            if exact is None or exact.shape != value.shape or not value.size or exact.dtype != np.float64:
                return {}
            error = float(np.abs(value.astype(np.float64) - exact).max())
            if not math.isfinite(error):
                return {}
            found[name] = max(found.get(name, 0.0), error)
    return found


def _repeated(feed: Feed, answer: _Answer) -> Feed | None:
    """The same samples several times over, where the outputs hold too few numbers to tell rounding by; else None."""
    if isinstance(answer, str) or min((value.size for value in answer.values()), default=FEW) >= FEW:
        return None
    if len({len(one) if one.ndim else -1 for one in feed.arrays.values()}) != 1:
        return None
    arrays = {name: np.repeat(one, FEW, axis=0) for name, one in feed.arrays.items() if one.ndim}
    return replace(feed, arrays=arrays) if len(arrays) == len(feed.arrays) else None


def _own_difference(before: Runner, after: Runner, feed: Feed) -> dict[str, float]:
    """Output name -> how far one model is from itself in another runtime, over max(1, its scale).

    Left out is what cannot be compared, and what differs so much that nothing can be told.
    """
    left, right = _answer(before, feed), _answer(after, feed)
    found: dict[str, float] = {}
    if isinstance(left, str) or isinstance(right, str):
        return found
    for name in left.keys() & right.keys():
        entry = compare_arrays(left[name], right[name], atol=ROUNDING_CEILING, rtol=0.0)
        if entry.passed and np.issubdtype(left[name].dtype, np.floating):
            found[name] = _scaled(entry)
    return found


@dataclass(frozen=True)
class _Found:
    """Two answers to one feed compared: an entry for each output; what could not be compared; whether both raised."""

    entries: Sequence[OutputParity] = ()
    gaps: Sequence[str] = ()
    neither: str = ""

    @property
    def loose(self) -> bool:
        """Whether an output could be compared and differs by too much."""
        return any(not entry.passed and entry.max_abs is not None for entry in self.entries)


def _judged_feed(feed: Feed, left: _Answer, right: _Answer, atol: float, rtol: float, known: _Grounds) -> _Found:
    if isinstance(left, str) and isinstance(right, str) and feed.origin == "tried":
        return _Found(neither=f"{feed.label}: {left}")
    if isinstance(left, str) or isinstance(right, str):
        return _Found(gaps=[f"{feed.label}: {answer}" for answer in (left, right) if isinstance(answer, str)])
    if left.keys() != right.keys() or not left:
        made = f"outputs {', '.join(right) or 'none'} instead of {', '.join(left) or 'none'}"
        return _Found(gaps=[f"{feed.label}: {made}"])
    return _Found(
        [
            compare_arrays(
                left[name],
                right[name],
                atol=atol,
                rtol=rtol,
                rounding=known.rounding.get(name),
                yardstick=known.yardstick.get(name),
                feed=feed.label,
                output=name,
                origin=feed.origin,
            )
            for name in left
        ]
    )


class _Tally:
    """What was found on one hop, feed by feed."""

    def __init__(self, reference: str, candidate: str, atol: float, rtol: float) -> None:
        self.names, self.atol, self.rtol = (reference, candidate), atol, rtol
        self.feeds: list[str] = []
        self.outputs: list[OutputParity] = []
        self.gaps: list[str] = []
        self.neither: list[str] = []

    def add(self, feed: Feed, found: _Found) -> None:
        self.feeds.append(feed.label)
        self.outputs += found.entries
        self.gaps += found.gaps
        if found.neither:
            self.neither.append(found.neither)

    def report(self) -> ParityReport:
        gaps = [*self.gaps, *self._nothing_told()]
        wrong = [f"{entry.feed}: {entry.output}: {entry.reason}" for entry in self.outputs if not entry.passed]
        compared = [entry for entry in self.outputs if entry.compared]
        unmeasured = next((entry for entry in compared if entry.max_abs is None), None)
        worst = unmeasured or max(compared, key=_scaled, default=None)
        complete = compared if not gaps and not unmeasured else []
        return ParityReport(
            reference=self.names[0],
            candidate=self.names[1],
            atol=self.atol,
            rtol=self.rtol,
            passed=not gaps and not wrong,
            reasons=(*gaps, *wrong),
            notes=(
                *(_words(entry, self.atol) for entry in self.outputs if _by_yardstick(entry, self.atol)),
                *self._outside(),
            ),
            feeds=tuple(self.feeds),
            outputs=tuple(self.outputs),
            worst=worst,
            max_abs=max((entry.max_abs or 0.0 for entry in complete), default=None),
            max_scaled=max(map(_scaled, complete), default=None),
            judged=max((_judged(entry, self.atol) for entry in complete), default=None),
            top1=min((entry.top1 for entry in complete if entry.top1 is not None), default=None),
        )

    def _nothing_told(self) -> Iterator[str]:
        """What makes the comparison one that could not have failed."""
        if not self.outputs and not self.gaps:
            yield f"nothing was compared; {self.neither[0]}" if self.neither else "nothing was compared"
        for name in dict.fromkeys(entry.output for entry in self.outputs):
            mine = [entry for entry in self.outputs if entry.output == name and entry.passed]
            told = [entry for entry in mine if entry.compared]
            if told and not any(entry.telling for entry in told):
                largest = max(entry.scale or 0.0 for entry in told)
                yield f"{name}: never above {largest:.3g}, so a tolerance of {self.atol:.3g} tells nothing"
            elif mine and not told:
                yield f"{name}: never finite on the made-up inputs, so nothing was compared; real ones are needed"

    def _outside(self) -> Iterator[str]:
        """How much of what was made up lay outside of what the models take."""
        silent = {entry.feed for entry in self.outputs if not entry.compared}
        if silent:
            yield f"{len(silent)} of {len(self.feeds)} feeds gave nothing finite in either model, which tells nothing"
        if self.neither:
            yield f"{len(self.neither)} of {len(self.feeds)} feeds were taken by neither model; {self.neither[0]}"


def _by_yardstick(entry: OutputParity, atol: float) -> bool:
    """Whether nothing but the yardstick lets it pass."""
    without = max(allowance(atol, entry.scale or 0.0), ROUNDING_MARGIN * (entry.rounding or 0.0))
    return entry.passed and entry.yardstick is not None and (entry.max_abs or 0.0) > without


def _words(entry: OutputParity, atol: float) -> str:
    return (
        f"{entry.feed}: {entry.output}: differs by {_scaled(entry):.3g} of its scale, more than {atol:.3g}; the dense "
        f"model itself differs by {entry.yardstick:.3g} on this input between the same two runtimes, and "
        f"{YARDSTICK_MARGIN:g} times that is allowed"
    )


def _scaled(entry: OutputParity) -> float:
    return scaled(entry.max_abs or 0.0, entry.scale or 0.0)


def _judged(entry: OutputParity, atol: float) -> float:
    """The error in units of what `atol` bounds; infinite where no bound lets it pass."""
    if entry.exact and not entry.passed:
        return math.inf
    if entry.tolerance is None or entry.tolerance <= allowance(atol, entry.scale or 0.0):
        return _scaled(entry)
    if not entry.passed and (entry.rounding or 0.0) > allowance(ROUNDING_CEILING, entry.scale or 0.0):
        return math.inf
    return atol * (entry.max_abs or 0.0) / entry.tolerance
