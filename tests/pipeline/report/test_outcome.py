"""What CI reads: the published schema, JUnit, the step summary."""

import json
import math
from datetime import UTC, datetime
from xml.etree import ElementTree

import jsonschema
import pytest

from foundation.errors import StoreError
from pipeline.report import outcome
from validators import Limit, Measured, judge

LIMITS = [
    Limit(metric="good", operator="<=", value=1),
    Limit(metric="bad", operator="<=", value=1),
    Limit(metric="unsure", operator="<=", value=1),
    Limit(metric="missing", operator="<=", value=1),
    Limit(metric="warned", operator="<=", value=1, level="warn"),
]
VERDICT = judge({"good": 0, "bad": 2, "unsure": Measured(value=1, low=0, high=2), "warned": 2}, LIMITS)


def test_the_published_schema_is_that_of_the_code_and_is_a_schema():
    published = outcome.SCHEMA.read_text()
    assert published == outcome.schema(), "write outcome.schema() to the file"
    jsonschema.Draft202012Validator.check_schema(json.loads(published))


def test_verdict_json_fits_the_schema_and_holds_no_nan():
    schema = json.loads(outcome.SCHEMA.read_text())
    found = {"a": Measured(value=math.nan, low=0, high=1), "b": None, "c": Measured(value=1, low=0, high=2)}
    text = outcome.verdict_json("m", "v0001", VERDICT, ["note"], found)
    made = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    jsonschema.validate(made, schema)
    assert (made["outcome"], made["exit_code"], made["measurements"]["a"]) == ("fail", 1, None)
    for key in ("outcome", "checks", "reasons"):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({k: v for k, v in made.items() if k != key}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(made | {"outcome": "maybe"}, schema)


def test_junit_has_one_case_per_check_red_where_it_did_not_pass():
    checks = [outcome.judged(check) for check in VERDICT.checks]
    suite = ElementTree.fromstring(outcome.junit("m", "v1", checks, datetime.now(UTC)))
    cases = {case.get("name"): [child.tag for child in case] for case in suite}
    assert cases == {
        "Good": [],
        "Bad": ["failure"],
        "Unsure": ["error"],
        "Missing": ["failure"],
        "Warned": ["system-out"],
    }
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("5", "2", "1")


def test_nothing_judged_is_a_failed_case_and_no_empty_suite():
    suite = ElementTree.fromstring(outcome.junit("m", "v1", [], datetime.now(UTC)))
    assert [child.tag for case in suite for child in case] == ["failure"]
    assert suite.get("failures") == "1"


def test_the_step_summary_is_appended_only_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    assert not outcome.append_step_summary("text")
    page = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    for _ in range(2):
        assert outcome.append_step_summary(outcome.summary("m|x", "", VERDICT, ["a <b>"]))
    assert page.read_text().count("### m\\|x: fail") == 2
    assert "| Bad | fail | 2.00 | at most 1.00 |" in page.read_text()
    assert "- Note: a \\<b\\>" in page.read_text()
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "no" / "summary.md"))
    with pytest.raises(StoreError, match="GITHUB_STEP_SUMMARY"):
        outcome.append_step_summary("text")
