"""The frontier, the rows, and the page that holds them."""

import json
import re

import pytest

from foundation.errors import CaptureError, ConfigError, ExportError
from pipeline.artifacts.eager import Aim
from pipeline.recipe import config
from pipeline.sweep import pages, points, rows
from pipeline.sweep.rows import Figures, Row
from validators.gates import Measured
from validators.scores_lost import ScoreLost


def test_the_frontier_by_hand():
    cheap, middle, dear, worse, equal = (0.2, 0.8), (0.5, 0.9), (1.0, 0.95), (0.6, 0.85), (0.5, 0.9)
    assert rows.frontier([cheap, middle, dear, worse, equal]) == [True, True, True, False, True]


def test_a_point_that_costs_more_for_the_same_is_not_on_it():
    assert rows.frontier([(0.2, 0.8), (0.3, 0.8)]) == [True, False]
    assert rows.frontier([(0.2, 0.7), (0.2, 0.8)]) == [False, True]


def test_where_lower_is_better_the_frontier_is_the_other_one():
    assert rows.frontier([(0.2, 3.0), (0.5, 2.0), (0.6, 2.5)], higher_is_better=False) == [True, True, False]


def score(shipped=0.9, low=2.0, high=8.0, share=True, higher=True, dense=0.95, name="accuracy") -> ScoreLost:
    drop = Measured(value=5.0, low=low, high=high)
    return ScoreLost(
        name=name, dense=dense, shipped=shipped, samples=100, share=share, higher_is_better=higher, drop=drop, p_value=1
    )


def figures(latency=0.4, size=400, **more) -> Figures:
    given = {
        "aim": Aim(
            quantity="latency", name="latency (1 thread, batch 1)", unit="ms", dense=8.0, goal=0.4, predicted=0.38,
            expected=0.41, measured=True, attempts=2, error=0.03,
        ),
        "score": score(), "agreement": None, "latency_ms": 8 * latency, "dense_latency_ms": 8.0,
        "latency": Measured(value=latency, low=latency - 0.02, high=latency + 0.02), "threads": 1, "bytes": size,
        "dense_bytes": 1000, "params": 10, "dense_params": 20, "macs": 30, "dense_macs": 40,
    }  # fmt: skip
    return Figures(**{**given, **more})


def test_where_the_score_of_what_ships_may_lie():
    worth = figures().worth
    assert (worth.value, round(worth.low, 6), round(worth.high, 6)) == (0.9, 0.87, 0.93)
    error = figures(score=score(shipped=2.1, share=False, higher=False, dense=2.0)).worth  # in per cent of dense
    assert (error.value, round(error.low, 6), round(error.high, 6)) == (2.1, 2.04, 2.16)


def test_without_labels_the_agreement_stands_for_the_score():
    found = figures(score=None, agreement=0.97)
    assert (found.worth.value, found.dense_worth) == (0.97, 1.0)
    assert figures(score=None).worth is None


def test_the_worst_code_of_all_points():
    made = {code: Row(value="x", code=code, outcome="pass") for code in (0, 1, 2, 3, 4)}
    assert rows.exit_code([made[0], made[0]]) == 0
    assert rows.exit_code([made[0], made[4]]) == 4
    assert rows.exit_code([made[4], made[1]]) == 1
    assert rows.exit_code([made[1], made[2]]) == 2
    assert rows.exit_code([made[2], made[3]]) == 3
    assert rows.exit_code([made[0], None]) == 3


def test_a_reason_is_a_row_with_deploys_code():
    assert rows.without("0.1", ConfigError("too little", "ask for more")).model_dump(include={"code", "reasons"}) == {
        "code": 2, "reasons": ("too little", "ask for more"),
    }  # fmt: skip
    assert rows.without("0.1", CaptureError("no")).code == 3
    assert rows.without("0.1", ExportError("no")).outcome == "broken"


@pytest.fixture
def sweep(tmp_path) -> points.Sweep:
    given = {"model": "resnet50", "artifacts": str(tmp_path)}
    return points.sweep(
        "latency",
        ("0.6", "0.4", "0.3", "0.1"),
        lambda value: config.load(None, {**given, "prune.target.latency": value}),
    )


