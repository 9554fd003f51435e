"""What a version says to people and to CI: report.html, report.md, junit.xml and verdict.json.

The HTML page is one file that needs no network and no script; its plots are inline SVG whose geometry is made here and
drawn in templates/. Figures are rounded here and nowhere else, so that the page and the Markdown show the same ones.
"""

from __future__ import annotations

import csv
import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline.artifacts import (
    Artifact,
    Baseline,
    Candidate,
    CandidateLatency,
    Optimized,
    Pruned,
    Shrunk,
    Validated,
    WidthChange,
)
from pipeline.manifest import Manifest
from validators import Check, Verdict

HTML, MARKDOWN, JUNIT, VERDICT = "report.html", "report.md", "junit.xml", "verdict.json"
HISTORY = "history.csv"

_SPACE = "\N{NO-BREAK SPACE}"  # between a number and its unit
_MINUS = "\N{MINUS SIGN}"
_KINDS = {
    "channel": "Channels",
    "neuron": "Feed-forward neurons",
    "head": "Attention heads",
    "head_position": "Positions inside attention heads",
    "residual": "Residual streams",
}
_BOUNDS = {"<=": "at most", "<": "less than", ">=": "at least", ">": "more than", "==": "exactly"}


@dataclass(frozen=True)
class Judged:
    """One check as people read it: figures rounded so that what differs still looks different."""

    name: str
    outcome: str
    required: bool
    measured: str
    interval: str
    limit: str
    words: str


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


