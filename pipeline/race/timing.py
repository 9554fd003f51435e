"""The race itself: those that were proven, timed against each other, and each weighed alone."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.artifacts.race import Candidate, CandidateLatency
from pipeline.race.context import RaceContext
from validators.feeds import random_feeds
from validators.latency import race
from validators.runners import OrtRunner
from validators.structure import measure

# How often a session is opened to tell how long that takes.
LOADS = 3


def timed(context: RaceContext, rows: Sequence[Candidate]) -> list[Candidate]:
    """The rows, those that passed with their latency at every number of threads and batch size, size and memory."""
    cfg, folder, inputs = context.cfg, context.source.folder, context.reference.inputs
    running = [row for row in rows if row.outcome == "passed"]
    if not running:
        return list(rows)
    latencies: dict[str, list[CandidateLatency]] = {row.name: [] for row in running}
    usual, ranges = context.model.usual, context.model.ranges
    feeds = random_feeds(inputs, seed=cfg.seed, batches=cfg.batch_sizes, sizes=usual, ranges=ranges)
    for threads in cfg.threads:
        runners = {
            row.name: OrtRunner(folder / row.file, threads=threads, name=row.name, session=row.session)
            for row in running
        }
        for batch in cfg.batch_sizes:
            feed = random_feeds(inputs, seed=cfg.seed, batches=(batch,), sizes=usual, ranges=ranges)[0]
            report = race(runners, feed, reference=running[0].name, seconds=cfg.seconds, seed=cfg.seed)
            for name, found in report.runners.items():
                latencies[name].append(
                    CandidateLatency(
                        threads=threads,
                        batch_size=batch,
                        median_ms=found.median_ms,
                        ratio=found.ratio.value,
                        low=found.ratio.low,
                        high=found.ratio.high,
                    )
                )

    def weighed(row: Candidate) -> Candidate:
        """With its size, load time and peak memory, the latter in a fresh process."""
        found = measure(folder / row.file, feeds[0], threads=cfg.threads[0], loads=LOADS, session=row.session)
        figures = {"bytes": found.bytes, "load_ms": found.load_ms, "peak_rss": found.peak_rss}
        return row.model_copy(update=figures | {"latencies": tuple(latencies[row.name])})

    return [weighed(row) if row.name in latencies else row for row in rows]
