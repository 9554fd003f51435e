"""A verdict as people and CI read it: in words, verdict.json with its published schema, junit.xml, Markdown."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

from pydantic import BaseModel, ConfigDict, Field

from foundation.errors import StoreError
from pipeline.gate.policy import finite
from pipeline.report.figures import significant
from pipeline.report.templating import markdown
from validators.gates import Check, Measured, Outcome, Verdict
from validators.scores_lost import ScoreLost

MARKDOWN, JUNIT, VERDICT = "report.md", "junit.xml", "verdict.json"
SCHEMA = Path(__file__).parent / "schemas" / "verdict.schema.json"
EXIT_CODES: Mapping[Outcome, int] = {"pass": 0, "fail": 1, "inconclusive": 4}
_BOUNDS = {"<=": "at most", "<": "less than", ">=": "at least", ">": "more than", "==": "exactly"}


FORMAT = 2
"""Of verdict.json."""


@dataclass(frozen=True)
class Told:
    """What a model is for, and its scores of dense and shipped."""

    task: str
    scores: tuple[ScoreLost, ...]


class VerdictFile(BaseModel):
    """verdict.json: one judgement of one model. A number that was not measured, or is not finite, is null."""

    model_config = ConfigDict(extra="forbid")

    format: int = Field(FORMAT, description="of this file; 1 had no task and no scores")
    model: str = Field(description="the model's name, or the path of an ONNX file")
    version: str = Field(description="the version's folder; empty for a file from elsewhere")
    outcome: Outcome
    exit_code: int = Field(description="0 pass, 1 fail, 4 inconclusive")
    reasons: tuple[str, ...] = Field(description="one line for each required limit that did not pass")
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = Field(description="limits that were not judged, and what disturbed the measurement")
    task: str = Field("", description="what the model is for; empty where no data was given")
    scores: tuple[ScoreLost, ...] = Field(
        (), description="scores of dense and shipped on the test part, first the one that is gated"
    )
    measurements: dict[str, Measured | None] = Field(description="all that was measured, by the names that limits use")


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


def judged(check: Check) -> Judged:
    """`check` in words; with as many digits as it takes to tell the measured value from the limit."""
    name = _capital(check.limit.metric)  # as it is: it may hold the names of files
    required = check.limit.level == "required"
    bound = _BOUNDS[check.limit.operator]
    if check.measured is None:
        limit = f"{bound} {significant(check.limit.value)}"
        return Judged(name, check.outcome, required, "–", "", limit, f"{_capital(check.reason).rstrip('.')}.")
    known, wanted = (check.measured.value, check.measured.low, check.measured.high), check.limit.value
    apart = [figure for figure in known if figure != wanted]
    digits = next((d for d in range(3, 17) if all(significant(f, d) != significant(wanted, d) for f in apart)), 17)
    value, low, high, limit = (significant(figure, digits) for figure in (*known, wanted))
    interval = f"{low} to {high}" if low != high else ""
    shown = f"{value} ({interval})" if interval else value
    told = significant((check.measured.high - check.measured.low) / 2, 2)
    words = {
        "pass": f"{name}: {shown}, as asked for ({bound} {limit}).",
        "fail": f"{name}: {shown}, but {bound} {limit} is asked for.",
        "inconclusive": f"{name}: {shown}; {bound} {limit} is asked for, and the measurement cannot tell "
        f"differences of less than {told}.",
    }
    return Judged(name, check.outcome, required, value, interval, f"{bound} {limit}", words[check.outcome])


def _capital(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


def reasons(verdict: Verdict, checks: Sequence[Judged]) -> list[str]:
    """Why it is no pass, and the warnings; the verdict's own reasons where no single check is to blame."""
    to_blame = [check.words for check in checks if check.required and check.outcome != "pass"]
    warnings = [f"Warning: {check.words}" for check in checks if not check.required and check.outcome != "pass"]
    return [*(to_blame or verdict.reasons), *warnings]


def verdict_json(
    model: str,
    version: str,
    verdict: Verdict,
    notes: Sequence[str] = (),
    measurements: Mapping[str, Measured | None] | None = None,
    told: Told | None = None,
) -> str:
    """verdict.json; a figure that is not finite becomes null, which every parser can read."""
    made = VerdictFile(
        model=model,
        version=version,
        outcome=verdict.outcome,
        exit_code=EXIT_CODES[verdict.outcome],
        reasons=verdict.reasons,
        checks=verdict.checks,
        notes=tuple(notes),
        task=told.task if told else "",
        scores=told.scores if told else (),
        measurements={key: finite(value) for key, value in (measurements or {}).items()},
    )
    return made.model_dump_json(indent=2) + "\n"


def schema() -> str:
    """The JSON Schema of verdict.json, as published beside this file."""
    made = {"$schema": "https://json-schema.org/draft/2020-12/schema", **VerdictFile.model_json_schema()}
    return json.dumps(made, indent=2) + "\n"


def summary(model: str, version: str, verdict: Verdict, notes: Sequence[str] = ()) -> str:
    """A verdict in a few lines of GitHub Markdown."""
    checks = [judged(check) for check in verdict.checks]
    context = {
        "subject": f"{model} {version}".strip(),
        "verdict": verdict.outcome,
        "reasons": reasons(verdict, checks),
        "checks": checks,
        "notes": notes,
    }
    return markdown().get_template("verdict.md.j2").render(context) + "\n"


def write(
    folder: Path,
    model: str,
    version: str,
    verdict: Verdict,
    notes: Sequence[str],
    found: Mapping[str, Measured | None],
    told: Told | None = None,
) -> None:
    """Write verdict.json, junit.xml and report.md into `folder`. Raises StoreError where that cannot be."""
    checks = [judged(check) for check in verdict.checks]
    texts = {
        VERDICT: verdict_json(model, version, verdict, notes, found, told),
        JUNIT: junit(model, version, checks, datetime.now(UTC)),
        MARKDOWN: summary(model, version, verdict, notes),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise StoreError(f"{folder} cannot be written: {error.strerror}.", "Choose another one.") from None


def append_step_summary(text: str) -> bool:
    """Add Markdown to the page of a GitHub Actions run; whether there is one. Raises StoreError where that fails."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if not path:
        return False
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")
    except OSError as error:
        raise StoreError(f"$GITHUB_STEP_SUMMARY, {path}, cannot be written: {error.strerror}.") from None
    return True


def junit(model: str, version: str, checks: Sequence[Judged], made: datetime) -> str:
    """JUnit XML: one test case per check, and one that fails where nothing was judged.

    An unmet limit is a failure and an undecided one an error; an unmet warning passes, its reason in the output, so
    that CI is red exactly where the verdict is not a pass.
    """
    suite = ElementTree.Element("testsuite", name=f"leanort {model} {version}".strip())
    counts = {"tests": 0, "failures": 0, "errors": 0}
    for check in checks:
        case = ElementTree.SubElement(suite, "testcase", classname=f"leanort.{model}", name=check.name)
        counts["tests"] += 1
        if check.outcome == "pass":
            continue
        if check.required:
            tag = "failure" if check.outcome == "fail" else "error"
            counts[f"{tag}s"] += 1
            ElementTree.SubElement(case, tag, message=check.words).text = check.words
        else:
            ElementTree.SubElement(case, "system-out").text = f"Warning: {check.words}"
    if not checks:
        case = ElementTree.SubElement(suite, "testcase", classname=f"leanort.{model}", name="Verdict")
        ElementTree.SubElement(case, "failure", message="Nothing was judged.").text = "Nothing was judged."
        counts = {"tests": 1, "failures": 1, "errors": 0}
    suite.attrib |= {name: str(count) for name, count in counts.items()}
    suite.set("timestamp", made.isoformat(timespec="seconds"))
    for element in suite.iter():
        element.attrib.update({name: _xml_text(value) for name, value in element.attrib.items()})
        element.text = _xml_text(element.text) if element.text else None
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _xml_text(text: str) -> str:
    """`text` without the characters that XML 1.0 cannot hold at all (section 2.2), such as NUL."""
    return re.sub(r"[^\t\n\r\x20-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]", "\N{REPLACEMENT CHARACTER}", text)
