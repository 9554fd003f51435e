"""Rungs of recovery, each climbed only while it can help and kept only where it does, by a paired test.

The samples that decide (the calibration part) are none of those that a rung learns from (the training part).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from pipeline.artifacts.eager import Rung
from pipeline.data.parts import Data
from pipeline.tasks import classification
from pipeline.training import masks as masking

CERTAIN = 0.05
"""A rung is kept where chance alone would make it look as good less often than this."""
NEAR = 0.005
"""Share of the samples: who has lost no more than this, and not certainly more than nothing, needs no training."""
BATCH = 256


@dataclass(frozen=True)
class Standing:
    """How a model does on the calibration part, sample by sample: `correct` (bool) and `loss` (cross-entropy, nats)."""

    correct: Tensor
    loss: Tensor

    @property
    def accuracy(self) -> float:
        """Share in 0..1."""
        return float(self.correct.double().mean())


def standing(model: nn.Module, data: Data) -> Standing:
    """Run `model`, in eval mode, over the calibration part."""
    was_training = model.training
    model.eval()
    correct, lost = [], []
    with torch.no_grad():
        for images, labels in data.batches("calibration", BATCH):
            logits = classification.logits_of(model(images)).float()
            correct.append(logits.argmax(1) == labels)
            lost.append(F.cross_entropy(logits, labels, reduction="none"))
    model.train(was_training)
    return Standing(torch.cat(correct), torch.cat(lost).double())


def worse(new: Standing, old: Standing) -> float:
    """Chance of so many more losses than wins if both were right equally often (McNemar's exact test, one side)."""
    lost, won = int((old.correct & ~new.correct).sum()), int((new.correct & ~old.correct).sum())
    return float(stats.binomtest(lost, lost + won, 0.5, alternative="greater").pvalue) if lost + won else 1.0


def lower(new: Standing, old: Standing) -> float:
    """Chance of so much lower a mean loss if both had the same (paired t-test, one side); 1 where it is not finite."""
    change = new.loss - old.loss
    if not bool(change.isfinite().all()) or float(change.std()) == 0.0:
        return 1.0 if not float(change.mean()) < 0.0 else 0.0
    return float(stats.ttest_1samp(change.numpy(), 0.0, alternative="less").pvalue)


def helps(new: Standing, old: Standing) -> tuple[bool, str]:
    """Whether a rung is kept, and the sentence that says why."""
    fewer, better = worse(new, old), lower(new, old)
    figures = f"{100 * old.accuracy:.1f} % -> {100 * new.accuracy:.1f} %"
    if not bool(new.loss.isfinite().all()):
        return False, f"{figures}: it gives NaN or infinity"
    if fewer < CERTAIN:
        return False, f"{figures}: certainly fewer right (p = {fewer:.2g})"
    if better < CERTAIN:
        return True, f"{figures}, and a lower loss ({float(old.loss.mean()):.3g} -> {float(new.loss.mean()):.3g} nats)"
    if worse(old, new) < CERTAIN:
        return True, f"{figures}: certainly more right (p = {worse(old, new):.2g})"
    return False, f"{figures}: no more than chance (p = {min(better, worse(old, new)):.2g})"


def near(new: Standing, dense: Standing) -> bool:
    """Whether `new` is within noise of the dense model, so that nothing more can be shown to help."""
    return dense.accuracy - new.accuracy <= NEAR and worse(new, dense) >= CERTAIN


def climb(name: str, model: nn.Module, data: Data, now: Standing, rung: Callable[[], str]) -> tuple[Rung, Standing]:
    """Change `model` by `rung` (which returns what it did, in words) and change it back where that does not help."""
    before = {key: value.detach().clone() for key, value in masking.originals(model).items()}
    began = time.perf_counter()
    did = rung()
    after = standing(model, data)
    kept, why = helps(after, now)
    if not kept:
        masking.load_originals(model, before)
    words = f"{did}; {why}" if did else why
    made = Rung(name=name, accuracy=after.accuracy, seconds=round(time.perf_counter() - began, 3), kept=kept, why=words)
    return made, after if kept else now


def skipped(name: str, why: str) -> Rung:
    """A rung that was not climbed."""
    return Rung(name=name, accuracy=None, seconds=0.0, kept=False, why=why)
