"""What a version says to people and to CI: report.html, report.md, junit.xml and verdict.json.

The HTML page is one file that needs no network and no script; its plots are inline SVG whose geometry is made here and
drawn in templates/."""

from __future__ import annotations

import base64
import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artifacts.base import Artifact, WidthChange
from pipeline.artifacts.eager import Baseline, Pruned
from pipeline.artifacts.program import Shrunk
from pipeline.artifacts.race import Candidate, CandidateLatency, Optimized
from pipeline.artifacts.verdict import Validated
from pipeline.release.records import Manifest
from pipeline.report.figures import duration, grouped, milliseconds, percent, points, ratio, significant
from pipeline.report.outcome import JUNIT, MARKDOWN, VERDICT, Told, judged, junit, reasons, verdict_json
from pipeline.report.templating import markdown, page
from validators.accuracy import AccuracyComparison
from validators.latency import LatencyReport

HTML = "report.html"
HISTORY = "history.csv"
FLIPS = 24
# The plot of latencies: bins, and how many times the third quartile it reaches at most.
BINS = 100
STRETCH = 2.0

_KINDS = {
    "channel": "Channels",
    "neuron": "Feed-forward neurons",
    "head": "Attention heads",
    "head_position": "Positions inside attention heads",
    "residual": "Residual streams",
}


@dataclass(frozen=True)
class Bar:
    """One layer: two lengths as shares (0..1) of the chart's full scale, and what they stand for in words."""

    name: str
    before: float
    after: float
    figures: str
    note: str


@dataclass(frozen=True)
class Bars:
    """One bar per layer, in the order of the model."""

    title: str
    top: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Line:
    """One part's measurements over the epochs; points are (x, y) in percent of the plot, y downwards as in SVG."""

    part: str
    points: tuple[tuple[float, float], ...]
    last: str


@dataclass(frozen=True)
class Plot:
    """One quantity over the epochs; `best`, in percent of the width, is where the epoch lies that was kept."""

    title: str
    lines: tuple[Line, ...]
    y_labels: tuple[str, str, str]
    x_labels: tuple[str, str]
    best: float | None


@dataclass(frozen=True)
class Strip:
    """One model's latencies: how they are spread, as corners (x, y) in percent of the plot, and in words.

    `middle` is where the median lies, in percent of the width; `beyond` says how many are slower than the plot is wide.
    """

    name: str
    outline: tuple[tuple[float, float], ...]
    middle: float
    median: str
    p99: str
    ratio: str
    beyond: str


@dataclass(frozen=True)
class Strips:
    """The latencies of every model that took part in the race, on one scale from 0 to `top`."""

    rows: tuple[Strip, ...]
    top: str
    race: str


@dataclass(frozen=True)
class Flipped:
    """A sample that exactly one of two models got right; `picture` is a PNG in base64, "" where there is none."""

    sample: int
    label: str
    dense: str
    shipped: str
    lost: bool
    picture: str


@dataclass(frozen=True)
class ClassRow:
    """One class: its samples, and how many of them each model got right."""

    label: str
    samples: int
    dense: float
    shipped: float
    change: str


