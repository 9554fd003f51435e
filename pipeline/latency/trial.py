"""A chosen model as it would ship, timed before anything is spent on its weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.export import ExportedProgram

from exporters.candidates import CANDIDATES, NotApplicable, Source, make
from foundation.errors import ExportError
from pipeline.channels.coupling.groups import Analysis
from pipeline.latency import probes
from pipeline.latency.probes import Setting
from pipeline.latency.profile import feed_of
from pipeline.models.source import ModelSource, example
from validators.feeds import Feed
from validators.gates import Measured
from validators.latency import RunnerLatency, race
from validators.runners import OrtRunner

SECONDS = 6.0
"""For a race of the file that would ship against the dense one."""
RACES, SURE = 4, 0.015
"""Races at the most, and half the width of an interval, of the ratio, that needs no further one. Where other machines
on the same processor fill its caches, two files took 0.320, 0.327, 0.333, 0.334, 0.349, 0.382, 0.347 and 0.342 of each
other in eight races in a row, each sure to 3 to 7 %.
"""
RIVAL_SECONDS = 4.0
"""For the race among files that may ship, about as long as the race of a release: it decides by the same rule."""
RIVALS = tuple(
    name
    for name, one in CANDIDATES.items()
    if one.portable and one.budget == "rounding" and one.races == "by default" and one.suffix == ".onnx"
)
"""Files of float32 that ship by default where one is faster beyond doubt."""
SEED = 0


@dataclass(frozen=True)
class Trial:
    """The time of the file that would ship over the dense model's, which candidate that is, and the time itself."""

    ratio: Measured
    shipped: str
    ms: float


def tried(
    analysis: Analysis,
    weights: Mapping[str, Any],
    masks: Mapping[str, Any],
    source: ModelSource,
    setting: Setting,
    dense: Path,
) -> Trial:
    """Cut what `masks` (name -> True = kept) leave dead out of the analysed program with these weights, export it, and
    time it against the file `dense`, which the release will be held against. Raises RefusedError, ExportError.
    """
    program = probes.cut(analysis, weights, masks, setting)
    with tempfile.TemporaryDirectory() as name:
        plain = Path(name) / "model.onnx"
        feed = feed_of(dense, source, setting.batch)
        probes.export(program, source, setting, plain, feed)
        files = {"exported": plain} if setting.int8 else _rivals(program, source, plain)

        best = first = next(iter(files))
        if len(files) > 1:
            found = raced(files, dense, feed, setting.threads, RIVAL_SECONDS, SEED)
            faster = [key for key in files if found[key].ratio.high < found[first].ratio.low]
            best = min(faster, key=lambda key: found[key].ratio.value, default=first)

        took: list[float] = []

        def ratio(number: int) -> Measured:
            share, ms = timed(files[best], dense, feed, setting.threads, SECONDS, SEED + 1 + number)
            took.append(ms)
            return share

        sure = until_sure(ratio)
    return Trial(sure, best, float(np.median(took)))


def raced(
    files: Mapping[str, Path], dense: Path, feed: Mapping[str, Any], threads: int, seconds: float, seed: int
) -> Mapping[str, RunnerLatency]:
    """What each of `files`, by its name, takes against the file `dense`, in a race of new sessions."""
    runners = {name: OrtRunner(path, threads=threads, name=name) for name, path in {**files, "dense": dense}.items()}
    return race(runners, Feed("random", feed), reference="dense", seconds=seconds, seed=seed).runners


def timed(
    file: Path, dense: Path, feed: Mapping[str, Any], threads: int, seconds: float, seed: int
) -> tuple[Measured, float]:
    """The share of the time of the file `dense` that `file` takes, `raced` alone with it, and its milliseconds: where
    one thread computes, its own time is told from what other programs take.
    """
    found = raced({"model": file}, dense, feed, threads, seconds, seed)["model"]
    return (found.cpu_ratio, found.cpu_median_ms) if threads == 1 else (found.ratio, found.median_ms)


def until_sure(race: Callable[[int], Measured]) -> Measured:
    """`together` of races 0, 1, ..., as few as make it sure to `SURE`, `RACES` at the most."""
    ratios = [race(0)]
    while len(ratios) < RACES and (found := together(ratios)).detectable > SURE * found.value:
        ratios.append(race(len(ratios)))
    return together(ratios)


def together(ratios: Sequence[Measured]) -> Measured:
    """The geometric mean of a ratio that was measured several times, with the interval of that mean: as wide as those
    of the measurements say, or as their scatter does where that is more.
    """
    logs = np.log([(one.low, one.value, one.high) for one in ratios])
    low, mid, high = logs.T
    scatter = 2 * float(np.std(mid, ddof=1)) if len(ratios) > 1 else 0.0
    value, count = float(np.exp(mid.mean())), len(ratios)
    below, above = (max(float(np.hypot.reduce(side)) / count, scatter / count**0.5) for side in (mid - low, high - mid))
    return Measured(value=value, low=value * float(np.exp(-below)), high=value * float(np.exp(above)))


def _rivals(program: ExportedProgram, source: ModelSource, plain: Path) -> dict[str, Path]:
    """The candidates of the race that may ship anywhere, as far as this model has them; the first is the usual one."""
    made: dict[str, Path] = {}
    given = Source(
        onnx=plain,
        program=lambda: program,
        example=example(source),
        calibration=lambda: (),
        folder=plain.parent,
        free=source.free,
    )
    for name in RIVALS:
        try:
            made[name] = make(name, given).path
        except (NotApplicable, ExportError):
            continue
    return made or {"exported": plain}
