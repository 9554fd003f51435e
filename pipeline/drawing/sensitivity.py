"""How sensitive each layer is, as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.drawing.plots import save

NAMED = 10
"""Curves that are named; the others are grey."""


def plot(curves: Mapping[str, Sequence[float]], shares: Sequence[float], title: str, path: Path) -> None:
    """Draw divergence against the share of groups that went, one line per layer, the worst (they come first) named; the
    suffix decides the format (.svg, .png).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    at = [100 * share for share in shares]
    for number, (name, values) in reversed(list(enumerate(curves.items()))):
        drawn = [max(value, 1e-6) for value in values]  # the scale has no zero
        if number < NAMED:
            axes.plot(at, drawn, marker=".", label=name, color=f"C{number}", zorder=3)
        else:
            axes.plot(at, drawn, color="0.8", linewidth=0.8)
    axes.set(yscale="log", xlabel="groups of the layer that went, %", ylabel="divergence from dense, nats", title=title)
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        axes.legend(handles[::-1], labels[::-1], fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path)
