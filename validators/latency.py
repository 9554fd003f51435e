"""Which of several models is faster, measured in one run.

The models take turns: a block lets each of them run a few times, in an order drawn anew per block, so that whatever
slows the machine down for a while slows all of them. The first few inferences of a turn are not counted: they find the
caches filled by another model, which a model that runs alone never does.

A ratio is taken within each block, of the two models' medians there, and the interquartile mean of those ratios is what
counts: what a block has in common cancels, and the quarter of the blocks that was disturbed on either side is left out.
On an idle server, pooling all blocks first gave intervals twice as wide, six times where the clock changed in between.

Where a session lies in memory is luck that no interval of one session tells of: a MobileNetV2 at 64x64 cut to half its
time took 0.515 to 0.539 of dense in ten sessions, each of which was sure to 0.4 %. So a race is run in several sessions
of each model, and its interval is the bootstrap over sessions, and over the blocks of each.

Beside the time on the wall, which is what a user waits, stands the CPU time of the whole process: on a busy machine
the second keeps its meaning when the first has lost it.

Where the caller names bounds on ratios, sampling ends as soon as every interval lies on one side of its bound. Looking
several times at growing data would raise the false alarms of a plain 95 % interval (Armitage et al. 1969), so the looks
are few, each at twice the data of the one before, and share the error: each is made at confidence
1 - (1 - confidence) / looks (Bonferroni).
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from pydantic import BaseModel, ConfigDict

from foundation.errors import ValidationError
from validators.apart import taking_turns
from validators.feeds import Feed
from validators.gates import Measured
from validators.runners import Array, Runner
from validators.turns import Times

# A turn lasts about this long, or TIMED counted inferences, whichever is longer.
TURN_SECONDS = 0.01
TIMED = 3
TIMED_LIMIT = 20
# With fewer blocks than this the bootstrap's interval means nothing.
BLOCKS_AT_LEAST = 10
# A race is run in so many sessions of each model; it is looked whether the bounds are decided when so many are behind.
SESSIONS = 8
LOOK_SESSIONS = 4
# Of an interval.
CONFIDENCE = 0.95
# Shares of the time budget after which it is looked whether the bounds are decided already, and the least blocks then.
LOOKS = (0.125, 0.25, 0.5, 1.0)
LOOK_BLOCKS = 20
# Numbers that one step of the bootstrap may hold.
CHUNK = 1 << 22
# What is worth a warning: waiting for the CPU, and a clock that moved while the race ran, as shares.
BUSY = 0.10
DRIFT = 0.05
CGROUP = Path("/sys/fs/cgroup/cpu.stat")
CPUS = Path("/sys/devices/system/cpu")


class Ratios(BaseModel):
    """One model's times over another's with bootstrap intervals: medians paired by block, and 99th percentiles.

    `detectable` is the smallest relative change of the median that this measurement tells from none: half the width of
    its interval over its value. `cpu` is the same as `median` of the process's CPU time.
    """

    model_config = ConfigDict(frozen=True)

    median: Measured
    p99: Measured
    cpu: Measured
    detectable: float


class RunnerLatency(BaseModel):
    """One model's times per inference in milliseconds, and its median against the reference's with the interval.

    `cpu_median_ms` and `cpu_ratio` are the same of the process's CPU time, summed over its threads. `percentiles_ms`
    are the 0th, 1st, ... 100th percentiles, `ratios` those against each of the other models.
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
    percentiles_ms: tuple[float, ...] = ()
    ratios: dict[str, Ratios] = {}


@dataclass(frozen=True)
class Bound:
    """A question to decide: is the ratio of two models' times below or above `value`? Of medians, or of p99s."""

    runner: str
    reference: str
    value: float
    of: str = "median"


class LatencyReport(BaseModel):
    """A race, in so many `sessions` of each model. `cpus` are those that the process may run on; `load` is the system's
    one-minute load before and after.

    `confidence` is that of each interval, `looks` how often the bounds were looked at, `decided` whether all of them
    were; `warnings` says what disturbed the measurement: a busy machine, a drifting or throttled clock.
    """

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
    looks: int = 1
    decided: bool = False
    pinned: int | None = None
    sessions: int = 1
    warnings: tuple[str, ...] = ()


