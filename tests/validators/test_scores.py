"""Scores of sums and scores of records."""

import numpy as np
import pytest
import torch

from foundation.errors import ValidationError
from validators.scores import Score, differences, measured, per_sample, ratio, resampled


def median(records, weights) -> float:
    return float(np.median(np.repeat(np.array([one[0] for one in records]), weights.astype(int))))


POOLED = Score("median", lambda outputs, target: [(float(one),) for one in outputs["y"]], None, pooled=median)


def test_sums_of_two_sets_are_those_of_both():
    score = Score("share", lambda outputs, target: outputs["y"], ratio)
    one, other = np.array([[1.0, 2.0], [0.0, 3.0]]), np.array([[4.0, 5.0]])
    both = score.gathered(one, other)
    assert both.tolist() == [[5.0, 10.0]]
    assert score.of(both) == score.of(np.concatenate([one, other])) == 0.5
    assert score.gathered(one[:0], other).tolist() == other.tolist()


def test_records_stay_as_they_are_whatever_they_are():
    made = measured(POOLED, {"y": torch.tensor([3.0, 1.0, 2.0])}, None, 3)
    assert made.shape == (3, 1)
    assert made[0, 0] == (3.0,)
    both = POOLED.gathered(made, made[:1])
    assert (POOLED.of(made), POOLED.of(both)) == (2.0, 2.5)
    assert POOLED.drawn(made, np.array([[1, 0, 0], [0, 2, 1]])).tolist() == [3.0, 1.0]
    with pytest.raises(ValidationError, match="3 records for 2 samples"):
        measured(POOLED, {"y": torch.zeros(3)}, None, 2)


def test_records_are_drawn_for_both_models_alike_and_as_often_as_the_score_says():
    made = measured(POOLED, {"y": torch.arange(9.0)}, None, 9)
    few = Score("few", POOLED.statistics, None, pooled=median, resamples=50)
    assert len(differences(few, made, made, 0)) == 50
    assert not differences(few, made, made, 0).any()
    (weights,) = resampled(9, 3, 50)
    below = measured(POOLED, {"y": torch.arange(9.0) - 0.25}, None, 9)
    assert differences(few, made, below, 3) == pytest.approx(25.0)
    assert weights.sum(1).tolist() == [9] * 50


def test_a_mean_is_a_score_of_sums():
    score = per_sample("right", lambda outputs, target: outputs["y"])
    made = measured(score, {"y": torch.tensor([1.0, 0.0, 1.0])}, None, 3)
    assert score.of(made) == pytest.approx(2 / 3)
    assert score.drawn(made, np.array([[2, 1, 0]])) == pytest.approx(2 / 3)
