"""Rungs of recovery, each climbed only while it can help and kept only where it does, by a paired test.

The samples that decide (the calibration part) are none of those that a rung learns from (the training part).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor, nn

from foundation.errors import ModelError
from pipeline.artifacts.eager import Rung
from pipeline.data.parts import Data, Inputs, evenly
from pipeline.models.calling import named
from pipeline.tasks.evaluation import evaluate
from pipeline.tasks.task import Task
from pipeline.training import masks as masking
from validators.runners import Array
from validators.scores import differences, one_sided

CERTAIN = 0.05
"""A rung is kept where chance alone would make it look as good less often than this."""
NEAR = 0.005
"""Share of the samples: who has lost no more than this, and not certainly more than nothing, needs no training."""
FAR = 0.1
"""Share of the samples: who has lost more than this has more to gain from training than a careless epoch can lose."""
COMPARED = 64
"""Samples that a fit has learnt from, and others, on which it is compared how far it is from the dense model."""
LACKING = 2.0
"""How many times as far it may be on others; beyond that it lacks samples. Half of a small net's channels on digits: 16
times as far with 24 of them, 3.8 with 100, 1.2 with 1,000. An EfficientNet-lite0 at 0.7 of its operations with 332
photographs: 3.3, and other photographs bring more than any other way to fit (docs/comparison.md).
"""
FAINT = 1e-3
"""How far a sample may be from the dense model, in nats or parts of the outputs' square, before it is worth a word."""


@dataclass(frozen=True)
class Standing:
    """How a model does on the calibration part, sample by sample.

    `task` says what was measured; `statistics` (samples, k) of its score, `loss` (samples,).
    """

    task: Task
    statistics: Array
    loss: Tensor

    @property
    def score(self) -> float:
        """The task's score, a share in 0..1 or in its own unit."""
        return self.task.score.of(self.statistics)

    @property
    def words(self) -> str:
        """The score as people read it."""
        return self.task.score.words(self.score)


def standing(model: nn.Module, data: Data, task: Task) -> Standing:
    """Run `model`, in eval mode, over the calibration part."""
    found = evaluate(task, model, data, "calibration")
    return Standing(task, found.statistics, found.losses)


def worse(new: Standing, old: Standing) -> float:
    """Chance that `new` would look so much worse than `old` if both were equally good, one side.

    Of answers that are right or wrong by McNemar's exact test, of any other score by the paired bootstrap over samples.
    """
    if new.task.classes:
        lost, won = _flips(new, old)
        return float(stats.binomtest(lost, lost + won, 0.5, alternative="greater").pvalue) if lost + won else 1.0
    return one_sided(differences(new.task.score, old.statistics, new.statistics, seed=0))


def _flips(new: Standing, old: Standing) -> tuple[int, int]:
    """How many samples only `old` gets right, and how many only `new`."""
    after, before = new.statistics[:, 0] > 0.5, old.statistics[:, 0] > 0.5
    return int((before & ~after).sum()), int((after & ~before).sum())


def lower(new: Standing, old: Standing) -> float:
    """Chance of so much lower a mean loss if both had the same (paired t-test, one side); 1 where it is not finite."""
    change = new.loss - old.loss
    if not bool(change.isfinite().all()) or float(change.std()) == 0.0:
        return 1.0 if not float(change.mean()) < 0.0 else 0.0
    return float(stats.ttest_1samp(change.numpy(), 0.0, alternative="less").pvalue)


def helps(new: Standing, old: Standing) -> tuple[bool, str]:
    """Whether a rung is kept, and the sentence that says why."""
    figures = f"{old.words} -> {new.words}"
    if not bool(new.loss.isfinite().all()):
        return False, f"{figures}: it gives NaN or infinity"
    fewer, better, more = worse(new, old), lower(new, old), worse(old, new)
    right = "right" if new.task.classes else ""
    if fewer < CERTAIN:
        return False, f"{figures}: certainly {'fewer right' if right else 'worse'} (p = {fewer:.2g})"
    if better < CERTAIN:
        unit = " nats" if right else ""
        return True, f"{figures}, and a lower loss ({float(old.loss.mean()):.3g} -> {float(new.loss.mean()):.3g}{unit})"
    if more < CERTAIN:
        return True, f"{figures}: certainly {'more right' if right else 'better'} (p = {more:.2g})"
    return False, f"{figures}: no more than chance (p = {min(better, more):.2g})"