def write(folder: Path, manifest: Manifest, artifacts: Sequence[Artifact]) -> None:
    """Write report.html, report.md, junit.xml and verdict.json into `folder`.

    `artifacts` holds one artifact of every stage; a fine-tuning history is read from its own folder where there is one.
    """
    context = _context(manifest, artifacts)
    texts = {
        HTML: _page().get_template("report.html.j2").render(context),
        MARKDOWN: markdown_summary(manifest, artifacts),
        JUNIT: _junit(manifest, context["checks"]),
        VERDICT: _verdict(manifest, context["validated"]),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def markdown_summary(manifest: Manifest, artifacts: Sequence[Artifact]) -> str:
    """The report in a few lines of GitHub Markdown, to paste into a pull request."""
    return _markdown().get_template("report.md.j2").render(_context(manifest, artifacts)) + "\n"


def _context(manifest: Manifest, artifacts: Sequence[Artifact]) -> dict[str, Any]:
    """Everything that the templates show: each artifact under its type's name in lower case, and what is made of it."""
    named: dict[str, Any] = {type(artifact).__name__.lower(): artifact for artifact in artifacts}
    shrunk, optimized, finetuned = named["shrunk"], named["optimized"], named["finetuned"]
    checks = [_judged(check) for check in named["validated"].verdict.checks]
    shipped = optimized.winner
    return named | {
        "manifest": manifest,
        "verdict": named["validated"].verdict.outcome,
        "checks": checks,
        "reasons": _reasons(named["validated"].verdict, checks),
        "summary": _summary(named["baseline"], shrunk, named["validated"]),
        "shipped": shipped,
        "shipped_sha256": _shipped_sha256(manifest, optimized),
        "widths": _widths(shrunk.widths),
        "sparsity": _sparsity(named["pruned"]),
        "operators": _operators(optimized.operators_before, shipped.operators) if shipped.operators else (),
        "race": _race(optimized.candidates),
        "plots": _plots(finetuned.folder / HISTORY, finetuned.best_epoch),
        "seconds": sum(record.seconds for record in manifest.stages if record.stage not in manifest.reused),
    }


# --- Words ------------------------------------------------------------------------------------------------------------


def _summary(dense: Baseline, shrunk: Shrunk, checked: Validated) -> str:
    """The outcome in one sentence; a difference in speed is claimed only where the interval excludes 1."""
    if checked.latency_ratio_high < 1:
        speed = f"{significant(1 / checked.latency_ratio, 2)}× as fast as the dense model"
    elif checked.latency_ratio_low > 1:
        speed = f"slower than the dense model ({ratio(checked.latency_ratio)} of its latency)"
    else:
        speed = "no measurable difference in speed from the dense model"
    words = [speed, f"{ratio(checked.bytes, checked.dense_bytes)} of its file size"]
    if shrunk.params_after != dense.params:
        words.append(f"{ratio(shrunk.params_after, dense.params)} of its parameters")
    words.append(f"{points(-checked.accuracy_drop_points)} of accuracy")
    return f"{words[0][0].upper()}{', '.join(words)[1:]}."


def _judged(check: Check) -> Judged:
    """`check` in words; with as many digits as it takes to tell the measured value from the limit."""
    name = check.limit.metric.replace("_", " ").capitalize()
    required = check.limit.level == "required"
    bound = _BOUNDS[check.limit.operator]
    if check.measured is None:
        limit = f"{bound} {significant(check.limit.value)}"
        return Judged(name, check.outcome, required, "–", "", limit, f"{check.reason[:1].upper()}{check.reason[1:]}.")
    known, wanted = (check.measured.value, check.measured.low, check.measured.high), check.limit.value
    apart = [figure for figure in known if figure != wanted]
    digits = next((d for d in range(3, 17) if all(significant(f, d) != significant(wanted, d) for f in apart)), 17)
    value, low, high, limit = (significant(figure, digits) for figure in (*known, wanted))
    interval = f"{low} to {high}" if low != high else ""
    shown = f"{value} ({interval})" if interval else value
    words = {
        "pass": f"{name}: {shown}, as asked for ({bound} {limit}).",
        "fail": f"{name}: {shown}, but {bound} {limit} is asked for.",
        "inconclusive": f"{name}: {shown}; {bound} {limit} is asked for, and the measurement cannot tell.",
    }
    return Judged(name, check.outcome, required, value, interval, f"{bound} {limit}", words[check.outcome])


def _reasons(verdict: Verdict, checks: Sequence[Judged]) -> list[str]:
    """Why it is no pass, and the warnings; the verdict's own reasons where no single check is to blame."""
    to_blame = [check.words for check in checks if check.required and check.outcome != "pass"]
    warnings = [f"Warning: {check.words}" for check in checks if not check.required and check.outcome != "pass"]
    return [*(to_blame or verdict.reasons), *warnings]


def _shipped_sha256(manifest: Manifest, optimized: Optimized) -> str:
    """Digest of the file that ships; "" where the manifest does not list it."""
    files = (record.files.get(optimized.ships) for record in manifest.stages if record.stage.endswith("optimize"))
    return next((file.sha256 for file in files if file is not None), "")


def _operators(before: Mapping[str, int], after: Mapping[str, int]) -> tuple[tuple[str, int, int], ...]:
    """(operator, nodes before, nodes after), the most frequent first."""
    names = sorted({*before, *after}, key=lambda name: (-before.get(name, 0), -after.get(name, 0), name))
    return tuple((name, before.get(name, 0), after.get(name, 0)) for name in names)


# --- Plots ------------------------------------------------------------------------------------------------------------


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


def _plots(history: Path, best_epoch: int) -> tuple[Plot, ...]:
    """Loss and accuracy of fine-tuning, as far as the history holds at least two finite values of one part."""
    if not history.is_file():
        return ()
    with history.open(encoding="utf-8", newline="") as file:
        rows = [{name: _number(cell) for name, cell in row.items() if name} for row in csv.DictReader(file)]
    plots = (_plot(title, show, columns, rows, best_epoch) for title, show, columns in _HISTORY)
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


# --- Figures ----------------------------------------------------------------------------------------------------------


def significant(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits, never in exponent form between 0.001 and a million."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else f"{_MINUS if value < 0 else ''}∞"
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}".replace("-", _MINUS, 1) if value < 0 else f"{value:.{digits - 1}e}"
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{value:,.{decimals}f}".replace(",", _SPACE).replace("-", _MINUS)


def percent(share: float | None) -> str:
    """A share in 0..1 as percent; what is not quite nothing or everything never reads as 0.0 % or 100.0 %."""
    if share is None:
        return "–"
    if not math.isfinite(share):
        return significant(share)
    if 0 < share < 0.0005:
        return f"< 0.1{_SPACE}%"
    if 0.9995 <= share < 1:
        return f"> 99.9{_SPACE}%"
    return f"{100 * share:.1f}{_SPACE}%".replace("-", _MINUS)


def points(change: float) -> str:
    """A signed change of a percentage, in points."""
    if not math.isfinite(change):
        return significant(change)
    sign = "±" if abs(change) < 0.05 else "+" if change > 0 else _MINUS
    return f"{sign}{abs(change):.1f}{_SPACE}points"


def milliseconds(value: float) -> str:
    """A latency in milliseconds."""
    return f"{significant(value)}{_SPACE}ms"


def size(count: int) -> str:
    """A file size; 1 MB is a million bytes."""
    return _scaled(count, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), "B")


def amount(count: int) -> str:
    """A number of parameters or MACs, with the SI prefix as its unit."""
    return _scaled(count, (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)), "").strip()