@pytest.fixture
def made(sweep) -> list[Row | None]:
    report = sweep.folder / "v0002" / "report.html"
    report.parent.mkdir(parents=True)
    report.write_text("a report")
    return [
        Row(value="0.6", code=0, outcome="pass", version="v0001", folder="/elsewhere/v0001", host="a",
            figures=figures(0.6, 600, score=score(0.94))),
        Row(value="0.4", code=1, outcome="fail", version="v0002", folder=str(report.parent), host="b",
            reasons=("Too <little> of it.",), figures=figures(0.4, 700, score=score(0.9))),
        rows.without("0.3", ConfigError("cannot be reached")),
        None,
    ]  # fmt: skip


def test_the_page_holds_every_point_and_leads_to_the_reports_that_are_there(sweep, made):
    text = pages.write(sweep, made).read_text()
    assert re.findall(r'<a href="([^"]*)">(\w+)', text) == [("v0002/report.html", "v0002")]
    assert set(re.findall(r'xlink:href="([^#"][^"]*)"', text)) == {"v0002/report.html"}
    for said in (
        "0.380",
        "± 0.022",
        "timed, 2 attempts",
        "0.580 to 0.620",
        "cannot be reached",
        "not made yet",
        "94.0%",
    ):
        assert said in text, said
    assert "Too &lt;little&gt; of it." in text
    assert "on 2 machines" in text


def test_the_page_needs_nothing_from_anywhere(sweep, made):
    text = pages.write(sweep, made).read_text()
    assert "<script" not in text
    assert "default-src 'none'" in text
    assert not re.findall(r'(?:src|href)="(?:https?:|//)', text)
    assert "@import" not in text


def test_the_frontier_of_latency_is_not_that_of_size(sweep, made):
    pages.write(sweep, made)
    told = json.loads((sweep.folder / pages.JSON).read_text())
    assert [point.get("on_frontier") for point in told["points"]] == [["latency", "size"], ["latency"], [], None]
    assert told["quantity"] == "latency"
    markdown = (sweep.folder / pages.MARKDOWN).read_text()
    assert [line.split("|")[-2].strip() for line in markdown.splitlines() if line.startswith("| latency")] == [
        "latency and size", "latency", "", "",
    ]  # fmt: skip


def test_a_first_version_without_a_score_does_not_hide_the_others(sweep, made, monkeypatch):
    drawn = []
    monkeypatch.setattr(pages, "svg", lambda *given: drawn.append(given) or "<svg>")
    broken = made[1].model_copy(update={"value": "0.6", "figures": figures(0.6, score=None)})
    text = pages.write(sweep, [broken, made[1], *made[2:]]).read_text()
    assert len(drawn) == 1, "Markdown shows no picture"
    assert drawn[0][1].startswith("Accuracy")
    assert "<svg>" in text
    assert '<td data-label="Accuracy" class="number">95.0%</td>' in text


def test_words_in_the_markdown_table_are_escaped_once(sweep):
    sure = Row(value="0.6", code=0, outcome="pass", figures=figures(score=None, agreement=0.9998))
    table = pages.summary(sweep, [sure, None, None, None])
    assert "| \\> 99.9 % |" in table.replace("\u00a0", " ").replace("99.9%", "99.9 %")


def test_a_page_of_nothing_but_refusals_and_one_of_odd_names_is_written(sweep, made):
    refused = [rows.without(point.value, ConfigError("no")) for point in sweep.points]
    assert "<svg" not in pages.write(sweep, refused).read_text()
    named = Row(value="0.6", code=0, outcome="pass", figures=figures(score=score(name="--> $x_ <b>", share=False)))
    text = pages.write(sweep, [named, None, None, None]).read_text()
    assert "<svg" in text
    assert "--> $x" not in text
    assert "<b>" not in text


def test_nothing_that_reads_a_folder_of_versions_minds_the_page(artifacts):
    from pipeline.release import promotion, store
    from tests.pipeline.chain import said

    before = said(artifacts, "list")
    folder = artifacts / "tiny"
    for name in (pages.HTML, pages.MARKDOWN, pages.JSON):
        (folder / name).write_text("{}")
    assert store.models(artifacts) == [folder]
    assert [version.name for version in store.versions(folder)] == ["v0001"]
    assert said(artifacts, "list") == before
    said(artifacts, "verify", "tiny")
    assert promotion.removable(folder, 0) == []
    said(artifacts, "gc", "tiny", "--keep", "0")
    assert (folder / pages.HTML).is_file()
