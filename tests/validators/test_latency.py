import copy
import gc
import os
import time
from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pytest

from validators import Bound, Feed, LatencyReport, OrtRunner, ValidationError, duels, latency, race, turns

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
    told = SimpleNamespace(
        perf_counter=clock.perf_counter, process_time=clock.process_time, get_clock_info=time.get_clock_info
    )
    for module in (latency, turns):
        monkeypatch.setattr(module, "time", told)
    return clock


def test_the_ratio_of_medians_lies_in_its_interval(clock, function_runner):
    rng = np.random.default_rng(0)
    runners = {
        "dense": clock.runner(function_runner, "dense", lambda: 4e-3 + 1e-3 * rng.random()),
        "shipped": clock.runner(function_runner, "shipped", lambda: 1e-3 + 1e-3 * rng.random()),
    }
    report = race(runners, FEED, reference="dense", seconds=10, seed=0)
    shipped, dense = report.runners["shipped"], report.runners["dense"]
    assert shipped.ratio.value == pytest.approx(shipped.median_ms / dense.median_ms, rel=0.03)
    assert shipped.ratio.value == pytest.approx(1.5 / 4.5, rel=0.05)
    assert shipped.ratio.low < shipped.ratio.value < shipped.ratio.high
    assert dense.ratio.low == dense.ratio.value == dense.ratio.high == 1
    assert 1 <= shipped.min_ms < shipped.median_ms < shipped.p95_ms < shipped.p99_ms < 2
    assert shipped.inferences == report.blocks * report.timed_per_block
    assert report.seconds == pytest.approx(10, rel=0.1)
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
    turn = turns.SETTLED + report.timed_per_block
    raced = clock.log[-2 * turn * report.blocks :]
    taken = raced[::turn]
    assert raced == [name for name in taken for _ in range(turn)]
    assert {tuple(taken[i : i + 2]) for i in range(0, len(taken), 2)} == {("a", "b"), ("b", "a")}


@pytest.mark.parametrize(("steady", "cold"), [(1e-3, 8), (2e-3, 5), (0.1, 1)])
def test_inferences_that_find_another_models_caches_are_not_counted(clock, function_runner, steady, cold):
    """Eight of them, or fewer that take 50 ms; of a model that takes longer, one."""

    def taking():
        """Slow for `cold` inferences after the other model's."""
        own = next((i for i, name in enumerate(reversed(clock.log)) if name != clock.log[-1]), len(clock.log))
        return steady * (5 if own <= cold else 1)

    runners = {name: clock.runner(function_runner, name, taking) for name in "ab"}
    for times in race(runners, FEED, reference="a", seconds=0, seed=0).runners.values():
        assert (times.min_ms, times.p99_ms) == pytest.approx((1e3 * steady, 1e3 * steady))


def test_a_disturbance_that_hits_both_leaves_the_ratio(clock, function_runner):
    def disturbed(base):
        return lambda: base * (3 if int(clock.now / 0.3) % 2 else 1)

    runners = {name: clock.runner(function_runner, name, disturbed(base)) for name, base in (("a", 2e-3), ("b", 1e-3))}
    ratio = race(runners, FEED, reference="a", seconds=9, seed=0).runners["b"].ratio
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((0.5, 0.5, 0.5))


def test_a_clock_that_changes_between_blocks_cancels_where_pooled_medians_would_not(clock, function_runner):
    # The machine halves its speed for just over half of the blocks: which of the two speeds a median meets is chance.
    rng = np.random.default_rng(0)

    def drifting(base):
        return lambda: base * (1 + 0.02 * rng.random()) * (2 if clock.now > 1.0 else 1)

    runners = {name: clock.runner(function_runner, name, drifting(base)) for name, base in (("a", 2e-3), ("b", 1.5e-3))}
    ratio = race(runners, FEED, reference="a", seconds=3, seed=0).runners["b"].ratio
    assert ratio.value == pytest.approx(0.75, rel=0.01)
    assert ratio.high - ratio.low < 0.01


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


def test_a_clear_case_is_decided_early_and_an_unclear_one_uses_its_time(clock, function_runner):
    rng = np.random.default_rng(0)
    runners = {
        name: clock.runner(function_runner, name, lambda base=base: base * (1 + 0.1 * rng.random()))
        for name, base in (("a", 2e-3), ("b", 1e-3))
    }

    def raced(value):
        return race(runners, FEED, reference="a", seconds=8, seed=0, bounds=[Bound("b", "a", value)])

    clear = raced(0.6)
    assert clear.decided
    assert clear.seconds == pytest.approx(1, rel=0.1)
    assert clear.confidence == pytest.approx(1 - 0.05 / 4)
    unclear = raced(clear.runners["b"].ratio.value)
    assert not unclear.decided
    assert unclear.seconds == pytest.approx(8, rel=0.1)
    assert 0 < unclear.runners["b"].ratios["a"].detectable < clear.runners["b"].ratios["a"].detectable


