"""How a latency table's predictions stand to what was measured, as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.drawing.plots import save


def plot(
    checked: Sequence[tuple[float, float]],
    attempts: Sequence[tuple[float, float]],
    goal: float | None,
    title: str,
    path: Path,
) -> None:
    """Draw predicted against measured, both shares of dense: of models `checked` that were left out of the table, and
    of the `attempts` at a choice, numbered; `goal` as a line. The suffix decides the format (.svg, .png).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 5), layout="constrained")
    axes = figure.subplots()
    most = 1.05 * max([1.0, *(value for pair in (*checked, *attempts) for value in pair)])
    axes.plot([0, most], [0, most], color="0.7", linewidth=0.8, zorder=1)
    axes.plot(*_columns(checked), ".", color="C0", label="models of random widths, left out of the table")
    if attempts:
        axes.plot(*_columns(attempts), "o", color="C1", markersize=7, fillstyle="none", label="choices for the target")
        for number, (predicted, measured) in enumerate(attempts, start=1):
            axes.annotate(str(number), (measured, predicted), textcoords="offset points", xytext=(6, -9), fontsize=8)
    if goal is not None:
        axes.axvline(goal, color="C2", linestyle="--", linewidth=1, label=f"target {goal:.3g}")
    axes.set(xlim=(0, most), ylim=(0, most), xlabel="measured, of dense", ylabel="predicted, of dense", title=title)
    axes.set_aspect("equal")
    axes.legend(fontsize=7, loc="upper left")
    save(figure, path)


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [measured for _, measured in pairs], [predicted for predicted, _ in pairs]
