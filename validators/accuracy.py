"""How often a model is right, and whether another is right less often."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy.special import softmax

from foundation.errors import ValidationError
from validators.gates import Measured
from validators.runners import Array, Runner

# One score per sample, higher is better: (output (N, ...), labels (N,)) -> (N,).
Metric = Callable[[Array, Array], Array]


class ClassAccuracy(BaseModel):
    """One class: how many samples carry its label, and how many of those were predicted so."""

    model_config = ConfigDict(frozen=True)

    samples: int
    correct: int


class AccuracyReport(BaseModel):
    """A classifier on a labelled set. `top1` is the share of right predictions, 0 to 1.

    `predictions` and `labels` hold one class index per sample, in the order of the set; a prediction from a row of
    logits with a NaN is -1, which is never right. `confidences` are the softmax of the predictions' logits, 0 to 1, and
    `scores` what each further metric gave per sample.
    """

    model_config = ConfigDict(frozen=True)

    runner: str
    samples: int
    top1: float
    per_class: dict[int, ClassAccuracy]
    predictions: tuple[int, ...]
    labels: tuple[int, ...]
    confidences: tuple[float, ...] = ()
    scores: dict[str, tuple[float, ...]] = {}


class Flip(BaseModel):
    """A sample that exactly one of two models got right: its index in the set, label, both predictions, how sure."""

    model_config = ConfigDict(frozen=True)

    sample: int
    label: int
    dense: int
    shipped: int
    dense_confidence: float | None = None
    shipped_confidence: float | None = None


class ScoreComparison(BaseModel):
    """A further metric of two models on the same samples: means, and dense minus shipped with its interval."""

    model_config = ConfigDict(frozen=True)

    dense: float
    shipped: float
    drop: Measured


class ClassComparison(BaseModel):
    """One class: its samples, and how many of them each model got right."""

    model_config = ConfigDict(frozen=True)

    samples: int
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
    per_class: dict[int, ClassComparison] = {}
    scores: dict[str, ScoreComparison] = {}


class Similarity(BaseModel):
    """How alike two models' outputs are, sample by sample: means and smallest values, each -1 to 1."""

    model_config = ConfigDict(frozen=True)

    samples: int
    cosine: float
    cosine_min: float
    spearman: float
    spearman_min: float


def evaluate(
    runner: Runner,
    batches: Iterable[tuple[Any, Any]],
    *,
    output: str | None = None,
    metrics: Mapping[str, Metric] | None = None,
) -> AccuracyReport:
    """Run a classifier over `batches` of (x, y): inputs, batch first, and class indices (N,).

    `x` is an array or CPU tensor for the model's only input, or a mapping of input names to such. The logits are the
    output called `output`, or the first; (N, classes). Each of `metrics` scores every sample besides.
    Raises ValidationError when there are no samples, shapes do not
    fit, a label is not a class of the model, or a metric does not give one number per sample.
    """
    predictions: list[Array] = []
    labels: list[Array] = []
    confidences: list[Array] = []
    scores: dict[str, list[Array]] = {name: [] for name in metrics or {}}
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
        confidences.append(softmax(logits.astype(np.float64), axis=1).max(1))
        for name, metric in (metrics or {}).items():
            scores[name].append(_score(name, metric, logits, label))
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
        confidences=tuple(np.concatenate(confidences).tolist()),
        scores={name: tuple(np.concatenate(parts).tolist()) for name, parts in scores.items()},
    )


def top_k(k: int) -> Metric:
    """Whether the label is among the `k` largest logits, the first of equal ones counting as larger. A row with a NaN
    never is.
    """

    def score(logits: Array, labels: Array) -> Array:
        own = logits[np.arange(len(labels)), labels][:, None]
        before = np.arange(logits.shape[1]) < labels[:, None]
        hit: Array = (((logits > own) | ((logits == own) & before)).sum(1) < k) & ~np.isnan(logits).any(1)
        return hit.astype(np.float64)

    return score