class Placed:
    """A model whose time hangs on where its session lies; opening one takes `opens` seconds."""

    def __init__(self, clock, function_runner, name, base, luck, opens=0.0):
        self.clock, self.luck, self.opens, self.base = clock, luck, opens, base
        self.name, self.threads, self.inputs = name, 1, ()
        self.make = function_runner
        self._open()

    def _open(self):
        self.clock.now += self.opens
        takes = self.base * (1 + self.luck())
        self.runner = self.clock.runner(
            self.make, self.name, lambda: takes * (1 + 0.001 * np.sin(1e3 * self.clock.now))
        )

    def infer(self, feed):
        return self.runner.infer(feed)

    def reopened(self):
        new = copy.copy(self)
        new._open()
        return new


def test_an_interval_tells_of_the_sessions_that_a_model_may_get(clock, function_runner):
    """Most of them hold the ratio over all sessions, where each session is sure of another one."""
    rng, held, widths = np.random.default_rng(0), 0, []
    for seed in range(20):
        runners = {
            name: Placed(clock, function_runner, name, base, lambda: rng.uniform(-0.05, 0.05))
            for name, base in (("a", 2e-3), ("b", 1e-3))
        }
        report = race(runners, FEED, reference="a", seconds=2, seed=seed)
        assert report.sessions == latency.SESSIONS
        ratio = report.runners["b"].ratio
        held += ratio.low <= 0.5 <= ratio.high
        widths.append((ratio.high - ratio.low) / ratio.value)
    assert held >= 15
    assert 0.02 < np.median(widths) < 0.1


def test_a_model_that_takes_long_to_open_is_opened_less_often(clock, function_runner):
    runners = {name: Placed(clock, function_runner, name, 1e-3, lambda: 0.0, opens=1.0) for name in ("a", "b")}
    began = clock.now
    report = race(runners, FEED, reference="a", seconds=3, seed=0)
    assert 1 < report.sessions < latency.SESSIONS
    assert report.seconds == pytest.approx(3, rel=0.1)
    assert clock.now - began < 3 + 3 + 2 + 0.5  # at most one more opening than the race takes


def test_one_sessions_luck_decides_nothing_and_is_no_drift(clock, function_runner, monkeypatch):
    monkeypatch.setattr(latency, "_load", lambda: 0.0)

    def runners(later):
        place = iter([0.0, *[later] * 20])
        return {
            "a": clock.runner(function_runner, "a", 2e-3),
            "b": Placed(clock, function_runner, "b", 1e-3, lambda: next(place)),
        }

    bound = [Bound("b", "a", 0.55)]
    report = race(runners(0.2), FEED, reference="a", seconds=4, seed=0, bounds=bound)
    assert report.runners["b"].ratio.high > 0.55 and report.warnings == ()
    clear = race(runners(0.0), FEED, reference="a", seconds=4, seed=0, bounds=bound)
    assert clear.decided and clear.seconds == pytest.approx(2, rel=0.1)
    assert clear.sessions >= latency.LOOK_SESSIONS


def test_one_model_races_each_other_one_apart_and_all_of_it_is_one_report(clock, function_runner):
    """A third model in the turns would take the caches of the first two."""
    rng, ran = np.random.default_rng(0), []

    def runner(name, base):
        def takes():
            ran.append(name)
            crowded = name == "dense" and "promoted" in ran[-12:]
            return base * (1.5 if crowded else 1) * (1 + 0.02 * rng.random())

        return clock.runner(function_runner, name, takes)

    runners = {name: runner(name, base) for name, base in (("shipped", 1e-3), ("dense", 4e-3), ("promoted", 2e-3))}
    bounds = [Bound("shipped", "dense", 0.5), Bound("shipped", "promoted", 0.9)]
    report = duels(runners, FEED, one="shipped", reference="dense", seconds=16, seed=0, bounds=bounds)
    assert [name for name, _ in groupby(name for name in ran if name != "shipped")] == ["dense", "promoted"]
    shipped, promoted = report.runners["shipped"], report.runners["promoted"]
    assert shipped.ratio.value == shipped.ratios["dense"].median.value == pytest.approx(0.25, rel=0.02)
    assert shipped.ratios["promoted"].median.value == pytest.approx(0.5, rel=0.02)
    assert promoted.ratio.low < promoted.ratio.value < promoted.ratio.high
    assert promoted.ratio.value == pytest.approx(0.5, rel=0.03)
    assert report.runners["dense"].ratio.value == 1
    assert report.decided and report.seconds < 4
    assert LatencyReport.model_validate_json(report.model_dump_json()) == report
    bound = [Bound("shipped", "promoted", 0.5)]
    report = duels(runners, FEED, one="shipped", reference="dense", seconds=8, seed=0, bounds=bound)
    assert not report.decided
    assert report.seconds == pytest.approx(8, rel=0.1)
    assert report.confidence == pytest.approx(1 - 0.05 / 4)