def race(
    runners: Mapping[str, Runner],
    feed: Feed,
    *,
    reference: str,
    seconds: float,
    seed: int,
    bounds: Sequence[Bound] = (),
    confidence: float = CONFIDENCE,
    resamples: int = 2000,
) -> LatencyReport:
    """Time `runners` against each other on one feed for at most `seconds`, warm-up not counted, at least ten blocks.

    Files run in a process of their own that holds onnxruntime alone, as they would be deployed.
    Each is warmed up until its times no longer fall, and opened anew several times on the way, where it can be; that is
    not counted in `seconds`, and ends where it has taken as long. The interval of a ratio is the percentile bootstrap
    over sessions and blocks, all models' times of a block drawn together. With `bounds`, it ends early once all of them
    are decided. One-thread models run pinned to the CPU that was idlest. Raises ValidationError when `reference` or a
    bound names a model that is not among the runners, or a model cannot run.
    """
    for name in (reference, *(n for bound in bounds for n in (bound.runner, bound.reference))):
        if name not in runners:
            raise ValidationError(f"There is no runner {name}; there are {', '.join(runners) or 'none'}.")
    rng = np.random.default_rng(seed)
    names = list(runners)
    load, throttled = _load(), _throttled()
    each = _each(confidence) if bounds else confidence
    looks, decided = 0, False
    blocks: dict[str, list[list[Times]]] = {name: [] for name in names}
    sessions, opening = [0], 0.0  # blocks of each session, and seconds that went into opening them
    collecting = gc.isenabled()

    def raced() -> float:
        """Seconds so far."""
        return time.perf_counter() - start - opening

    def may_reopen() -> bool:
        return turns.reopens and opening <= seconds

    with _pinned(runners.values()) as pinned, taking_turns(runners, feed) as turns:
        warmups = turns.open()
        slowest = max(last for _, last in warmups.values())
        timed = int(np.clip(TURN_SECONDS / slowest, TIMED, TIMED_LIMIT))
        gc.disable()
        start = time.perf_counter()
        try:
            while len(blocks[reference]) < BLOCKS_AT_LEAST or raced() < seconds:
                share = min(raced() / max(seconds, 1e-9), len(blocks[reference]) / BLOCKS_AT_LEAST)
                if sessions[-1] and share * SESSIONS >= len(sessions) and may_reopen():
                    began = time.perf_counter()
                    turns.open()
                    sessions.append(0)
                    opening += time.perf_counter() - began
                order = [names[index] for index in rng.permutation(len(names))]
                for name, times in zip(order, turns.take(order, timed), strict=True):
                    blocks[name].append(times)
                sessions[-1] += 1
                if bounds and looks < len(LOOKS) - 1 and raced() >= LOOKS[looks] * seconds:
                    looks += 1
                    enough = len(sessions) >= LOOK_SESSIONS or not may_reopen()
                    if len(blocks[reference]) >= LOOK_BLOCKS and enough:
                        decided = _decided(bounds, _Draws(blocks, sessions, seed, resamples, each))
                        if decided:
                            break
        finally:
            if collecting:
                gc.enable()
        spent = raced()
    draws = _Draws(blocks, sessions, seed, resamples, each)
    return LatencyReport(
        reference=reference,
        feed=feed.label,
        seed=seed,
        blocks=len(blocks[reference]),
        timed_per_block=timed,
        seconds=spent,
        confidence=each,
        cpus=_cpus(),
        load=(load, _load()),
        runners={name: draws.latency(name, reference, runners[name].threads, warmups[name][0]) for name in names},
        looks=looks + (not decided),
        decided=decided or (bool(bounds) and _decided(bounds, draws)),
        pinned=pinned,
        sessions=len(sessions),
        warnings=_disturbances(draws.times, runners, load, _throttled() - throttled),
    )


def duels(
    runners: Mapping[str, Runner],
    feed: Feed,
    *,
    one: str,
    reference: str,
    seconds: float,
    seed: int,
    bounds: Sequence[Bound] = (),
) -> LatencyReport:
    """The model `one` against each of the others, in a race of its own with each, `seconds` for all races together.

    A third model in the turns takes the place of the first two in the caches, which slows the larger one more: of a
    ResNet-50 at 32x32 cut to a seventh, 0.159 of dense became 0.135 to 0.155. The figures of `one` are those of its
    race with `reference`; another model's ratio to `reference` is the product of its own to `one` and that one's.
    `blocks` and `seconds` are those of all races, `timed_per_block` and `pinned` those of the first.
    `bounds` are on ratios of `one`. Raises ValidationError as `race` does.
    """
    others = sorted((name for name in runners if name != one), key=lambda name: name != reference)
    if len(others) < 2:
        return race(runners, feed, reference=reference, seconds=seconds, seed=seed, bounds=bounds)
    if others[0] != reference:
        raise ValidationError(f"There is no runner {reference}; there are {', '.join(runners)}.")
    own = {name: [bound for bound in bounds if bound.reference == name] for name in others}
    reports = {
        name: race(
            {name: runners[name], one: runners[one]},
            feed,
            reference=name,
            seconds=seconds / len(others),
            seed=seed,
            bounds=own[name],
            confidence=_each(CONFIDENCE) if bounds and not own[name] else CONFIDENCE,  # all intervals at the same
        )
        for name in others
    }
    first, *rest = reports.values()
    mine = first.runners[one]
    found = {reference: first.runners[reference]}
    for report in rest:
        ours, theirs = report.runners[one], report.runners[report.reference]
        mine = mine.model_copy(update={"ratios": mine.ratios | ours.ratios})
        times = {
            "ratio": _product(theirs.ratios[one].median, mine.ratio),
            "cpu_ratio": _product(theirs.ratios[one].cpu, mine.cpu_ratio),
        }
        found[report.reference] = theirs.model_copy(update=times)
    return first.model_copy(
        update={
            "blocks": sum(report.blocks for report in reports.values()),
            "seconds": sum(report.seconds for report in reports.values()),
            "load": (first.load[0], rest[-1].load[1]),
            "runners": {**found, one: mine},
            "looks": max(report.looks for report in reports.values()),
            "decided": bool(bounds) and all(report.decided for name, report in reports.items() if own[name]),
            "warnings": tuple(dict.fromkeys(line for report in reports.values() for line in report.warnings)),
        }
    )