def _scaled(count: int, units: Sequence[tuple[str, float]], smallest: str) -> str:
    # 999 950 is 1.00 M, not 1 000 k: the unit is chosen after rounding.
    rounded = float(f"{count:.2e}")
    for unit, factor in units:
        if rounded >= factor:
            return f"{significant(count / factor)}{_SPACE}{unit}"
    return f"{count}{_SPACE}{smallest}"


def grouped(count: int) -> str:
    """An exact count with its thousands apart."""
    return f"{count:,}".replace(",", _SPACE)


def ratio(part: float, whole: float = 1.0) -> str:
    """Three digits of `part` over `whole`; "–" where there is no whole."""
    return significant(part / whole) if whole else "–"


def error(value: float | None) -> str:
    """A numerical difference, in exponent form."""
    if value is None:
        return "–"
    return f"{value:.1e}" if math.isfinite(value) and value else significant(value)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as a person would say it."""
    if seconds < 9.95:
        return f"{seconds:.1f}{_SPACE}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}{_SPACE}s"
    if whole < 3600:
        return f"{whole // 60}{_SPACE}min {whole % 60}{_SPACE}s"
    return f"{whole // 3600}{_SPACE}h {whole % 3600 // 60}{_SPACE}min"


# What a training history is drawn as: title, how its figures are written, and part -> column.
_HISTORY: Sequence[tuple[str, Callable[[float], str], Mapping[str, str]]] = (
    ("Loss", significant, {"training": "loss", "calibration": "calibration_loss"}),
    ("Accuracy", percent, {"training": "train_accuracy", "calibration": "calibration_accuracy"}),
)

_FILTERS: Mapping[str, Callable[..., str]] = {
    made.__name__: made
    for made in (significant, percent, points, milliseconds, size, amount, grouped, ratio, error, duration)
}


# --- Templates --------------------------------------------------------------------------------------------------------


@functools.cache
def _page() -> Environment:
    return _environment(autoescape=True)


@functools.cache
def _markdown() -> Environment:
    # Autoescape would write HTML entities; whatever a template inserts is escaped for Markdown instead.
    return _environment(autoescape=False, finalize=_escape_markdown)


def _environment(**options: Any) -> Environment:
    environment = Environment(
        loader=PackageLoader("pipeline"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, **options
    )
    environment.filters.update(_FILTERS)
    return environment


def _escape_markdown(value: object) -> str:
    """Text that GitHub shows as it is: no markup, no HTML, no table borders, nobody notified."""
    text = " ".join(str(value).splitlines())
    text = re.sub(r"([\\`*\[\]<>|~&])|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)
    return text.replace("@", "&#64;")


# --- For machines -----------------------------------------------------------------------------------------------------


def _verdict(manifest: Manifest, checked: Validated) -> str:
    """The verdict as JSON; a figure that is not finite becomes null, which every parser can read."""
    verdict = json.loads(checked.model_dump_json(include={"verdict"}))["verdict"]
    return json.dumps({"model": manifest.model, "version": manifest.version, **verdict}, indent=2) + "\n"


def _junit(manifest: Manifest, checks: Sequence[Judged]) -> str:
    """JUnit XML: one test case per check.

    An unmet limit is a failure and an undecided one an error; an unmet warning passes, its reason in the output, so
    that CI is red exactly where the verdict is not a pass.
    """
    suite = ElementTree.Element("testsuite", name=f"leanort {manifest.model} {manifest.version}")
    counts = {"tests": 0, "failures": 0, "errors": 0}
    for check in checks:
        case = ElementTree.SubElement(suite, "testcase", classname=f"leanort.{manifest.model}", name=check.name)
        counts["tests"] += 1
        if check.outcome == "pass":
            continue
        if check.required:
            tag = "failure" if check.outcome == "fail" else "error"
            counts[f"{tag}s"] += 1
            ElementTree.SubElement(case, tag, message=check.words).text = check.words
        else:
            ElementTree.SubElement(case, "system-out").text = f"Warning: {check.words}"
    suite.attrib |= {name: str(count) for name, count in counts.items()}
    suite.set("timestamp", manifest.created.isoformat(timespec="seconds"))
    for element in suite.iter():
        element.attrib.update({name: _xml_text(value) for name, value in element.attrib.items()})
        element.text = _xml_text(element.text) if element.text else None
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _xml_text(text: str) -> str:
    """`text` without the characters that XML 1.0 cannot hold at all (section 2.2), such as NUL."""
    return re.sub(r"[^\t\n\r\x20-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]", "\N{REPLACEMENT CHARACTER}", text)