def test_without_a_third_model_there_is_one_race(clock, function_runner):
    runners = {name: clock.runner(function_runner, name, lambda: 1e-3) for name in ("dense", "shipped")}
    report = duels(runners, FEED, one="shipped", reference="dense", seconds=2, seed=0)
    assert report.seconds == pytest.approx(2, rel=0.1)
    with pytest.raises(ValidationError, match="no runner other"):
        duels(runners, FEED, one="shipped", reference="other", seconds=2, seed=0)


def gates(clock, function_runner, slower, count):
    """How many of `count` gates at 2.5 % pass a model that is slower by the share `slower`, on a noisy machine."""
    rng = np.random.default_rng(1)

    def noisy(base):
        # Most inferences within a few percent, one in ten held up, and a load that comes and goes for all.
        return lambda: (
            base
            * (1 + 0.05 * rng.random() + (rng.random() < 0.1) * rng.random())
            * (1.5 if int(clock.now / 0.5) % 3 == 0 else 1)
        )

    runners = {"a": clock.runner(function_runner, "a", noisy(2e-3))}
    runners["b"] = clock.runner(function_runner, "b", noisy(2e-3 * (1 + slower)))
    passed = 0
    for seed in range(count):
        report = race(
            runners, FEED, reference="a", seconds=4, seed=seed, bounds=[Bound("b", "a", 1.025)], resamples=400
        )
        passed += report.runners["b"].ratio.high <= 1.025
    return passed


def test_equal_models_pass_and_a_planted_slow_down_is_caught(clock, function_runner):
    assert gates(clock, function_runner, 0.0, 30) >= 29
    assert gates(clock, function_runner, 0.05, 30) <= 1


def test_p99_is_compared_with_its_own_interval(clock, function_runner):
    rng = np.random.default_rng(0)
    tail = {"a": 2.0, "b": 4.0}
    runners = {
        name: clock.runner(function_runner, name, lambda extra=extra: 1e-3 * (1 + (rng.random() < 0.05) * extra))
        for name, extra in tail.items()
    }
    ratios = race(runners, FEED, reference="a", seconds=3, seed=0).runners["b"].ratios["a"]
    assert ratios.median.value == pytest.approx(1)
    assert (ratios.p99.value, ratios.p99.low, ratios.p99.high) == pytest.approx((5 / 3, 5 / 3, 5 / 3))


def test_a_busy_machine_a_drifting_clock_and_throttling_are_reported(clock, function_runner, tmp_path, monkeypatch):
    (tmp_path / "cpu.stat").write_text("nr_periods 5\nnr_throttled 1\n")
    monkeypatch.setattr(latency, "CGROUP", tmp_path / "cpu.stat")
    monkeypatch.setattr(latency, "CPUS", tmp_path)
    monkeypatch.setattr(latency, "_load", lambda: 0.0)

    def quiet():
        return 1e-3

    def waited():
        clock.idle += 5e-4
        return 1e-3

    def drifting():
        return 1e-3 * (1 + clock.now)

    def throttling():
        (tmp_path / "cpu.stat").write_text("nr_throttled 9\n")
        return 1e-3

    def said(spend):
        clock.now = 0.0
        runners = {"a": clock.runner(function_runner, "a", spend)}
        return race(runners, FEED, reference="a", seconds=0.3, seed=0).warnings

    assert said(quiet) == ()
    assert "33% of the time was spent waiting" in said(waited)[0]
    assert "drifted: a took +" in said(drifting)[0]
    assert "throttled 8 times" in said(throttling)[0]
    monkeypatch.setattr(latency, "_load", lambda: 1000.0)
    assert "load 1000.0" in said(quiet)[0]


def test_one_thread_is_pinned_while_it_is_timed_and_free_again_afterwards(function_runner):
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is nothing to choose from")
    before, during = os.sched_getaffinity(0), []
    runner = function_runner(lambda x: during.append(os.sched_getaffinity(0)) or x)
    report = race({"a": runner}, FEED, reference="a", seconds=0, seed=0)
    assert {frozenset(cpus) for cpus in during} == {frozenset({report.pinned})}
    assert os.sched_getaffinity(0) == before
