"""The results as a table and a picture: mean over seeds, with the 95 % interval of the mean (Student's t)."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from pipeline.drawing import plots

CONFIDENCE = 0.95
OURS = "leanort"
"""What the names of our methods begin with."""
TRAINED = ", trained"
"""What the names of methods end with where training goes on after what recovers them."""
FAR = 0.05
"""Of a wanted share: what was left is told where it is further from that."""
NONE = "–"
"""Where nothing was measured."""

Row = dict[str, Any]
"""A result. "of" says what its "wanted" is a share of: the dense model's MACs, its latency, or that in int8."""


def key(row: Row) -> tuple[Any, ...]:
    """What tells rows apart."""
    return tuple(row[name] for name in ("model", "data", "of", "seed", "method", "wanted"))


def read(path: Path) -> dict[tuple[Any, ...], Row]:
    """Every row of a results file by its key, the last one of a kind winning; none where there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {key(row): row for row in map(json.loads, lines)}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its interval; 0 for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, 0.0
    error = statistics.stdev(values) / len(values) ** 0.5
    return mean, float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error


def markdown(path: Path) -> str:
    """How every method of ours compares with the best of the others; then one table per model, data set and kind of
    share: methods down, shares across, percent of the test part right.
    """
    groups = sorted(_by(read(path).values(), "model", "data", "of").items())
    lines = _overview(groups, "Points ahead of the best peer of each seed", _ahead)
    lines += _overview(groups, "Nats from the dense network: ours, and the nearest peer's of each seed", _nearer)
    for (model, data, of), rows in groups:
        shares = _shares(rows)
        seeds = len({row["seed"] for row in rows})
        dense = interval([row["accuracy"] for row in rows if row["method"] == "dense"])
        known = f"{dense[0]:.1f} ± {dense[1]:.1f} %, {seeds} seeds" if seeds > 1 else f"{dense[0]:.1f} %, one seed"
        lines += [f"### {model}, {data}{', in int8' if 'int8' in of else ''}: dense {known}", "", *_head(of, shares)]
        for method in _ours_first(rows):
            cells = [
                _cell([r for r in rows if r["method"] == method and r["wanted"] == share], seeds) for share in shares
            ]
            lines.append(_line(method, cells))
        lines.append("")
    return "\n".join(lines)


def _overview(
    groups: Sequence[tuple[tuple[Any, ...], list[Row]]], title: str, told: Callable[[list[Row], str], str]
) -> list[str]:
    """A table of what is `told` of each method of ours at each share, by its rows; none where nothing is."""
    shares = _shares([row for _, rows in groups for row in rows])
    lines = []
    for (model, data, of), rows in groups:
        for method in (name for name in _ours_first(rows) if name.startswith(OURS)):
            cells = [told([row for row in rows if row["wanted"] == share], method) for share in shares]
            if any(cell != NONE for cell in cells):
                lines.append(_line(f"{model}, {data}, {of}: {method.removeprefix(OURS + ', ')}", cells))
    return [f"### {title}", "", *_head("", shares), *lines, ""] if lines else []


def _shares(rows: Iterable[Row]) -> list[float]:
    """All that were wanted, the largest first."""
    return sorted({row["wanted"] for row in rows if row["method"] != "dense"}, reverse=True)


def _head(corner: str, shares: Sequence[float]) -> list[str]:
    return [_line(corner, [f"{share:g}" for share in shares]), "|---" * (len(shares) + 1) + "|"]


def _line(first: str, cells: Iterable[str]) -> str:
    return f"| {' | '.join([first, *cells])} |"


def _pairs(rows: Iterable[Row], method: str) -> list[tuple[Row, list[Row]]]:
    """The row of one of our methods and those of its peers, for each seed that has both. Peers that were trained longer
    are for ours that were trained as well, and one that came no nearer to what was wanted than to the dense model is
    none.
    """
    ours: dict[int, Row] = {}
    peers: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        if "accuracy" not in row or row["method"] == "dense":
            continue
        if row["method"].startswith(OURS):
            if row["method"] == method:
                ours[row["seed"]] = row
            continue
        had = _had(row)
        if abs(had - 1) < abs(had - row["wanted"]):
            continue
        if method.endswith(TRAINED) or not row["method"].endswith(TRAINED):
            peers[row["seed"]].append(row)
    return [(ours[seed], peers[seed]) for seed in sorted(ours.keys() & peers.keys())]


def _ahead(rows: list[Row], method: str) -> str:
    """By how much one of our methods is right more often than whichever peer is best on a seed: mean, interval, the
    worst of the seeds, and how many they are.
    """
    ahead = [ours["accuracy"] - max(row["accuracy"] for row in peers) for ours, peers in _pairs(rows, method)]
    if not ahead:
        return NONE
    mean, half = interval(ahead)
    if len(ahead) == 1:
        return f"{mean:+.1f}, one seed"
    return f"{mean:+.1f} ± {half:.1f}, {len(ahead)} seeds, worst {min(ahead):+.1f}"


def _nearer(rows: list[Row], method: str) -> str:
    """How far one of our methods is from the dense network, and the peer that is nearest to it on each seed: means over
    the seeds where all of them say so.
    """
    apart = [
        (ours["nats"], min(row["nats"] for row in peers))
        for ours, peers in _pairs(rows, method)
        if all("nats" in row for row in (ours, *peers))
    ]
    if not apart:
        return NONE
    ours, peers = (statistics.fmean(each) for each in zip(*apart, strict=True))
    return f"{ours:#.2g}, {peers:#.2g}"


def _cell(rows: list[Row], seeds: int) -> str:
    """Mean and interval of one method at one share; how many seeds it is of, where others have more, and what was left,
    where that is not what was wanted.
    """
    if not any("accuracy" in row for row in rows):
        return "fails" if rows else NONE
    rows = [row for row in rows if "accuracy" in row]
    values = [row["accuracy"] for row in rows]
    mean, half = interval(values)
    told = [f"{mean:.1f} ± {half:.1f}" if len(values) > 1 else f"{mean:.1f}"]
    apart = [row["nats"] for row in rows if "nats" in row]  # older rows do not say
    if len(apart) == len(rows):
        told.append(f"{statistics.fmean(apart):#.2g} nats from dense")
    if len(values) < seeds or len(values) == 1:
        told.append(f"{len(values)} seeds" if len(values) > 1 else "one seed")
    had = [_had(row) for row in rows]
    if any(abs(share / rows[0]["wanted"] - 1) > FAR for share in had):
        told.append("had " + " to ".join(sorted({f"{min(had):.2f}", f"{max(had):.2f}"})))
    return ", ".join(told)


def _had(row: Row) -> float:
    """The share that was left; what was wanted where an older row does not say."""
    left: float = row["macs"] if row["of"] == "MACs left" else row.get("latency") or row["wanted"]
    return left


def draw(path: Path, picture: Path) -> None:
    """Accuracy over MACs or latency, one panel per table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted(_by(read(path).values(), "model", "data", "of").items())
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(6 * columns, 3.6 * lines + 1.6), squeeze=False)
    methods = _ours_first(row for _, rows in panels for row in rows)
    hues = [*range(0, 20, 2), *range(1, 20, 2)]  # strong colours first
    colours = {method: pyplot.get_cmap("tab20")(hues[number % 20]) for number, method in enumerate(methods)}
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, ((model, data, of), rows) in zip(axes.flat, panels, strict=False):
        dense = [row["accuracy"] for row in rows if row["method"] == "dense"]
        axis.axhline(statistics.fmean(dense), color="grey", linestyle=":", label="dense")
        for (method,), mine in sorted(_by(rows, "method").items()):
            points = defaultdict(list)
            for row in mine:
                if "accuracy" in row and method != "dense":
                    points[row["wanted"]].append(row["accuracy"])
            if points:
                found = {share: interval(points[share]) for share in sorted(points)}
                style = "o-" if method.startswith(OURS) else "x--"
                means = [mean for mean, _ in found.values()]
                axis.plot(list(found), means, style, color=colours[method], markersize=4, label=method)
        axis.set(title=f"{model}, {data}", xlabel=of, ylabel="accuracy, %")
    known = {text: line for axis in axes.flat for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(known.values()), list(known), loc="lower center", ncols=3, fontsize=7)
    figure.tight_layout(rect=(0, 1.4 / (3.6 * lines + 1.6), 1, 1))
    plots.save(figure, picture)
    pyplot.close(figure)


def _ours_first(rows: Iterable[Row]) -> list[str]:
    """All methods but dense."""
    return sorted({row["method"] for row in rows} - {"dense"}, key=lambda name: (not name.startswith(OURS), name))


def _by(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    made: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        made[tuple(row[name] for name in names)].append(row)
    return made