def _each(confidence: float) -> float:
    """Of each look, where several share the error."""
    return 1 - (1 - confidence) / len(LOOKS)


def _product(first: Measured, second: Measured) -> Measured:
    """The product of two ratios that were measured apart: errors of their logs add up in squares."""
    value = first.value * second.value
    low, high = (
        math.hypot(*(math.log(getattr(one, end) / one.value) for one in (first, second))) for end in ("low", "high")
    )
    return Measured(value=value, low=value * math.exp(-low), high=value * math.exp(high))


class _Draws:
    """The bootstrap over sessions, of which the first had `sizes[0]` blocks, and over the blocks of each: all models'
    times of a block are drawn together.
    """

    def __init__(
        self,
        blocks: Mapping[str, list[list[Times]]],
        sizes: Sequence[int],
        seed: int,
        resamples: int,
        confidence: float,
    ) -> None:
        self.times = {name: np.array(rows) for name, rows in blocks.items()}
        self._tails = ((1 - confidence) / 2, (1 + confidence) / 2)
        # A model may be faster than the CPU clock ticks.
        self._tick = time.get_clock_info("process_time").resolution
        self._picks = _picks(np.random.default_rng(seed), np.array(sizes), resamples)
        self._p99s: dict[str, Array] = {}

    def value(self, name: str, of: str) -> float:
        """A statistic of one model's times, in seconds."""
        times = self.times[name]
        if of == "p99":
            return float(np.quantile(times[..., 0], 0.99))
        return float(np.median(times[..., 1 if of == "cpu" else 0]))

    def ratio(self, name: str, other: str, of: str) -> Measured:
        """The ratio of two models' times with its interval, of `median`, `cpu` (both paired by block) or `p99`."""
        if of == "p99":
            value = self.value(name, of) / self.value(other, of)
            drawn = self._p99(name) / self._p99(other)
        else:
            column = 1 if of == "cpu" else 0
            mine, theirs = (
                np.maximum(np.median(self.times[model][..., column], axis=1), self._tick) for model in (name, other)
            )
            logs = np.log(mine / theirs)
            value, drawn = float(np.exp(_midmean(logs))), np.exp(_midmean(logs[self._picks]))
        low, high = np.quantile(drawn, self._tails)
        return Measured(value=value, low=min(value, float(low)), high=max(value, float(high)))

    def _p99(self, name: str) -> Array:
        """The 99th percentile of the times of each draw."""
        if name not in self._p99s:
            wall = self.times[name][..., 0]
            step = max(1, CHUNK // wall.size)
            parts = (self._picks[first : first + step] for first in range(0, len(self._picks), step))
            self._p99s[name] = np.concatenate(
                [np.quantile(wall[picks].reshape(len(picks), -1), 0.99, axis=1) for picks in parts]
            )
        return self._p99s[name]

    def ratios(self, name: str, other: str) -> Ratios:
        """All ratios of two models."""
        median = self.ratio(name, other, "median")
        return Ratios(
            median=median,
            p99=self.ratio(name, other, "p99"),
            cpu=self.ratio(name, other, "cpu"),
            detectable=median.detectable / median.value,
        )

    def latency(self, name: str, reference: str, threads: int, warmup: int) -> RunnerLatency:
        """Statistics of one model's times."""
        milliseconds = 1e3 * self.times[name][..., 0].ravel()
        percentiles = np.quantile(milliseconds, np.linspace(0, 1, 101))
        return RunnerLatency(
            threads=threads,
            warmup=warmup,
            inferences=milliseconds.size,
            min_ms=float(milliseconds.min()),
            median_ms=float(np.median(milliseconds)),
            mean_ms=float(milliseconds.mean()),
            p95_ms=float(percentiles[95]),
            p99_ms=float(percentiles[99]),
            ratio=self.ratio(name, reference, "median"),
            cpu_median_ms=1e3 * self.value(name, "cpu"),
            cpu_ratio=self.ratio(name, reference, "cpu"),
            percentiles_ms=tuple(percentiles.tolist()),
            ratios={other: self.ratios(name, other) for other in self.times if other != name},
        )


def _picks(rng: np.random.Generator, sizes: Array, resamples: int) -> Array:
    """Numbers of blocks, (resamples, blocks): for each session one of them drawn anew, and as many of its blocks."""
    drawn = rng.integers(0, len(sizes), (resamples, len(sizes)))
    session = np.repeat(drawn, sizes, axis=1)
    first = np.cumsum(sizes) - sizes
    found: Array = first[session] + (rng.random(session.shape) * sizes[session]).astype(int)
    return found


def _midmean(values: Array) -> Any:
    """The interquartile mean over the last axis: the mean of what is left without a quarter on either side."""
    ordered = np.sort(values, axis=-1)
    quarter = ordered.shape[-1] // 4
    return ordered[..., quarter : ordered.shape[-1] - quarter].mean(axis=-1)


def _decided(bounds: Sequence[Bound], draws: _Draws) -> bool:
    ratios = [(bound, draws.ratio(bound.runner, bound.reference, bound.of)) for bound in bounds]
    return all(ratio.high <= bound.value or ratio.low > bound.value for bound, ratio in ratios)


def _disturbances(
    times: Mapping[str, Array], runners: Mapping[str, Runner], load: float, throttled: int
) -> tuple[str, ...]:
    """What disturbed the race, one line each; `times` are (blocks, timed, 2) in seconds."""
    found = []
    if all(runner.threads == 1 for runner in runners.values()):
        wall, cpu = (sum(float(t[..., i].sum()) for t in times.values()) for i in (0, 1))
        if wall > 0 and 1 - cpu / wall > BUSY:
            found.append(f"the machine is busy: {1 - cpu / wall:.0%} of the time was spent waiting for the CPU")
    if load > len(_cpus()):
        found.append(f"the machine was busy before: load {load:.1f} on {len(_cpus())} CPUs")
    moved = {name: _moved(np.median(one[..., 0], axis=1)) for name, one in times.items()}
    # The clock moves all of them; one alone had another place in memory in its last session.
    least = min(moved, key=lambda name: abs(moved[name]))
    if len(times[least]) >= BLOCKS_AT_LEAST and len({m > 0 for m in moved.values()}) == 1 and abs(moved[least]) > DRIFT:
        found.append(f"the clock drifted: {least} took {moved[least]:+.0%} at the end (frequency, heat or load)")
    if throttled > 0:
        found.append(f"the CPU was throttled {throttled} times (quota of the container, or heat)")
    return tuple(found)


def _moved(times: Array) -> float:
    """By which share the last third of times is longer than the first."""
    third = max(1, len(times) // 3)
    return float(np.median(times[-third:]) / np.median(times[:third])) - 1


def _throttled() -> int:
    """How often this machine or container was throttled so far; 0 where nothing tells."""
    count = 0
    with contextlib.suppress(OSError, ValueError):
        words = dict(line.split() for line in CGROUP.read_text().splitlines())
        count += int(words.get("nr_throttled", 0))
    for file in CPUS.glob("cpu[0-9]*/thermal_throttle/core_throttle_count"):
        with contextlib.suppress(OSError, ValueError):
            count += int(file.read_text())
    return count


@contextlib.contextmanager
def _pinned(runners: Iterable[Runner]) -> Iterator[int | None]:
    """Keep this thread on the CPU that is idlest now, where every runner computes on the calling thread alone."""
    allowed = _cpus()
    if not hasattr(os, "sched_setaffinity") or len(allowed) < 2 or any(runner.threads != 1 for runner in runners):
        yield None
        return
    busy = psutil.cpu_percent(interval=0.05, percpu=True)
    chosen = min(allowed, key=lambda cpu: busy[cpu] if cpu < len(busy) else 100.0)
    try:
        os.sched_setaffinity(0, {chosen})
    except OSError:  # a sandbox may forbid it
        yield None
        return
    try:
        yield chosen
    finally:
        os.sched_setaffinity(0, allowed)


def _cpus() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def _load() -> float:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
