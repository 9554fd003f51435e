"""Several versions of one model: what each is worth against what it costs, with the best of them joined."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"pass": "#14713f", "fail": "#b92c22", "inconclusive": "#8a5a00", "dense": "#596270"}


@dataclass(frozen=True)
class Mark:
    """One model in the picture: (value, low, high) of what it costs and of what it is worth.

    `outcome`: its gate's, or "dense". `best`: whether it is on the frontier. `link`: where a click leads, "" nowhere.
    """

    name: str
    cost: tuple[float, float, float]
    worth: tuple[float, float, float]
    outcome: str
    best: bool
    link: str = ""


@dataclass(frozen=True)
class Panel:
    """One picture: everything that is known against one cost, which is told in `cost`."""

    cost: str
    marks: tuple[Mark, ...]


def svg(panels: Sequence[Panel], worth: str, share: bool) -> str:
    """The panels side by side, as an SVG element to be put into a page. `worth` names the score; `share`: it is one,
    told in per cent. Marks whose gate passed are filled; the frontier is a line, its marks are ringed.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(panels), 4.2), layout="constrained")
    scale = 100.0 if share else 1.0
    with mpl.rc_context({"svg.hashsalt": "leanort"}):
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _draw(axes, panel, scale)
            axes.set(xlabel=panel.cost, ylabel=_plain(f"{worth}, %" if share else worth))
            axes.set_xlim(left=0)
            axes.grid(color="0.92", linewidth=0.8)
            axes.set_axisbelow(True)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :]  # a page has no place for the declarations before it


def _draw(axes: Axes, panel: Panel, scale: float) -> None:
    best = sorted((mark for mark in panel.marks if mark.best), key=lambda mark: mark.cost[0])
    axes.plot(
        [mark.cost[0] for mark in best],
        [scale * mark.worth[0] for mark in best],
        color="#2563c4",
        linewidth=1,
        zorder=1,
    )
    for mark in panel.marks:
        colour = COLOURS.get(mark.outcome, "0.5")
        cost, low, high = mark.cost
        worth, worst, most = (scale * value for value in mark.worth)
        axes.errorbar(
            cost,
            worth,
            xerr=[[max(0.0, cost - low)], [max(0.0, high - cost)]],
            yerr=[[max(0.0, worth - worst)], [max(0.0, most - worth)]],
            fmt="none",
            ecolor=colour,
            elinewidth=1,
            alpha=0.6,
            zorder=2,
        )
        filled = mark.outcome in ("pass", "dense")
        face = colour if filled else "white"
        if mark.best:
            axes.scatter([cost], [worth], s=110, facecolors="none", edgecolors="#2563c4", linewidths=1, zorder=2)
        dot = axes.scatter([cost], [worth], s=36, facecolors=face, edgecolors=colour, zorder=3)
        if mark.link:
            dot.set_urls([mark.link])
        right = mark.outcome == "dense"  # at the edge of the picture
        label = axes.annotate(
            mark.name,
            (cost, worth),
            textcoords="offset points",
            xytext=(-7 if right else 7, -11),
            ha="right" if right else "left",
            fontsize=8,
            color=colour,
        )
        label.set_url(mark.link or None)


def _plain(text: str) -> str:
    """A name as it is: a dollar sign begins no formula."""
    return text.replace("$", r"\$")
