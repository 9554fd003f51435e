"""Scores of any task: what adds up over samples, and what a sum of it means; two models compared on the same samples.

Accuracy is right answers over samples, the mean intersection over union is sums of pixels per class, a character error
rate edits over characters: each is a function of per-sample numbers that add up. So one resampling of the samples gives
the interval of any of them, and both models are resampled alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from foundation.errors import ValidationError
from validators.gates import Measured
from validators.runners import Array, Runner
from validators.scores_lost import ScoreLost

Outputs = Mapping[str, Tensor]
RESAMPLES = 2000


@dataclass(frozen=True)
class Score:
    """One way to judge a model's outputs against targets.

    `statistics(outputs, target)`: per sample, numbers that add up over samples: (samples, k), finite.
    `total(sums)`: the score of sums of them, (..., k) -> (...). A score that is no function of sums (average precision
    ranks the boxes of all images) has `pooled` in its place: its `statistics` are one record per sample, of any kind,
    and `pooled(records, weights)` is the score of them, each counted as often as its weight says. `share`: it is a
    share, at most 1, so that what is lost is told in points; of any other score it is told in per cent of what the
    dense model has.
    """

    name: str
    statistics: Callable[[Outputs, Any], Any]
    total: Callable[[Array], Array] | None
    share: bool = True
    higher_is_better: bool = True
    floor: float | None = None
    """What a model scores that knows nothing of the sample, where that is known: R² of the mean is 0."""
    unit: str = ""
    """Of a score that is no share: how its values are written, "mm" say."""
    pooled: Callable[[Array, Array], float] | None = None
    resamples: int = RESAMPLES
    """How many draws of the samples its interval is read off; fewer where each takes long."""

    def words(self, value: float) -> str:
        """A value as people read it: per cent of a share, else the number with its unit."""
        return f"{value:.1%}" if self.share else f"{value:.4g}{f' {self.unit}' if self.unit else ''}"

    def of(self, statistics: Array) -> float:
        """The score of samples with these statistics, (samples, k)."""
        if self.pooled is not None:
            return self.pooled(statistics[:, 0], np.ones(len(statistics)))
        assert self.total is not None
        return float(self.total(statistics.sum(0)))

    def drawn(self, statistics: Array, weights: Array) -> Array:
        """The scores, (draws,), where each sample counts as often as `weights`, (draws, samples), says."""
        if self.pooled is not None:
            return np.array([self.pooled(statistics[:, 0], row) for row in weights])
        assert self.total is not None
        return self.total(weights @ statistics)

    def gathered(self, one: Array, other: Array) -> Array:
        """Statistics that `of` takes for the samples of both: a single row of sums, where they add up."""
        if self.pooled is not None:
            return np.concatenate([one, other])
        sums: Array = (one.sum(0) + other.sum(0))[None]
        return sums

    def lost(self, reference: float, value: float) -> float:
        """What is lost from `reference` to `value`, positive where it is worse: points, or per cent of `reference`."""
        worse = (reference - value) if self.higher_is_better else (value - reference)
        if self.share:
            return 100.0 * worse
        return (
            100.0 * worse / abs(reference) if reference else (0.0 if worse == 0 else float(np.copysign(np.inf, worse)))
        )


def per_sample(name: str, values: Callable[[Outputs, Any], Tensor], **more: Any) -> Score:
    """A score that is the mean of `values(outputs, target)`, one number per sample."""

    def statistics(outputs: Outputs, target: Any) -> Tensor:
        each = values(outputs, target).double()
        return torch.stack([each, torch.ones_like(each)], 1)

    return Score(name, statistics, ratio, **more)


def ratio(sums: Array) -> Array:
    """The first of two sums over the second, 0 where that is 0."""
    found: Array = sums[..., 0] / np.where(sums[..., 1] == 0, 1.0, sums[..., 1])
    return found


class ScoreReport(BaseModel):
    """One model's score on a set: the value, and the statistics of each sample, (samples, k), in order.

    `dealt`: the statistics where each sample is given its neighbour's outputs in the batch, if they were asked for.
    """

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    name: str
    value: float
    statistics: Array
    dealt: Array | None = None

    @property
    def samples(self) -> int:
        """How many there were."""
        return len(self.statistics)


def measured(score: Score, outputs: Outputs, target: Any, rows: int) -> Array:
    """The statistics of one batch, (rows, k) float64, or (rows, 1) records where the score is pooled.

    Raises ValidationError where the score gives something else.
    """
    found = score.statistics(outputs, target)
    if score.pooled is not None:
        if len(found) != rows:
            raise ValidationError(
                f"The score {score.name} gave {len(found)} records for {rows} samples.", "It must give one per sample."
            )
        records: Array = np.empty((rows, 1), object)
        for row, record in enumerate(found):  # one by one: numpy would take a record that is a sequence apart
            records[row, 0] = record
        return records
    if not isinstance(found, Tensor):
        found = torch.as_tensor(np.asarray(found))
    found = found.detach().double()
    if found.dim() == 1:
        found = found[:, None]
    if found.dim() != 2 or len(found) != rows:
        raise ValidationError(
            f"The score {score.name} gave an array of shape {tuple(found.shape)} for {rows} samples.",
            "It must give one row of numbers per sample.",
        )
    if not bool(found.isfinite().all()):
        raise ValidationError(
            f"The score {score.name} is NaN or infinite for sample {int((~found.isfinite()).any(1).nonzero()[0])} of a "
            "batch.",
            "Look at the model's outputs for it, and at the score.",
        )
    made: Array = found.numpy()
    return made


def run(
    runner: Runner, batches: Iterable[tuple[Mapping[str, Array], Any]], scores: Sequence[Score], *, deal: bool = False
) -> dict[str, ScoreReport]:
    """Score `runner` on batches of (inputs by name, target); `deal` asks for `ScoreReport.dealt` of the first score.

    Raises ValidationError where there are no samples.
    """
    gathered: dict[str, list[Array]] = {score.name: [] for score in scores}
    dealt: list[Array] = []
    for inputs, target in batches:
        rows = len(next(iter(inputs.values())))
        outputs = {name: torch.from_numpy(np.asarray(value)) for name, value in runner.infer(inputs).items()}
        for score in scores:
            gathered[score.name].append(measured(score, outputs, target, rows))
        if deal:
            other = {name: value.roll(1, 0) if value.dim() else value for name, value in outputs.items()}
            dealt.append(measured(scores[0], other, target, rows))
    if not all(gathered.values()):
        raise ValidationError("There are no samples to evaluate on.", "Give at least one batch.")
    found = {name: np.concatenate(parts) for name, parts in gathered.items()}
    return {
        score.name: ScoreReport(
            name=score.name,
            value=score.of(found[score.name]),
            statistics=found[score.name],
            dealt=np.concatenate(dealt) if deal and score is scores[0] else None,
        )
        for score in scores
    }


def chance_of_dealing(score: Score, report: ScoreReport, *, seed: int) -> float:
    """How likely the outputs would score so well if they had nothing to do with the targets, 0 to 1.

    Against the same outputs handed to the samples in another order, each batch by one place (`report.dealt`): a model
    that answers every sample alike scores the same, and says nothing. Against the score's `floor`, too, where it has
    one. From the paired bootstrap over samples, seeded.
    """
    assert report.dealt is not None, "run(..., deal=True) makes it"
    chance = one_sided(differences(score, report.statistics, report.dealt, seed))
    if score.floor is None:
        return chance
    draws = resampled(report.samples, seed, score.resamples)
    above = np.concatenate([score.drawn(report.statistics, weights) for weights in draws]) - score.floor
    return max(chance, one_sided(above if score.higher_is_better else -above))


def resampled(count: int, seed: int, resamples: int = RESAMPLES) -> Iterable[Array]:
    """How often each of `count` samples is drawn, in blocks of resamples, (block, count)."""
    rng = np.random.default_rng(seed)
    block = max(1, min(resamples, 4_000_000 // max(count, 1)))
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        yield rng.multinomial(count, np.full(count, 1 / count), rows)


def compared(
    score: Score, dense: ScoreReport, shipped: ScoreReport, *, seed: int, confidence: float = 0.95
) -> ScoreLost:
    """Compare two reports of one score on the same samples in the same order.

    Raises ValidationError where they differ in the number of samples.
    """
    if len(dense.statistics) != len(shipped.statistics):
        raise ValidationError("The two models were evaluated on different samples.", "Evaluate both on the same set.")
    drops = differences(score, dense.statistics, shipped.statistics, seed)
    low, high = np.quantile(drops, [(1 - confidence) / 2, (1 + confidence) / 2])
    value = score.lost(dense.value, shipped.value)
    return ScoreLost(
        name=score.name,
        dense=dense.value,
        shipped=shipped.value,
        samples=dense.samples,
        share=score.share,
        higher_is_better=score.higher_is_better,
        drop=Measured(value=value, low=min(value, float(low)), high=max(value, float(high))),
        p_value=two_sided(drops),
        unit=score.unit,
    )


@dataclass(frozen=True)
class Worse:
    """A sample that a second model does worse: its number, and the score of it alone by either model."""

    sample: int
    dense: float
    shipped: float


def worst(score: Score, dense: ScoreReport, shipped: ScoreReport, most: int) -> list[Worse]:
    """The samples that lost most of `score`, at most `most`, the largest loss first."""
    sign = 1.0 if score.higher_is_better else -1.0
    each = [
        Worse(row, score.of(dense.statistics[row : row + 1]), score.of(shipped.statistics[row : row + 1]))
        for row in range(dense.samples)
    ]
    lost = [one for one in each if sign * (one.dense - one.shipped) > 0]
    return sorted(lost, key=lambda one: sign * (one.shipped - one.dense))[:most]


def differences(score: Score, dense: Array, shipped: Array, seed: int) -> Array:
    """What is lost from `dense` to `shipped`, (resamples,), each drawn for both alike."""
    found: list[Array] = []
    for weights in resampled(len(dense), seed, score.resamples):
        left, right = score.drawn(dense, weights), score.drawn(shipped, weights)
        worse = (left - right) if score.higher_is_better else (right - left)
        with np.errstate(divide="ignore", invalid="ignore"):
            found.append(100.0 * worse if score.share else np.where(worse == 0, 0.0, 100.0 * worse / np.abs(left)))
    drops: Array = np.nan_to_num(np.concatenate(found), nan=0.0, posinf=1e9, neginf=-1e9)
    return drops


def one_sided(drops: Array) -> float:
    """How often the resamples say that nothing was lost: small where something was."""
    return float((1 + int((drops <= 0).sum())) / (1 + len(drops)))


def two_sided(drops: Array) -> float:
    """Twice the smaller tail of the resampled difference around 0; 1 where nothing ever differs."""
    if not drops.any():
        return 1.0
    return min(1.0, 2 * min(one_sided(drops), one_sided(-drops)))