def similarity(reference: Runner, candidate: Runner, batches: Iterable[tuple[Any, Any]]) -> Similarity:
    """Compare the first outputs (N, ...) of two models, for embeddings: cosine and Spearman's rank correlation.

    Raises ValidationError when there are no samples, shapes differ, or an output is not finite or constant.
    """
    from scipy.stats import rankdata  # a second to import, seldom needed

    cosines: list[Array] = []
    ranks: list[Array] = []
    for rows in _rows(reference, candidate, batches):
        cosines.append(_cosine(*rows))
        ranked = [rankdata(row, axis=1) for row in rows]
        ranks.append(_cosine(*(row - row.mean(1, keepdims=True) for row in ranked)))
    if not cosines or not sum(map(len, cosines)):
        raise ValidationError("There are no samples to compare on.", "Give at least one batch.")
    cosine, spearman = np.concatenate(cosines), np.concatenate(ranks)
    return Similarity(
        samples=len(cosine),
        cosine=float(cosine.mean()),
        cosine_min=float(cosine.min()),
        spearman=float(spearman.mean()),
        spearman_min=float(spearman.min()),
    )


def cosine(
    reference: Runner, candidate: Runner, batches: Iterable[tuple[Any, Any]], *, output: str | None = None
) -> float:
    """Mean cosine, -1 to 1, of the outputs (N, ...) called `output`, or the first, of two models, sample by sample.

    Raises ValidationError when there are no samples, shapes differ, or an output is not finite or all zero.
    """
    found = [_cosine(*rows) for rows in _rows(reference, candidate, batches, output)]
    if not sum(map(len, found)):
        raise ValidationError("There are no samples to compare on.", "Give at least one batch.")
    return float(np.concatenate(found).mean())


def _rows(
    reference: Runner, candidate: Runner, batches: Iterable[tuple[Any, Any]], output: str | None = None
) -> Iterator[tuple[Array, Array]]:
    """Both models' outputs to each batch, (N, numbers) float64. Raises ValidationError as `similarity` does."""
    for x, _ in batches:
        left, right = (_output(runner, x, output) for runner in (reference, candidate))
        if left.shape != right.shape or left.ndim < 2:
            raise ValidationError(f"Outputs of shape {left.shape} and {right.shape} cannot be compared row by row.")
        if not (np.isfinite(left).all() and np.isfinite(right).all()):
            raise ValidationError("An output holds NaN or infinity.", "Look at the parity report.")
        yield (
            left.reshape(len(left), -1).astype(np.float64),
            right.reshape(len(right), -1).astype(np.float64),
        )


def first_output(runner: Runner, x: Any) -> Array:
    """The first output of a model for one batch, given as in `evaluate`."""
    return next(iter(runner.infer(_feed(runner, x)).values()))


def _output(runner: Runner, x: Any, name: str | None) -> Array:
    return first_output(runner, x) if name is None else runner.infer(_feed(runner, x))[name]


def _cosine(left: Array, right: Array) -> Array:
    """Cosine of each pair of rows."""
    scale = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    if not scale.all():
        raise ValidationError("An output is constant, so it has no direction to compare.")
    result: Array = (left * right).sum(1) / scale
    return result


def _score(name: str, metric: Metric, logits: Array, labels: Array) -> Array:
    # Copies: a metric that writes into what it is given would change the accuracy that is measured beside it.
    found = np.asarray(metric(logits.copy(), labels.copy()), dtype=np.float64)
    if found.shape != labels.shape:
        raise ValidationError(
            f"The metric {name} gave an array of shape {found.shape} for {len(labels)} samples.",
            "It must return one number per sample.",
        )
    return found