def write(folder: Path, manifest: Manifest, artifacts: Sequence[Artifact]) -> None:
    """Write report.html, report.md, junit.xml and verdict.json into `folder`.

    `artifacts` holds one artifact of every stage; a fine-tuning history is read from its own folder where there is one.
    """
    context = _context(manifest, artifacts)
    checked: Validated = context["validated"]
    texts = {
        HTML: page().get_template("report.html.j2").render(context),
        MARKDOWN: markdown_summary(manifest, artifacts),
        JUNIT: junit(manifest.model, manifest.version, context["checks"], manifest.created),
        VERDICT: verdict_json(
            manifest.model,
            manifest.version,
            checked.verdict,
            checked.notes,
            checked.measurements,
            Told(checked.task, checked.scores),
        ),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def markdown_summary(manifest: Manifest, artifacts: Sequence[Artifact]) -> str:
    """The report in a few lines of GitHub Markdown, to paste into a pull request."""
    return markdown().get_template("report.md.j2").render(_context(manifest, artifacts)) + "\n"


def _context(manifest: Manifest, artifacts: Sequence[Artifact]) -> dict[str, Any]:
    """Everything that the templates show: each artifact under its type's name in lower case, and what is made of it."""
    named: dict[str, Any] = {type(artifact).__name__.lower(): artifact for artifact in artifacts}
    shrunk, optimized, finetuned = named["shrunk"], named["optimized"], named["finetuned"]
    checks = [judged(check) for check in named["validated"].verdict.checks]
    shipped = optimized.winner
    return named | {
        "manifest": manifest,
        "score": _title(named["validated"]),
        "as_score": _as_score(named["validated"]),
        "verdict": named["validated"].verdict.outcome,
        "checks": checks,
        "reasons": reasons(named["validated"].verdict, checks),
        "summary": _summary(named["baseline"], shrunk, named["validated"]),
        "shipped": shipped,
        "shipped_sha256": _shipped_sha256(manifest, optimized),
        "widths": _widths(shrunk.widths),
        "sparsity": _sparsity(named["pruned"]),
        "operators": _operators(optimized.operators_before, shipped.operators) if shipped.operators else (),
        "race": _race(optimized.candidates),
        "latencies": _latencies(named["validated"].folder),
        **_accuracy(named["validated"].folder),
        **_worse(named["validated"]),
        "scatter": _base64(named["validated"].folder / "predicted.png"),
        "table_picture": _base64(named["pruned"].folder / "latency.svg"),
        "plots": _plots(finetuned.folder / HISTORY, finetuned.best_epoch, named["validated"]),
        "seconds": sum(record.seconds for record in manifest.stages if record.stage not in manifest.reused),
    }


# --- Words ------------------------------------------------------------------------------------------------------------


def _summary(dense: Baseline, shrunk: Shrunk, checked: Validated) -> str:
    """The outcome in one sentence; a difference in speed is claimed only where the interval excludes 1."""
    middle, low, high = checked.latency_ratio, checked.latency_ratio_low, checked.latency_ratio_high
    if middle is None or low is None or high is None:
        speed = "a speed that could not be measured"
    elif high < 1:
        speed = f"{significant(1 / middle, 2)}× as fast as the dense model"
    elif low > 1:
        speed = f"slower than the dense model ({ratio(middle)} of its latency)"
    else:
        speed = "no measurable difference in speed from the dense model"
    words = [speed]
    if checked.bytes is not None and checked.dense_bytes is not None:
        words.append(f"{ratio(checked.bytes, checked.dense_bytes)} of its file size")
    if shrunk.params_after != dense.params:
        words.append(f"{ratio(shrunk.params_after, dense.params)} of its parameters")
    score = checked.judged_score
    if score is not None:
        change = points(-score.drop.value) if score.share else score.change(score.drop.value)
        words.append(f"{change} of {score.name}" if score.share else f"{score.name} {change}")
    elif checked.agreement is not None:
        words.append(f"the same answer on {percent(checked.agreement)} of the samples")
    return f"{words[0][0].upper()}{', '.join(words)[1:]}."


def _title(checked: Validated) -> str:
    """What the answers are judged by, as a title."""
    score = checked.judged_score
    if score is None:
        return "Accuracy" if checked.labelled else "Agreement with dense"
    return f"{score.name[0].upper()}{score.name[1:]}"


def _as_score(checked: Validated) -> Callable[[float | None], str]:
    """How a value of the score is written."""
    score = checked.judged_score
    return percent if score is None or score.share else lambda value: "–" if value is None else score.words(value)


def _shipped_sha256(manifest: Manifest, optimized: Optimized) -> str:
    """Digest of the file that ships; "" where the manifest does not list it."""
    files = (record.files.get(optimized.ships) for record in manifest.stages if record.stage.endswith("optimize"))
    return next((file.sha256 for file in files if file is not None), "")


def _operators(before: Mapping[str, int], after: Mapping[str, int]) -> tuple[tuple[str, int, int], ...]:
    """(operator, nodes before, nodes after), the most frequent first."""
    names = sorted({*before, *after}, key=lambda name: (-before.get(name, 0), -after.get(name, 0), name))
    return tuple((name, before.get(name, 0), after.get(name, 0)) for name in names)


# --- Plots ------------------------------------------------------------------------------------------------------------


def _latencies(folder: Path) -> Strips | None:
    """Every model's latencies, the dense one first; None where none were kept."""
    path = folder / "latency.json"
    if not path.is_file():
        return None
    race = LatencyReport.model_validate_json(path.read_text(encoding="utf-8"))
    known = {name: runner for name, runner in race.runners.items() if len(runner.percentiles_ms) == 101}
    if not known:
        return None
    # On a busy machine the slowest hundredth is a hundred times the median; a scale for it would show nothing else.
    top = max(min(runner.percentiles_ms[99], STRETCH * runner.percentiles_ms[75]) for runner in known.values())
    rows = []
    for name in sorted(known, key=("dense", "promoted", "shipped").index):
        percentiles = known[name].percentiles_ms
        p50, p99 = percentiles[50], percentiles[99]
        outline, beyond = _spread(percentiles, top)
        found = known["shipped"].ratios.get(name) if "shipped" in known else None
        words = (
            f"{significant(found.median.value)} ({significant(found.median.low)} to {significant(found.median.high)})"
            if found
            else ""
        )
        shown = f"{percent(beyond)} beyond" if beyond > 0.015 else ""
        rows.append(Strip(name, outline, 100 * p50 / top, milliseconds(p50), milliseconds(p99), words, shown))
    count = f"{grouped(race.blocks)} blocks of {race.timed_per_block} inferences in {duration(race.seconds)}"
    count += f" and {race.sessions} sessions" if race.sessions > 1 else ""
    return Strips(tuple(rows), milliseconds(top), f"{count}, each interval at {percent(race.confidence)} confidence")


def _spread(percentiles: Sequence[float], top: float) -> tuple[tuple[tuple[float, float], ...], float]:
    """The histogram between 0 and `top` that belongs to the 0th, 1st, ... 100th percentiles, as the corners of its
    outline, the fullest bin as high as the plot; and the share that lies above `top`.
    """
    edges = np.linspace(0, top, BINS + 1)
    share = np.searchsorted(percentiles, edges, side="right") / len(percentiles)
    inside = (edges > percentiles[0]) & (edges < percentiles[-1])
    share[inside] = np.interp(edges[inside], percentiles, np.linspace(0, 1, len(percentiles)))
    counts = np.diff(share)
    heights = counts / max(counts.max(), 1e-9)
    outline = [(0.0, 100.0)]
    for number, height in enumerate(heights):
        y = round(100 * (1 - float(height)), 1)
        outline += [(100 * number / BINS, y), (100 * (number + 1) / BINS, y)]
    return (*outline, (100.0, 100.0)), float(1 - share[-1])


def _accuracy(folder: Path) -> dict[str, Any]:
    """Classes and flipped samples, as far as they were kept."""
    path = folder / "accuracy.json"
    if not path.is_file():
        return {"classes": (), "flips": (), "flip_counts": (0, 0), "p_value": None}
    found = AccuracyComparison.model_validate_json(path.read_text(encoding="utf-8"))
    classes = tuple(
        ClassRow(
            str(label),
            row.samples,
            row.dense / row.samples,
            row.shipped / row.samples,
            points(100 * (row.shipped - row.dense) / row.samples),
        )
        for label, row in found.per_class.items()
    )
    flips = tuple(
        Flipped(
            sample=flip.sample,
            label=str(flip.label),
            dense=_called(flip.dense, flip.dense_confidence),
            shipped=_called(flip.shipped, flip.shipped_confidence),
            lost=flip.dense == flip.label,
            picture=_base64(folder / "flipped" / f"{flip.sample}.png"),
        )
        for flip in found.flipped[:FLIPS]
    )
    return {"classes": classes, "flips": flips, "flip_counts": (found.lost, found.gained), "p_value": found.p_value}


def _worse(validated: Validated) -> dict[str, Any]:
    """Samples that lost most of a score that is no accuracy, as far as the task draws them."""
    path = validated.folder / "worse.json"
    if not path.is_file() or not validated.scores:
        return {"worse": (), "panels": ""}
    found, score = json.loads(path.read_text(encoding="utf-8")), validated.scores[0]
    worse = tuple(
        Flipped(
            sample=one["sample"],
            label="",
            dense=score.words(one["dense"]),
            shipped=score.words(one["shipped"]),
            lost=True,
            picture=_base64(validated.folder / "worse" / f"{one['sample']}.png"),
        )
        for one in found["samples"]
    )
    return {"worse": worse, "panels": found["panels"]}


def _called(label: int, confidence: float | None) -> str:
    return f"{label}" if confidence is None else f"{label}, {percent(confidence)}"


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii") if path.is_file() else ""


def _widths(changes: Iterable[WidthChange]) -> tuple[Bars, ...]:
    """One chart per kind of group, since heads and channels share no scale; none where every width stayed."""
    changes = tuple(changes)
    if all(change.after == change.before for change in changes):
        return ()
    kinds: dict[str, list[WidthChange]] = {}
    for change in changes:
        kinds.setdefault(change.kind, []).append(change)
    charts = []
    for kind, members in kinds.items():
        top = max(1, *(member.before for member in members))
        bars = tuple(
            Bar(
                name=member.cluster,
                before=member.before / top,
                after=member.after / top,
                figures=f"{grouped(member.before)} → {grouped(member.after)}",
                note=f"{percent(member.after / member.before)} stay" if member.before else "",
            )
            for member in members
        )
        charts.append(Bars(_KINDS.get(kind, kind), grouped(top), bars))
    return tuple(charts)


def _race(candidates: Sequence[Candidate]) -> tuple[Bars, ...]:
    """One chart per number of threads and batch size: the medians of those that were timed, beside the slowest."""
    timed = [candidate for candidate in candidates if candidate.latencies]
    charts = []
    for number, setting in enumerate(timed[0].latencies if timed else ()):
        top = max(candidate.latencies[number].median_ms for candidate in timed)
        bars = tuple(
            Bar(
                name=candidate.name,
                before=1.0,
                after=candidate.latencies[number].median_ms / top,
                figures=milliseconds(candidate.latencies[number].median_ms),
                note=_relative(candidate.latencies[number], timed[0].name),
            )
            for candidate in timed
        )
        threads = f"{setting.threads} thread{'' if setting.threads == 1 else 's'}"
        charts.append(Bars(f"Latency, {threads}, batch {setting.batch_size}", milliseconds(top), bars))
    return tuple(charts)


def _relative(latency: CandidateLatency, reference: str) -> str:
    if latency.low == latency.high:
        return "the reference"
    return f"{ratio(latency.ratio)} of {reference} ({ratio(latency.low)} to {ratio(latency.high)})"


def _sparsity(pruned: Pruned) -> Bars:
    """Share of zero weights per matrix or kernel, in the order of the model; norms and biases follow these."""
    bars = tuple(
        Bar(
            name=layer.parameter,
            before=1.0,
            after=layer.ratio,
            figures=percent(layer.ratio),
            note=f"{grouped(layer.zeros)} of {grouped(layer.weights)} weights, "
            f"{grouped(layer.channels_cut)} of {grouped(layer.channels)} channels",
        )
        for layer in pruned.layers
        if len(layer.shape) > 1
    )
    return Bars("Sparsity per parameter", percent(1.0), bars)


def _plots(history: Path, best_epoch: int, checked: Validated) -> tuple[Plot, ...]:
    """Loss and score of fine-tuning, as far as the history holds at least two finite values of one part."""
    if not history.is_file():
        return ()
    with history.open(encoding="utf-8", newline="") as file:
        rows = [{name: _number(cell) for name, cell in row.items() if name} for row in csv.DictReader(file)]
    drawn = (
        ("Loss", significant, {"training": "loss", "calibration": "calibration_loss"}),
        (_title(checked), _as_score(checked), {"training": "train_score", "calibration": "calibration_score"}),
    )
    plots = (_plot(title, show, columns, rows, best_epoch) for title, show, columns in drawn)
    return tuple(plot for plot in plots if plot is not None)


def _plot(
    title: str,
    show: Callable[[float], str],
    columns: Mapping[str, str],
    rows: Sequence[Mapping[str, float]],
    best_epoch: int,
) -> Plot | None:
    """None where no column has two points: one point is no curve."""
    known: dict[str, list[tuple[float, float]]] = {}
    for part, column in columns.items():
        pairs = [(row.get("epoch", math.nan), row.get(column, math.nan)) for row in rows]
        finite = sorted((x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y))
        if len({x for x, _ in finite}) > 1:
            known[part] = finite
    if not known:
        return None
    xs = [x for pairs in known.values() for x, _ in pairs]
    ys = [y for pairs in known.values() for _, y in pairs]
    first, last = min(xs), max(xs)
    low, high = _axis(min(ys), max(ys))

    def across(x: float) -> float:
        return round(100 * (x - first) / (last - first), 2)

    lines = (
        Line(part, tuple((across(x), round(100 * (high - y) / (high - low), 2)) for x, y in pairs), show(pairs[-1][1]))
        for part, pairs in known.items()
    )
    return Plot(
        title=title,
        lines=tuple(lines),
        y_labels=(show(high), show((low + high) / 2), show(low)),
        x_labels=(f"epoch {first:g}", f"epoch {last:g}"),
        best=across(best_epoch) if first <= best_epoch <= last else None,
    )


def _axis(low: float, high: float) -> tuple[float, float]:
    """`low` and `high` rounded outwards to the leading digit of their distance; never the same number."""
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span))
    bottom, top = math.floor(low / step) * step, math.ceil(high / step) * step
    return (bottom, top) if top > bottom else (bottom - step, top + step)


def _number(text: str | None) -> float:
    """The number in a cell; NaN where the cell is empty or holds something else."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan
