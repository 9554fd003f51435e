"""The page of a sweep: sweep.html, sweep.md and sweep.json in the model's folder, beside its versions.

The HTML page is one file that needs no network and no script. It tells of the last sweep of the model; the versions
themselves stay whatever it says.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from foundation.files import make_folder, replacing
from pipeline.artifacts.eager import Aim
from pipeline.drawing.frontier import Mark, Panel, svg
from pipeline.release import records
from pipeline.report.figures import NONE, lost, milliseconds, percent, ratio, size
from pipeline.report.pages import HTML as REPORT
from pipeline.report.templating import markdown, page
from pipeline.sweep import rows
from pipeline.sweep.points import Sweep
from pipeline.sweep.rows import Figures, Row
from validators.gates import Measured
from validators.scores_lost import ScoreLost

HTML, MARKDOWN, JSON = "sweep.html", "sweep.md", "sweep.json"
FORMAT = 1
"""Of sweep.json."""
WAITING = "not made yet"
_COSTS = {"latency": "latency, of dense (measured)", "size": "file size, of dense"}


@dataclass(frozen=True)
class Cell:
    """A figure in words, and what belongs to it: its interval, or how it was found."""

    shown: str = NONE
    more: str = ""

    @property
    def words(self) -> str:
        """Both in one line."""
        return f"{self.shown} ({self.more})" if self.more else self.shown


@dataclass(frozen=True)
class Line:
    """One row of the page's table, in words. `link` is relative to the page, "" where the version is not to be had."""

    name: str
    outcome: str
    reasons: tuple[str, ...] = ()
    version: str = ""
    link: str = ""
    predicted: Cell = Cell()
    before: Cell = Cell()
    latency: Cell = Cell()
    milliseconds: Cell = Cell()
    score: Cell = Cell()
    loss: Cell = Cell()
    size: Cell = Cell()
    macs: Cell = Cell()
    best: str = ""


def write(sweep: Sweep, made: Sequence[Row | None]) -> Path:
    """Write the three files, each in one step, and return the page; None: a point that is not made yet.

    Raises StoreError where the model's folder cannot be written.
    """
    folder = sweep.folder
    make_folder(folder)
    context = _context(sweep, made)
    texts = {
        HTML: page().get_template("sweep.html.j2").render(context, picture=_picture(sweep, made)),
        MARKDOWN: markdown().get_template("sweep.md.j2").render(context) + "\n",
        JSON: json.dumps(to_json(sweep, made), indent=2) + "\n",
    }
    for name, text in texts.items():
        with replacing(folder / name) as part:
            part.write_text(text, encoding="utf-8")
    return folder / HTML


def summary(sweep: Sweep, made: Sequence[Row | None]) -> str:
    """The table as GitHub Markdown."""
    return markdown().get_template("sweep.md.j2").render(_context(sweep, made)) + "\n"


def to_json(sweep: Sweep, made: Sequence[Row | None]) -> dict[str, Any]:
    """Plain values for machines; `on_frontier` names the costs at which a point is one of the best."""
    best = _best(made)
    points = [
        {"value": point.value, "outcome": WAITING}
        if row is None
        else {**row.model_dump(mode="json"), "on_frontier": [cost for cost, on in best.items() if at in on]}
        for at, (point, row) in enumerate(zip(sweep.points, made, strict=True))
    ]
    return {
        "format": FORMAT,
        "model": sweep.model,
        "name": sweep.folder.name,
        "quantity": sweep.axis,
        "leanort": records.project_version(),
        "points": points,
    }


def _context(sweep: Sweep, made: Sequence[Row | None]) -> dict[str, Any]:
    known = [row for row in made if row is not None]
    best = _best(made)
    lines = [
        Line(sweep.words(point), WAITING)
        if row is None
        else _line(sweep, row, [cost for cost, on in best.items() if at in on])
        for at, (point, row) in enumerate(zip(sweep.points, made, strict=True))
    ]
    first = _first(made)
    threads = first.threads if first else 1
    return {
        "sweep": sweep,
        "name": sweep.folder.name,
        "score": _score_name(first),
        "dense": _dense(first),
        "lines": lines,
        "told": [line for line in lines if line.reasons],
        "machines": sorted({f"{row.host} ({row.cpu})" if row.cpu else row.host for row in known if row.version}),
        "threads": f"{threads} thread{'' if threads == 1 else 's'}",
        "written": datetime.now(UTC),
        "project": records.project_version(),
    }


def _first(made: Sequence[Row | None]) -> Figures | None:
    """The first version whose score was measured, else the first one: what names the score, and tells of dense."""
    measured = [row.figures for row in made if row is not None and row.figures is not None]
    return next((one for one in measured if one.worth is not None), measured[0] if measured else None)


def _score_name(figures: Figures | None) -> str:
    if figures is None or (figures.score is None and figures.agreement is None):
        return "Score"
    name = "agreement with dense" if figures.score is None else figures.score.name
    return f"{name[0].upper()}{name[1:]}"


def as_score(figures: Figures, value: float | None) -> str:
    """A value of the score as people read it."""
    if value is None:
        return NONE
    return percent(value) if figures.score is None else figures.score.words(value)


def _dense(figures: Figures | None) -> dict[str, str] | None:
    """The dense model as the first version that was measured beside it saw it."""
    if figures is None:
        return None
    return {
        "score": as_score(figures, figures.dense_worth),
        "milliseconds": milliseconds(figures.dense_latency_ms),
        "size": size(figures.dense_bytes),
    }


def _line(sweep: Sweep, row: Row, best: Sequence[str]) -> Line:
    name = f"{sweep.axis} {row.value}"
    found = row.figures
    if found is None:
        return Line(name, row.outcome, row.reasons)
    aim, score = found.aim, found.score
    return Line(
        name=name,
        outcome=row.outcome,
        reasons=row.reasons,
        version=row.version,
        link=_link(sweep, row),
        predicted=Cell() if aim is None else Cell(ratio(aim.predicted), _give(1.96 * aim.error * aim.predicted)),
        before=Cell() if aim is None else Cell(ratio(aim.expected), _how(aim)),
        latency=_between(found.latency),
        milliseconds=Cell(milliseconds(found.latency_ms)),
        score=Cell(as_score(found, found.worth.value if found.worth else None)),
        loss=Cell() if score is None else _loss(score),
        size=Cell(size(found.bytes), "" if found.size is None else f"{ratio(found.size)} of dense"),
        macs=Cell(ratio(found.macs, found.dense_macs)),
        best=" and ".join(best),
    )


def _loss(score: ScoreLost) -> Cell:
    told = lost if score.share else score.change
    return Cell(told(score.drop.value), f"{told(score.drop.high)} to {told(score.drop.low)}")


def _give(spread: float) -> str:
    return f"± {ratio(spread)}" if spread else ""


def _how(aim: Aim) -> str:
    if aim.measured:
        return f"timed, {aim.attempts} {'attempt' if aim.attempts == 1 else 'attempts'}"
    return "by the table" if aim.error else "counted"


def _between(found: Measured | None) -> Cell:
    return Cell() if found is None else Cell(ratio(found.value), f"{ratio(found.low)} to {ratio(found.high)}")


def _link(sweep: Sweep, row: Row) -> str:
    """From the page to a version's report; "" where another machine has it, or it was removed."""
    report = Path(row.folder) / REPORT
    if not row.folder or not report.is_file():
        return ""
    return quote(Path(os.path.relpath(report, sweep.folder.resolve())).as_posix())


def _costs(found: Figures, cost: str) -> Measured | None:
    if cost == "latency":
        return found.latency
    return None if found.size is None else Measured(value=found.size, low=found.size, high=found.size)


def _measured(made: Sequence[Row | None], cost: str) -> list[tuple[int, Figures, Measured, Measured]]:
    """The points that have both a cost and a worth: number, figures, cost, worth."""
    found = []
    for at, row in enumerate(made):
        if row is not None and row.figures is not None:
            price, worth = _costs(row.figures, cost), row.figures.worth
            if price is not None and worth is not None:
                found.append((at, row.figures, price, worth))
    return found


DENSE = -1
"""In place of a point's number."""


def _best(made: Sequence[Row | None]) -> dict[str, set[int]]:
    """Cost -> the points on its frontier, by number, the dense model among them as `DENSE`."""
    best: dict[str, set[int]] = {}
    for cost in _COSTS:
        measured = _measured(made, cost)
        if not measured:
            best[cost] = set()
            continue
        first = measured[0][1]
        numbers = [DENSE, *(at for at, *_ in measured)]
        pairs = [(1.0, first.dense_worth or 0.0), *((price.value, worth.value) for _, _, price, worth in measured)]
        higher = first.score is None or first.score.higher_is_better
        flags = rows.frontier(pairs, higher)
        best[cost] = {number for number, on in zip(numbers, flags, strict=True) if on}
    return best


def _picture(sweep: Sweep, made: Sequence[Row | None]) -> str:
    """The panels as SVG; "" where nothing was measured."""
    best, first = _best(made), _first(made)
    panels = []
    for cost, title in _COSTS.items():
        measured = _measured(made, cost)
        if not measured or first is None or first.dense_worth is None:
            continue
        dense = first.dense_worth
        marks = [Mark("dense", (1.0, 1.0, 1.0), (dense, dense, dense), "dense", DENSE in best[cost])]
        for at, _, price, worth in measured:
            row = made[at]
            assert row is not None
            marks.append(
                Mark(
                    row.value,
                    (price.value, price.low, price.high),
                    (worth.value, worth.low, worth.high),
                    row.outcome,
                    at in best[cost],
                    _link(sweep, row),
                )
            )
        panels.append(Panel(title, tuple(marks)))
    if not panels or first is None:
        return ""
    unit = f", {first.score.unit}" if first.score is not None and first.score.unit else ""
    return svg(panels, f"{_score_name(first)}{unit}", first.score is None or first.score.share)