def compare_accuracy(
    dense: AccuracyReport, shipped: AccuracyReport, *, seed: int, confidence: float = 0.95, resamples: int = 10_000
) -> AccuracyComparison:
    """Compare two reports on the same samples in the same order.

    The interval of the drop is the percentile bootstrap over samples (Efron 1979). A resample of the set is a
    multinomial draw of how many samples were lost, gained and kept, so it is drawn as that. It has no width when no
    sample flipped: the set then shows no difference, however small it is.

    Raises ValidationError when the labels differ.
    """
    from scipy.stats import binomtest  # a second to import

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
            Flip(
                sample=int(i),
                label=int(truth[i]),
                dense=int(left[i]),
                shipped=int(right[i]),
                dense_confidence=dense.confidences[i] if dense.confidences else None,
                shipped_confidence=shipped.confidences[i] if shipped.confidences else None,
            )
            for i in np.flatnonzero(only_dense | only_shipped)
        ),
        per_class={
            label: ClassComparison(
                samples=dense.per_class[label].samples,
                dense=dense.per_class[label].correct,
                shipped=shipped.per_class[label].correct,
            )
            for label in sorted(dense.per_class.keys() & shipped.per_class.keys())
        },
        scores={
            name: _compare_scores(np.array(dense.scores[name]), np.array(shipped.scores[name]), seed, confidence)
            for name in dense.scores.keys() & shipped.scores.keys()
        },
    )


def agreement(dense: AccuracyReport, shipped: AccuracyReport, *, confidence: float = 0.95) -> Measured:
    """Share of the samples, 0 to 1, that both answer alike, with Wilson's interval (1927). Raises ValidationError where
    the samples differ.
    """
    from scipy.stats import binomtest

    if dense.labels != shipped.labels:
        raise ValidationError("The two models were evaluated on different samples.", "Evaluate both on the same set.")
    same = np.array(dense.predictions) == np.array(shipped.predictions)
    found = binomtest(int(same.sum()), len(same)).proportion_ci(confidence, method="wilson")
    return Measured(value=float(same.mean()), low=float(found.low), high=float(found.high))


def chance_of_guessing(report: AccuracyReport) -> float:
    """How likely so many right answers would be if the answers had nothing to do with the labels, 0 to 1.

    Against the same answers handed out to the samples at random: their number has mean and variance of Hoeffding's
    combinatorial central limit theorem (1951), and is taken as normal. Answers or labels that are all the same say
    nothing: 1. Other than a comparison with the commonest class, this is fair to sets of which most are one class.
    """
    from scipy.stats import norm

    labels, predictions = np.array(report.labels), np.array(report.predictions)
    classes = np.unique(np.concatenate([labels, predictions]))
    called, true = ((values[None] == classes[:, None]).mean(1) for values in (predictions, labels))
    expected = float((called * true).sum())
    apart = np.eye(len(classes)) - true[:, None] - called[None] + expected  # rows: called so, columns: labelled so
    count = len(labels)
    variance = count**2 / max(1, count - 1) * float((called[:, None] * true[None] * apart**2).sum())
    if variance < 1e-9:
        return 1.0
    right = int((labels == predictions).sum())
    return float(norm.sf((right - 0.5 - count * expected) / variance**0.5))


def _compare_scores(
    dense: Array, shipped: Array, seed: int, confidence: float, resamples: int = 2000
) -> ScoreComparison:
    """Means of two models' scores per sample, and the paired percentile bootstrap of their difference."""
    lost = dense - shipped
    rng = np.random.default_rng(seed)
    means = np.array([lost[rng.integers(0, len(lost), len(lost))].mean() for _ in range(resamples)])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    value = float(lost.mean())
    return ScoreComparison(
        dense=float(dense.mean()),
        shipped=float(shipped.mean()),
        drop=Measured(value=value, low=min(value, float(low)), high=max(value, float(high))),
    )


def _feed(runner: Runner, x: Any) -> dict[str, Array]:
    if isinstance(x, Mapping):
        return {name: np.asarray(array) for name, array in x.items()}
    if len(runner.inputs) != 1:
        names = ", ".join(spec.name for spec in runner.inputs)
        raise ValidationError(f"{runner.name} takes {names}.", "Give each batch's x as a mapping of those names.")
    return {runner.inputs[0].name: np.asarray(x)}
