"""How often a choice is timed before it is believed."""

import numpy as np
import pytest

from pipeline.latency import trial
from pipeline.latency.trial import together, until_sure
from validators.gates import Measured


def measured(value, width):
    return Measured(value=value, low=value * (1 - width), high=value * (1 + width))


def test_a_race_that_is_sure_is_not_run_again():
    asked = []

    def race(number):
        asked.append(number)
        return measured(0.4, 0.01)

    assert until_sure(race).value == pytest.approx(0.4) and asked == [0]


def test_races_are_run_until_their_mean_is_sure_and_no_more_than_are_allowed():
    draw = np.random.default_rng(0)
    asked = []

    def race(width):
        def one(number):
            asked.append(number)
            return measured(0.4 * float(np.exp(draw.normal(0, width / 2))), width)

        return one

    found = until_sure(race(0.02))
    assert 2 <= len(asked) <= 3 and found.high / found.low - 1 < 2 * 1.01 * trial.SURE
    asked.clear()
    assert abs(until_sure(race(0.1)).value / 0.4 - 1) < 0.1 and asked == list(range(trial.RACES))


def test_of_several_races_the_mean_counts_and_is_as_sure_as_they_agree():
    agreeing, apart = together([measured(0.4, 0.03)] * 4), together([measured(v, 0.001) for v in (0.3, 0.5, 0.3, 0.5)])
    assert agreeing.value == pytest.approx(0.4) and agreeing.high / 0.4 - 1 == pytest.approx(0.03 / 2, rel=0.05)
    assert apart.value == pytest.approx((0.3 * 0.5) ** 0.5) and apart.low < 0.3 and apart.high > 0.5
    alone = measured(0.4, 0.02)
    assert together([alone]).low == pytest.approx(alone.low) and together([alone]).high == pytest.approx(alone.high)
