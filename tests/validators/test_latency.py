import gc
import time
from types import SimpleNamespace

import numpy as np
import pytest

from validators import Feed, LatencyReport, OrtRunner, ValidationError, latency, race

FEED = Feed("f", {"input": np.zeros((1, 3), np.float32)})


class Clock:
    """Time that passes only when a model runs, so that the machine's load does not show."""

    def __init__(self):
        self.now = 0.0
        self.idle = 0.0
        self.log = []

    def perf_counter(self):
        return self.now + self.idle

    def process_time(self):
        return self.now

    def runner(self, function_runner, name, seconds):
        """A model that takes `seconds`, or `seconds()`, per inference."""

        def infer(x):
            self.log.append(name)
            self.now += seconds() if callable(seconds) else seconds
            return x

        return function_runner(infer, name)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(
        latency,
        "time",
        SimpleNamespace(
            perf_counter=clock.perf_counter, process_time=clock.process_time, get_clock_info=time.get_clock_info
        ),
    )
    return clock


def test_the_ratio_of_medians_lies_in_its_interval(clock, function_runner):
    rng = np.random.default_rng(0)
    runners = {
        "dense": clock.runner(function_runner, "dense", lambda: 4e-3 + 1e-3 * rng.random()),
        "shipped": clock.runner(function_runner, "shipped", lambda: 1e-3 + 1e-3 * rng.random() ** 4),
    }
    report = race(runners, FEED, reference="dense", seconds=1, seed=0)
    shipped, dense = report.runners["shipped"], report.runners["dense"]
    assert shipped.ratio.value == pytest.approx(shipped.median_ms / dense.median_ms)
    assert shipped.ratio.value == pytest.approx((1 + 0.5**4) / 4.5, rel=0.05)
    assert shipped.ratio.low < shipped.ratio.value < shipped.ratio.high
    assert dense.ratio.low == dense.ratio.value == dense.ratio.high == 1
    assert 1 <= shipped.min_ms < shipped.median_ms < shipped.mean_ms < shipped.p95_ms < shipped.p99_ms < 2
    assert shipped.inferences == report.blocks * report.timed_per_block
    assert report.seconds == pytest.approx(1, rel=0.1)
    assert LatencyReport.model_validate_json(report.model_dump_json()) == report


def test_cpu_time_leaves_out_what_others_took(clock, function_runner):
    def preempted(seconds):
        def spend():
            clock.idle += 5e-3
            return seconds

        return spend

    runners = {name: clock.runner(function_runner, name, preempted(base)) for name, base in (("a", 2e-3), ("b", 1e-3))}
    times = race(runners, FEED, reference="a", seconds=0, seed=0).runners["b"]
    assert (times.median_ms, times.cpu_median_ms) == pytest.approx((6, 1))
    assert (times.ratio.value, times.cpu_ratio.value) == pytest.approx((6 / 7, 1 / 2))


def test_more_time_narrows_the_interval(clock, function_runner):
    rng = np.random.default_rng(0)
    runners = {name: clock.runner(function_runner, name, lambda: 1e-3 * (1 + rng.random())) for name in "ab"}

    def width(seconds):
        ratio = race(runners, FEED, reference="a", seconds=seconds, seed=0).runners["b"].ratio
        return ratio.high - ratio.low

    assert width(10) < width(0.1) / 2


def test_turns_are_interleaved_in_a_drawn_order(clock, function_runner):
    runners = {name: clock.runner(function_runner, name, 1e-3) for name in "ab"}
    report = race(runners, FEED, reference="a", seconds=0, seed=3)
    assert report.blocks == 10
    turn = 1 + report.timed_per_block
    raced = clock.log[-2 * turn * report.blocks :]
    turns = raced[::turn]
    assert raced == [name for name in turns for _ in range(turn)]
    assert {tuple(turns[i : i + 2]) for i in range(0, len(turns), 2)} == {("a", "b"), ("b", "a")}


def test_the_first_inference_of_a_turn_is_not_counted(clock, function_runner):
    runners = {
        name: clock.runner(function_runner, name, lambda: 5e-3 if clock.log[-2:] != [clock.log[-1]] * 2 else 1e-3)
        for name in "ab"
    }
    times = race(runners, FEED, reference="a", seconds=0, seed=0).runners["b"]
    # Two turns of one model may meet; then no inference is a first one. Otherwise every first one would show.
    assert (times.min_ms, times.p99_ms) == pytest.approx((1, 1))


def test_a_disturbance_that_hits_both_leaves_the_ratio(clock, function_runner):
    def disturbed(base):
        return lambda: base * (3 if int(clock.now / 0.1) % 2 else 1)

    runners = {name: clock.runner(function_runner, name, disturbed(base)) for name, base in (("a", 2e-3), ("b", 1e-3))}
    ratio = race(runners, FEED, reference="a", seconds=3, seed=0).runners["b"].ratio
    assert ratio.low <= 0.5 <= ratio.high


def test_a_model_that_starts_slowly_is_warmed_up_first(clock, function_runner):
    def falling():
        return 2e-3 * max(1, 11 - len(clock.log))

    report = race({"a": clock.runner(function_runner, "a", falling)}, FEED, reference="a", seconds=0, seed=0)
    assert report.runners["a"].warmup >= 12
    assert report.runners["a"].mean_ms == pytest.approx(2)


def test_a_model_that_never_gets_steady_is_raced_all_the_same(clock, function_runner):
    runners = {"a": clock.runner(function_runner, "a", lambda: 1.0 / len(clock.log) ** 2)}
    assert race(runners, FEED, reference="a", seconds=0, seed=0).runners["a"].warmup == 30


def test_real_models_race_and_threads_and_cpus_are_recorded(linear_onnx):
    runners = {"one": OrtRunner(linear_onnx(), threads=1), "two": OrtRunner(linear_onnx(), threads=2)}
    report = race(runners, FEED, reference="one", seconds=0, seed=0)
    assert (report.runners["one"].threads, report.runners["two"].threads) == (1, 2)
    assert report.runners["one"].min_ms > 0
    assert len(report.cpus) >= 1


def test_garbage_collection_is_on_again_even_after_a_failure(function_runner):
    calls = []

    def fails_later(x):
        calls.append(gc.isenabled())
        if len(calls) > 40:
            raise ValueError("broken")
        return x

    with pytest.raises(ValueError, match="broken"):
        race({"a": function_runner(fails_later)}, FEED, reference="a", seconds=5, seed=0)
    assert gc.isenabled()
    assert calls[-1] is False


def test_an_unknown_reference_is_refused(function_runner):
    with pytest.raises(ValidationError, match="no runner dense; there are a"):
        race({"a": function_runner(np.copy)}, FEED, reference="dense", seconds=0, seed=0)
