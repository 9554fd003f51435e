import gc
import time

import numpy as np
import pytest

from validators import Feed, LatencyReport, OrtRunner, ValidationError, race

FEED = Feed("f", {"input": np.zeros((1, 3), np.float32)})


def slow(function_runner, name, seconds, log):
    def infer(x):
        log.append(name)
        until = time.perf_counter() + (seconds() if callable(seconds) else seconds)
        while time.perf_counter() < until:
            pass
        return x

    return function_runner(infer, name)


def test_the_ratio_of_medians_lies_in_its_interval(function_runner):
    log = []
    runners = {
        "dense": slow(function_runner, "dense", 4e-3, log),
        "shipped": slow(function_runner, "shipped", 1e-3, log),
    }
    report = race(runners, FEED, reference="dense", seconds=0.3, seed=0)
    shipped = report.runners["shipped"]
    assert shipped.ratio.value == pytest.approx(0.25, rel=0.2)
    assert shipped.ratio.low <= shipped.ratio.value <= shipped.ratio.high
    assert report.runners["dense"].ratio.value == report.runners["dense"].ratio.low == 1
    assert 1 <= shipped.min_ms <= shipped.median_ms <= shipped.p95_ms <= shipped.p99_ms
    assert shipped.inferences == report.blocks * report.timed_per_block
    assert report.blocks >= 10
    assert LatencyReport.model_validate_json(report.model_dump_json()) == report


def test_turns_are_interleaved_in_a_drawn_order(function_runner):
    log = []
    runners = {name: slow(function_runner, name, 1e-4, log) for name in "ab"}
    report = race(runners, FEED, reference="a", seconds=0, seed=3)
    turn = 1 + report.timed_per_block
    raced = log[-2 * turn * report.blocks :]
    turns = raced[::turn]
    assert raced == [name for name in turns for _ in range(turn)]
    orders = {tuple(turns[i : i + 2]) for i in range(0, len(turns), 2)}
    assert orders == {("a", "b"), ("b", "a")}


def test_a_disturbance_that_hits_both_leaves_the_ratio(function_runner):
    start = time.perf_counter()

    def disturbed(base):
        return lambda: base * (3 if int((time.perf_counter() - start) / 0.1) % 2 else 1)

    log = []
    runners = {
        "a": slow(function_runner, "a", disturbed(2e-3), log),
        "b": slow(function_runner, "b", disturbed(1e-3), log),
    }
    ratio = race(runners, FEED, reference="a", seconds=0.6, seed=0).runners["b"].ratio
    assert ratio.low <= 0.5 * 1.1
    assert ratio.high >= 0.5 * 0.9


def test_a_model_that_starts_slowly_is_warmed_up_first(function_runner):
    calls = []

    def falling():
        calls.append(0)
        return 2e-3 if len(calls) > 9 else 2e-3 * (11 - len(calls))

    report = race({"a": slow(function_runner, "a", falling, [])}, FEED, reference="a", seconds=0, seed=0)
    assert report.runners["a"].warmup >= 9
    assert report.runners["a"].mean_ms < 4


def test_threads_and_cpus_are_recorded(linear_onnx):
    runners = {"one": OrtRunner(linear_onnx(), threads=1), "two": OrtRunner(linear_onnx(), threads=2)}
    report = race(runners, FEED, reference="one", seconds=0, seed=0)
    assert (report.runners["one"].threads, report.runners["two"].threads) == (1, 2)
    assert len(report.cpus) >= 1


def test_garbage_collection_is_on_again_even_after_a_failure(function_runner):
    calls = []

    def fails_later(x):
        calls.append(0)
        if len(calls) > 40:
            raise ValueError("broken")
        return x

    with pytest.raises(ValueError, match="broken"):
        race({"a": function_runner(fails_later)}, FEED, reference="a", seconds=5, seed=0)
    assert gc.isenabled()


def test_an_unknown_reference_is_refused(function_runner):
    with pytest.raises(ValidationError, match="no runner dense; there are a"):
        race({"a": function_runner(np.copy)}, FEED, reference="dense", seconds=0, seed=0)
