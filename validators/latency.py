"""Which of several models is faster, measured in one run.

The models take turns: a block lets each of them run a few times, in an order drawn anew per block, so that whatever
slows the machine down for a while slows all of them. The first inference of a turn is not counted: it finds the caches
filled by another model, which a model that runs alone never does.

Beside the time on the wall, which is what a user waits, stands the CPU time of the whole process: on a busy machine
the second keeps its meaning when the first has lost it.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from validators.errors import ValidationError
from validators.feeds import Feed
from validators.gates import Measured
from validators.runners import Array, Runner

# A turn lasts about this long, or TIMED counted inferences, whichever is longer.
TURN_SECONDS = 0.01
TIMED = 2
TIMED_LIMIT = 20
# With fewer blocks than this the bootstrap's interval means nothing.
BLOCKS_AT_LEAST = 10
# Warm: the median of the last few inferences is within this share of the median of the few before.
WARM_WITHIN = 0.05
WARM_WINDOW = 3
WARM_LIMIT = 30


class RunnerLatency(BaseModel):
    """One model's times per inference in milliseconds, and its median against the reference's with the interval.

    `cpu_median_ms` and `cpu_ratio` are the same of the process's CPU time, summed over its threads.
    """

    model_config = ConfigDict(frozen=True)

    threads: int
    warmup: int
    inferences: int
    min_ms: float
    median_ms: float
    mean_ms: float
    p95_ms: float
    p99_ms: float
    ratio: Measured
    cpu_median_ms: float
    cpu_ratio: Measured


# Seconds on the wall and of CPU time for one inference.
_Times = tuple[float, float]


class LatencyReport(BaseModel):
    """A race. `cpus` are those that the process may run on; `load` is the system's one-minute load before and after."""

    model_config = ConfigDict(frozen=True)

    reference: str
    feed: str
    seed: int
    blocks: int
    timed_per_block: int
    seconds: float
    confidence: float
    cpus: tuple[int, ...]
    load: tuple[float, float]
    runners: dict[str, RunnerLatency]


def race(
    runners: Mapping[str, Runner],
    feed: Feed,
    *,
    reference: str,
    seconds: float,
    seed: int,
    confidence: float = 0.95,
    resamples: int = 1000,
) -> LatencyReport:
    """Time `runners` against each other on one feed for about `seconds`, warm-up not counted, at least ten blocks.

    Each is warmed up until its times no longer fall. The interval of a ratio of medians is the percentile bootstrap
    over blocks, both models' times of a block drawn together. Raises ValidationError when `reference` is not among the
    runners or a model cannot run.
    """
    if reference not in runners:
        raise ValidationError(f"There is no runner {reference}; there are {', '.join(runners) or 'none'}.")
    rng = np.random.default_rng(seed)
    names = list(runners)
    load = _load()
    warmups = {name: _warm_up(runner, feed) for name, runner in runners.items()}
    slowest = max(last for _, last in warmups.values())
    timed = int(np.clip(TURN_SECONDS / slowest, TIMED, TIMED_LIMIT))
    blocks: dict[str, list[list[_Times]]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    start = time.perf_counter()
    try:
        while len(blocks[reference]) < BLOCKS_AT_LEAST or time.perf_counter() - start < seconds:
            for index in rng.permutation(len(names)):
                runner = runners[names[index]]
                _once(runner, feed)
                blocks[names[index]].append([_once(runner, feed) for _ in range(timed)])
    finally:
        if collecting:
            gc.enable()
    spent = time.perf_counter() - start
    times = {name: np.array(rows) for name, rows in blocks.items()}
    count = len(blocks[reference])
    draws = rng.integers(0, count, (resamples, count))
    tails = ((1 - confidence) / 2, (1 + confidence) / 2)
    return LatencyReport(
        reference=reference,
        feed=feed.label,
        seed=seed,
        blocks=count,
        timed_per_block=timed,
        seconds=spent,
        confidence=confidence,
        cpus=_cpus(),
        load=(load, _load()),
        runners={
            name: _latency(times[name], times[reference], draws, tails, runners[name].threads, warmups[name][0])
            for name in names
        },
    )


def _once(runner: Runner, feed: Feed) -> _Times:
    """Run once."""
    cpu, wall = time.process_time(), time.perf_counter()
    runner.infer(feed.arrays)
    return time.perf_counter() - wall, time.process_time() - cpu


def _warm_up(runner: Runner, feed: Feed) -> tuple[int, float]:
    """Run until the times are steady. Returns how many inferences it took and the last window's median in seconds."""
    times: list[float] = []
    while len(times) < WARM_LIMIT:
        times.append(_once(runner, feed)[0])
        if len(times) >= 2 * WARM_WINDOW:
            before = float(np.median(times[-2 * WARM_WINDOW : -WARM_WINDOW]))
            now = float(np.median(times[-WARM_WINDOW:]))
            if now >= before * (1 - WARM_WITHIN):
                break
    return len(times), float(np.median(times[-WARM_WINDOW:]))


def _latency(
    mine: Array, reference: Array, draws: Array, tails: Sequence[float], threads: int, warmup: int
) -> RunnerLatency:
    """Statistics of one model's times, (blocks, timed, 2) in seconds; `draws` are the bootstrap's block indices."""
    milliseconds = 1e3 * mine[..., 0].ravel()
    p95, p99 = np.quantile(milliseconds, [0.95, 0.99])
    return RunnerLatency(
        threads=threads,
        warmup=warmup,
        inferences=milliseconds.size,
        min_ms=float(milliseconds.min()),
        median_ms=float(np.median(milliseconds)),
        mean_ms=float(milliseconds.mean()),
        p95_ms=float(p95),
        p99_ms=float(p99),
        ratio=_ratio(mine[..., 0], reference[..., 0], draws, tails),
        cpu_median_ms=1e3 * float(np.median(mine[..., 1])),
        cpu_ratio=_ratio(mine[..., 1], reference[..., 1], draws, tails),
    )


def _ratio(mine: Array, reference: Array, draws: Array, tails: Sequence[float]) -> Measured:
    """The ratio of the medians of two models' times, (blocks, timed), with its bootstrap interval."""
    # A model may be faster than the CPU clock ticks.
    tick = time.get_clock_info("process_time").resolution
    divisor = max(float(np.median(reference)), tick)
    ratios = np.median(mine[draws], axis=(1, 2)) / np.maximum(np.median(reference[draws], axis=(1, 2)), tick)
    low, high = np.quantile(ratios, tails)
    return Measured(value=float(np.median(mine)) / divisor, low=float(low), high=float(high))


def _cpus() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def _load() -> float:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
