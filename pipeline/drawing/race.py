"""The race as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.artifacts.race import Candidate
from pipeline.drawing.plots import save


def plot(rows: Sequence[Candidate], winner: Candidate, path: Path) -> None:
    """Draw the medians of every race, as SVG, one group of bars per candidate."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.latencies]
    figure = Figure(figsize=(7, max(1.5, 0.35 * len(shown) + 0.9)), layout="constrained")
    axes = figure.subplots()
    settings = len(shown[0].latencies) if shown else 0
    for number in range(settings):
        heights = [row.latencies[number].median_ms for row in shown]
        at = shown[0].latencies[number]
        height = 0.8 / settings
        axes.barh(
            [index + height * (number - (settings - 1) / 2) for index in range(len(shown))],
            heights,
            height=height,
            label=f"{at.threads} thread(s), batch {at.batch_size}",
        )
    axes.set_yticks(range(len(shown)), [f"{row.name}{' (ships)' if row.name == winner.name else ''}" for row in shown])
    axes.invert_yaxis()
    axes.set_xlabel("latency, median, ms")
    if settings:
        axes.legend(fontsize=7)
    save(figure, path)