def near(new: Standing, dense: Standing) -> bool:
    """Whether the score of `new` is within noise of the dense model's, so that training would be spent on nothing."""
    if new.task.taught:  # the dense model is its own measure: nothing but it is as near
        return dense.task.score.lost(dense.score, new.score) <= 100 * NEAR
    return dense.task.score.lost(dense.score, new.score) <= 100 * NEAR and worse(new, dense) >= CERTAIN


def level(new: Standing, dense: Standing) -> bool:
    """Whether `new` is `near` and its loss is not certainly higher either, so that nothing more can be shown to help:
    a loss tells of samples that are still right, and less surely so, of which others will be wrong.
    """
    return near(new, dense) and lower(dense, new) >= CERTAIN


def may_have_lost(new: Standing, dense: Standing) -> float:
    """Points that `new` may have lost on all samples there are, by those that were looked at: a bound that holds 19
    times in 20, from how many only one of both gets right (Agresti & Min 2005, Statistics in Medicine 24: half a sample
    more in each cell). NaN for answers that are not right or wrong.
    """
    if not new.task.classes:
        return float("nan")
    lost, won = _flips(new, dense)
    count = len(new.statistics) + 2
    change = (lost - won) / count
    error = math.sqrt(((lost + won + 1) / count - change**2) / count)
    return 100 * (change + float(stats.norm.ppf(1 - CERTAIN)) * error)


def within_noise(new: Standing, dense: Standing) -> str:
    """What is to be said of a model that is `near`: also what so few samples do not tell."""
    known, most = "within noise of the dense model on the calibration part", may_have_lost(new, dense)
    if most > 100 * NEAR:
        return f"{known}, whose {len(new.statistics)} samples do not rule out a loss of {most:.2g} points"
    return known


def far(new: Standing, dense: Standing) -> bool:
    """Whether `new` has lost so much that training need not be gentle with what it has."""
    return dense.task.score.lost(dense.score, new.score) > 100 * FAR


def few_samples(model: nn.Module, dense: nn.Module, task: Task, learnt: Inputs, others: Inputs) -> str:
    """What to say of a fit to `learnt` that comes much nearer to the dense model on these than on `others`; "" where it
    does not, or where the task cannot tell how far outputs are apart, such as boxes of which one model finds more. Both
    models in eval mode, `others` inputs that nothing has learnt from. Of `learnt` at most `COMPARED` are looked at.
    """
    some = evenly(len(learnt[0]), COMPARED)
    try:
        near, off = (_divergence(model, dense, task, inputs) for inputs in (tuple(x[some] for x in learnt), others))
    except ModelError:
        return ""
    if not max(LACKING * near, FAINT) < off:
        return ""
    times = f"{off / near:.2g}" if near > off / 100 else "over 100"
    return f"{times} times as far from the dense model on samples that it did not learn from: more would help"


def _divergence(model: nn.Module, dense: nn.Module, task: Task, inputs: Inputs) -> float:
    """How far a model is from the dense one by the task, mean over samples."""
    with torch.no_grad():
        each = [
            task.divergence(named(model(*batch)), named(dense(*batch)), 1.0)
            for batch in zip(*(torch.split(one, task.batch) for one in inputs), strict=True)
        ]
    return float(torch.cat(each).mean())


def climb(
    name: str, model: nn.Module, data: Data, task: Task, now: Standing, rung: Callable[[], str]
) -> tuple[Rung, Standing]:
    """Change `model` by `rung` (which returns what it did, in words) and change it back where that does not help."""
    before = {key: value.detach().clone() for key, value in masking.originals(model).items()}
    began = time.perf_counter()
    did = rung()
    after = standing(model, data, task)
    kept, why = helps(after, now)
    if not kept:
        masking.load_originals(model, before)
    words = f"{did}; {why}" if did else why
    made = Rung(name=name, score=after.score, seconds=round(time.perf_counter() - began, 3), kept=kept, why=words)
    return made, after if kept else now


def skipped(name: str, why: str) -> Rung:
    """A rung that was not climbed."""
    return Rung(name=name, score=None, seconds=0.0, kept=False, why=why)
