import numpy as np
import pytest
from scipy import stats

from validators import AccuracyReport, ValidationError, compare_accuracy, evaluate, similarity, top_k
from validators.accuracy import agreement, chance_of_guessing

SHIFT = np.array([0, 0, 1], np.float32)


def onehot_runner(function_runner, wrong=(), name="model"):
    """Predicts the class that the input's first feature holds, except class 0 for the sample numbers in `wrong`."""

    def infer(x):
        logits = np.zeros((len(x), 4), np.float32)
        logits[np.arange(len(x)), x[:, 0].astype(int)] = 1
        for row, sample in enumerate(x[:, 1].astype(int)):
            if sample in wrong:
                logits[row] = [9, 0, 0, 0]
        return logits

    return function_runner(infer, name)


@pytest.fixture
def samples():
    """12 samples of classes 1, 2, 3 in turn, in batches of 5."""
    y = np.arange(12) % 3 + 1
    x = np.stack([y, np.arange(12), np.zeros(12)], 1).astype(np.float32)
    return [(x[i : i + 5], y[i : i + 5]) for i in range(0, 12, 5)]


def test_accuracy_is_counted_per_class_over_uneven_batches(function_runner, samples):
    report = evaluate(onehot_runner(function_runner, wrong=(0, 3, 11)), samples)
    assert (report.samples, report.top1) == (12, 0.75)
    assert {c: (n.samples, n.correct) for c, n in report.per_class.items()} == {1: (4, 2), 2: (4, 4), 3: (4, 3)}
    assert report.predictions[:4] == (0, 2, 3, 0)
    assert AccuracyReport.model_validate_json(report.model_dump_json()) == report


def test_nan_logits_are_never_right(function_runner):
    x = np.zeros((2, 3), np.float32)
    report = evaluate(function_runner(lambda x: np.full((len(x), 2), np.nan, np.float32)), [(x, np.array([0, 0]))])
    assert (report.top1, report.predictions) == (0.0, (-1, -1))


def test_what_cannot_be_evaluated_is_refused(function_runner, samples):
    runner = onehot_runner(function_runner)
    x, y = samples[0]
    with pytest.raises(ValidationError, match="no samples"):
        evaluate(runner, [])
    with pytest.raises(ValidationError, match="Labels 1 to 9, but the model has 4 classes"):
        evaluate(runner, [(x, np.where(y == 3, 9, y))])
    with pytest.raises(ValidationError, match="do not fit labels"):
        evaluate(runner, [(x, y[:-1])])
    with pytest.raises(ValidationError, match="has no output logits"):
        evaluate(runner, samples, output="logits")


def test_a_drop_counts_lost_minus_gained_and_names_the_flipped_samples(function_runner, samples):
    dense = evaluate(onehot_runner(function_runner, wrong=(0,)), samples)
    shipped = evaluate(onehot_runner(function_runner, wrong=(4, 7, 8)), samples)
    result = compare_accuracy(dense, shipped, seed=0)
    assert (result.lost, result.gained) == (3, 1)
    assert result.drop.value == pytest.approx(100 * 2 / 12)
    assert [flip.sample for flip in result.flipped] == [0, 4, 7, 8]
    assert (result.flipped[1].label, result.flipped[1].dense, result.flipped[1].shipped) == (2, 2, 0)
    assert result.p_value == pytest.approx(stats.binomtest(3, 4).pvalue)
    assert result.drop.low < result.drop.value < result.drop.high


def test_the_interval_is_that_of_a_bootstrap_over_samples():
    n, lost, gained = 400, 30, 10
    labels = (1,) * n
    base = {"runner": "r", "samples": n, "top1": 0.0, "per_class": {}, "labels": labels}
    dense = AccuracyReport(**base, predictions=(1,) * lost + (0,) * gained + (1,) * (n - lost - gained))
    shipped = AccuracyReport(**base, predictions=(0,) * lost + (1,) * gained + (1,) * (n - lost - gained))
    drop = compare_accuracy(dense, shipped, seed=0).drop
    difference = np.array([1] * lost + [-1] * gained + [0] * (n - lost - gained))
    wanted = stats.bootstrap((difference,), np.mean, method="percentile", n_resamples=9999, rng=0)
    low, high = wanted.confidence_interval
    assert drop.low == pytest.approx(100 * low, abs=0.3)
    assert drop.high == pytest.approx(100 * high, abs=0.3)


def test_equal_models_have_no_drop(function_runner, samples):
    report = evaluate(onehot_runner(function_runner), samples)
    result = compare_accuracy(report, report, seed=0)
    assert (result.drop.value, result.drop.low, result.drop.high, result.p_value) == (0, 0, 0, 1)


def test_different_samples_are_not_compared(function_runner, samples):
    runner = onehot_runner(function_runner)
    with pytest.raises(ValidationError, match="different samples"):
        compare_accuracy(evaluate(runner, samples), evaluate(runner, samples[::-1]), seed=0)


def test_top_k_counts_the_label_among_the_largest_and_never_a_nan():
    logits = np.array([[3, 2, 1, 0], [0, 1, 2, 3], [np.nan, 1, 2, 3]], np.float32)
    labels = np.array([1, 1, 3])
    assert top_k(1)(logits, labels).tolist() == [0, 0, 0]
    assert top_k(2)(logits, labels).tolist() == [1, 0, 0]
    assert top_k(3)(logits, labels).tolist() == [1, 1, 0]


