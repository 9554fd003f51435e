"""How often a model is right, and whether another is right less often."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy.stats import binomtest

from validators.errors import ValidationError
from validators.gates import Measured
from validators.runners import Array, Runner


class ClassAccuracy(BaseModel):
    """One class: how many samples carry its label, and how many of those were predicted so."""

    model_config = ConfigDict(frozen=True)

    samples: int
    correct: int


class AccuracyReport(BaseModel):
    """A classifier on a labelled set. `top1` is the share of right predictions, 0 to 1.

    `predictions` and `labels` hold one class index per sample, in the order of the set; a prediction from a row of
    logits with a NaN is -1, which is never right.
    """

    model_config = ConfigDict(frozen=True)

    runner: str
    samples: int
    top1: float
    per_class: dict[int, ClassAccuracy]
    predictions: tuple[int, ...]
    labels: tuple[int, ...]


class Flip(BaseModel):
    """A sample that exactly one of two models got right: its index in the set, its label, and both predictions."""

    model_config = ConfigDict(frozen=True)

    sample: int
    label: int
    dense: int
    shipped: int


class AccuracyComparison(BaseModel):
    """Two classifiers on the same samples. `drop` is dense minus shipped in percentage points, with its interval.

    `p_value` is McNemar's exact two-sided test: how likely a split of the flips at least this uneven is when both
    models are equally good. `lost` counts samples that only the dense model got right, `gained` the opposite.
    """

    model_config = ConfigDict(frozen=True)

    dense: float
    shipped: float
    samples: int
    drop: Measured
    confidence: float
    p_value: float
    lost: int
    gained: int
    flipped: tuple[Flip, ...]


def evaluate(runner: Runner, batches: Iterable[tuple[Any, Any]], *, output: str | None = None) -> AccuracyReport:
    """Run a classifier over `batches` of (x, y): inputs, batch first, and class indices (N,).

    `x` is an array or CPU tensor for the model's only input, or a mapping of input names to such. The logits are the
    output called `output`, or the first; (N, classes). Raises ValidationError when there are no samples, shapes do not
    fit, or a label is not a class of the model.
    """
    predictions: list[Array] = []
    labels: list[Array] = []
    for x, y in batches:
        label = np.asarray(y).astype(np.int64, casting="same_kind")
        outputs = runner.infer(_feed(runner, x))
        if output is not None and output not in outputs:
            raise ValidationError(f"{runner.name} has no output {output}; it has {', '.join(outputs)}.")
        logits = outputs[output] if output is not None else next(iter(outputs.values()))
        if logits.ndim != 2 or label.shape != logits.shape[:1]:
            raise ValidationError(
                f"Logits of shape {logits.shape} do not fit labels of shape {label.shape}.",
                "A classifier gives (N, classes) for labels (N,).",
            )
        if label.size and not (label.min() >= 0 and label.max() < logits.shape[1]):
            raise ValidationError(
                f"Labels {label.min()} to {label.max()}, but the model has {logits.shape[1]} classes."
            )
        predictions.append(np.where(np.isnan(logits).any(1), -1, logits.argmax(1)))
        labels.append(label)
    predicted = np.concatenate(predictions or [np.empty(0, np.int64)])
    truth = np.concatenate(labels or [np.empty(0, np.int64)])
    if not truth.size:
        raise ValidationError("There are no samples to evaluate on.", "Give at least one batch.")
    right = predicted == truth
    return AccuracyReport(
        runner=runner.name,
        samples=int(truth.size),
        top1=float(right.mean()),
        per_class={
            int(c): ClassAccuracy(samples=int((truth == c).sum()), correct=int(right[truth == c].sum()))
            for c in np.unique(truth)
        },
        predictions=tuple(predicted.tolist()),
        labels=tuple(truth.tolist()),
    )


def compare_accuracy(
    dense: AccuracyReport, shipped: AccuracyReport, *, seed: int, confidence: float = 0.95, resamples: int = 10_000
) -> AccuracyComparison:
    """Compare two reports on the same samples in the same order.

    The interval of the drop is the percentile bootstrap over samples (Efron 1979). A resample of the set is a
    multinomial draw of how many samples were lost, gained and kept, so it is drawn as that. It has no width when no
    sample flipped: the set then shows no difference, however small it is.

    Raises ValidationError when the labels differ.
    """
    if dense.labels != shipped.labels:
        raise ValidationError("The two models were evaluated on different samples.", "Evaluate both on the same set.")
    truth = np.array(dense.labels)
    left, right = np.array(dense.predictions), np.array(shipped.predictions)
    only_dense = (left == truth) & (right != truth)
    only_shipped = (left != truth) & (right == truth)
    lost, gained, count = int(only_dense.sum()), int(only_shipped.sum()), len(truth)
    shares = np.array([lost, gained, count - lost - gained]) / count
    draws = np.random.default_rng(seed).multinomial(count, shares, resamples)
    drops = 100.0 * (draws[:, 0] - draws[:, 1]) / count
    low, high = np.quantile(drops, [(1 - confidence) / 2, (1 + confidence) / 2])
    return AccuracyComparison(
        dense=dense.top1,
        shipped=shipped.top1,
        samples=count,
        drop=Measured(value=100.0 * (lost - gained) / count, low=float(low), high=float(high)),
        confidence=confidence,
        p_value=float(binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0,
        lost=lost,
        gained=gained,
        flipped=tuple(
            Flip(sample=int(i), label=int(truth[i]), dense=int(left[i]), shipped=int(right[i]))
            for i in np.flatnonzero(only_dense | only_shipped)
        ),
    )


def _feed(runner: Runner, x: Any) -> dict[str, Array]:
    if isinstance(x, Mapping):
        return {name: np.asarray(array) for name, array in x.items()}
    if len(runner.inputs) != 1:
        names = ", ".join(spec.name for spec in runner.inputs)
        raise ValidationError(f"{runner.name} takes {names}.", "Give each batch's x as a mapping of those names.")
    return {runner.inputs[0].name: np.asarray(x)}