def test_top_k_of_equal_logits_is_that_of_the_first_classes_and_agrees_with_the_largest():
    labels = np.array([0, 4, 5, 999])
    logits = np.zeros((4, 1000), np.float32)
    assert top_k(5)(logits, labels).tolist() == [1, 1, 0, 0]
    assert top_k(1)(logits, labels).tolist() == (logits.argmax(1) == labels).astype(float).tolist()


def test_further_metrics_are_scored_per_sample_and_compared_in_pairs(function_runner, samples):
    metrics = {"double": lambda logits, labels: 2.0 * (logits.argmax(1) == labels)}
    dense = evaluate(onehot_runner(function_runner), samples, metrics=metrics)
    shipped = evaluate(onehot_runner(function_runner, wrong=(0, 1, 2)), samples, metrics=metrics)
    result = compare_accuracy(dense, shipped, seed=0).scores["double"]
    assert (result.dense, result.shipped, result.drop.value) == (2.0, 1.5, 0.5)
    assert 0 <= result.drop.low < 0.5 < result.drop.high
    with pytest.raises(ValidationError, match="one number per sample"):
        evaluate(onehot_runner(function_runner), samples, metrics={"mean": lambda logits, labels: logits.mean()})


def test_flips_carry_confidences_and_classes_are_counted_for_both(function_runner, samples):
    dense = evaluate(onehot_runner(function_runner), samples)
    shipped = evaluate(onehot_runner(function_runner, wrong=(4,)), samples)
    result = compare_accuracy(dense, shipped, seed=0)
    (flip,) = result.flipped
    assert flip.dense_confidence == pytest.approx(np.e / (np.e + 3))
    assert flip.shipped_confidence == pytest.approx(np.exp(9) / (np.exp(9) + 3))
    assert {c: (n.samples, n.dense, n.shipped) for c, n in result.per_class.items()} == {
        1: (4, 4, 4),
        2: (4, 4, 3),
        3: (4, 4, 4),
    }


def test_embeddings_are_compared_by_direction_and_by_rank(function_runner):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20, 3)).astype(np.float32)
    batches = [(x[:15], None), (x[15:], None)]
    same = similarity(function_runner(lambda x: x), function_runner(lambda x: 2 * x), batches)
    assert (same.samples, same.cosine_min, same.spearman_min) == (20, pytest.approx(1), pytest.approx(1))
    bent = similarity(function_runner(lambda x: x), function_runner(lambda x: x**3), batches)
    assert bent.spearman_min == pytest.approx(1)
    assert bent.cosine < 0.99
    other = similarity(function_runner(lambda x: x), function_runner(lambda x: x + SHIFT), batches)
    wanted = [stats.spearmanr(row, row + SHIFT).statistic for row in x]
    assert other.spearman == pytest.approx(np.mean(wanted))
    with pytest.raises(ValidationError, match="NaN"):
        similarity(function_runner(lambda x: x), function_runner(lambda x: x * np.nan), batches)
    with pytest.raises(ValidationError, match="no samples"):
        similarity(function_runner(lambda x: x), function_runner(lambda x: x), [])


def told(labels, predictions) -> AccuracyReport:
    """A report of these answers."""
    return AccuracyReport(
        runner="m",
        samples=len(labels),
        top1=float(np.mean(np.equal(labels, predictions))),
        per_class={},
        predictions=tuple(int(p) for p in predictions),
        labels=tuple(int(y) for y in labels),
    )


@pytest.mark.parametrize("right", [0.1, 0.15, 0.2, 0.3])
@pytest.mark.parametrize("common", [0.1, 0.7])
def test_the_chance_of_guessing_is_that_of_answers_handed_out_at_random(right, common):
    draw = np.random.default_rng(1)
    shares = np.array([common] + [(1 - common) / 9] * 9)
    labels = draw.choice(10, 150, p=shares)
    predictions = np.where(draw.random(150) < right, labels, draw.choice(10, 150, p=shares))
    hits = int((labels == predictions).sum())
    handed = [int((labels == draw.permutation(predictions)).sum()) for _ in range(4000)]
    assert chance_of_guessing(told(labels, predictions)) == pytest.approx(np.mean(np.array(handed) >= hits), abs=0.03)


@pytest.mark.parametrize(
    ("labels", "predictions", "guesses"),
    [
        ([0, 1] * 20, [0] * 40, True),  # one answer to everything
        ([0] * 40, [0] * 40, True),  # nothing to tell apart
        ([0, 1] * 20, [7] * 40, True),  # never right
        ([0, 1] * 20, [1, 0] * 20, True),  # always wrong
        ([0, 1] * 20, [0, 1] * 20, False),
        (list(range(40)), list(range(40)), False),
        (
            [0] * 95 + [1] * 5,
            [0] * 96 + [1] * 4,
            False,
        ),  # hardly more right than the commonest class, but not by chance
    ],
)
def test_who_only_guesses(labels, predictions, guesses):
    assert (chance_of_guessing(told(labels, predictions)) > 0.01) is guesses


def test_agreement_counts_equal_answers_right_or_wrong():
    labels, left, right = [0, 1, 2, 3] * 25, [0, 1, 2, 0] * 25, [0, 1, 3, 0] * 25
    found = agreement(told(labels, left), told(labels, right))
    assert found.value == 0.75
    assert 0.65 < found.low < 0.75 < found.high < 0.83
    with pytest.raises(ValidationError, match="different samples"):
        agreement(told(labels, left), told(labels[::-1], right))
