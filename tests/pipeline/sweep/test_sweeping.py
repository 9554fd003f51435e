"""A whole sweep on a tiny net: one version for each value, a page, and going on after being broken off."""

import json
import time
from pathlib import Path

import pytest

from foundation.errors import ConfigError, DataError, TargetError, TrainingError
from pipeline import deployment
from pipeline.progress import Progress
from pipeline.recipe import config
from pipeline.release.opening import open_release
from pipeline.sweep import pages, points, running
from tests.pipeline.chain import QUICK, TINY, forked, leanort

MODEL = f"{TINY}:build"
SWEEP = ["sweep", MODEL, *QUICK, "--quiet"]


def told(folder: Path) -> dict:
    return json.loads((folder / "tiny" / pages.JSON).read_text())


def versions(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "tiny").glob("v*"))


@pytest.fixture
def sweep(tmp_path) -> points.Sweep:
    given = {"model": MODEL, "name": "tiny", "artifacts": str(tmp_path)}
    return points.sweep("macs", ("0.8", "0.6"), lambda value: config.load(None, {**given, "prune.target.macs": value}))


def answers(monkeypatch, *results: object) -> list[dict]:
    """`deploy` gives these, one after the other; what it was called with."""
    left, asked = list(results), []

    def deploy(model: object, data: object, recipe: config.Config, **more: object) -> object:
        asked.append({"macs": recipe.prune.target.macs, **more})
        result = left.pop(0)
        if isinstance(result, BaseException):
            raise result
        return result

    monkeypatch.setattr(deployment, "deploy", deploy)
    return asked


def test_a_point_that_fails_is_a_row_and_the_others_go_on_and_none_is_promoted(sweep, deployed, monkeypatch):
    release = open_release(deployed / "tiny" / "v0001")
    asked = answers(monkeypatch, TargetError("The target cannot be reached."), release)
    first, second = running.run(sweep, Progress())
    assert (first.code, first.outcome, first.version) == (2, "refused", "")
    assert (second.code, second.outcome, second.version) == (0, "pass", "v0001")
    assert [(call["macs"], call["promote"]) for call in asked] == [("0.8", False), ("0.6", False)]


@pytest.mark.parametrize(
    ("error", "said"), [(TrainingError("NaN"), "NaN"), (KeyError("x"), "A bug in leanort: KeyError")]
)
def test_a_point_that_breaks_is_a_row_too(sweep, deployed, monkeypatch, error, said):
    answers(monkeypatch, error, open_release(deployed / "tiny" / "v0001"))
    first, second = running.run(sweep, Progress())
    assert (first.code, first.outcome, second.code) == (3, "broken", 0)
    assert said in first.reasons[0]


@pytest.mark.parametrize("error", [DataError("empty"), ConfigError("no such key"), PermissionError("read-only")])
def test_what_is_wrong_with_every_point_ends_the_sweep_and_leaves_no_page(sweep, monkeypatch, error):
    asked = answers(monkeypatch, error)
    with pytest.raises(type(error)):
        running.run(sweep, Progress())
    assert len(asked) == 1
    assert not sweep.folder.exists()


@pytest.mark.parametrize("words", [["--set", "prune.criterion=taylr"], ["--set", 'prune.overrides={"nosuch*"=0.1}']])
def test_a_slip_in_the_recipe_leaves_the_page_of_the_sweep_before(tmp_path, words):
    page = tmp_path / "tiny" / pages.HTML
    page.parent.mkdir()
    page.write_text("of before")
    done = leanort(tmp_path, *SWEEP, "--macs", "0.8,0.5", *words)
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert page.read_text() == "of before"
    assert not (page.parent / pages.JSON).exists()


def test_a_folder_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    done = leanort(tmp_path / "file", *SWEEP, "--latency", "0.8,0.5")
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1


def test_the_page_is_written_after_every_point(sweep, deployed, monkeypatch):
    answers(monkeypatch, open_release(deployed / "tiny" / "v0001"), KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        running.run(sweep, Progress())
    outcomes = [point["outcome"] for point in json.loads((sweep.folder / pages.JSON).read_text())["points"]]
    assert outcomes == ["pass", "not made yet"]


@pytest.mark.examples
def test_a_whole_sweep_that_was_killed_goes_on_and_is_answered_when_it_is_asked_again(artifacts):
    words = [*SWEEP, "--macs", "0.8,0.5,0.001"]
    before = versions(artifacts)
    with forked(artifacts, *words) as (process, _, _):
        until = time.monotonic() + 200
        while not (artifacts / "tiny" / pages.JSON).exists():
            assert process.is_alive()
            assert time.monotonic() < until
            time.sleep(0.05)
    first = told(artifacts)
    assert [point["outcome"] for point in first["points"]][1:] == ["not made yet", "not made yet"]
    done = leanort(artifacts, *words)
    assert done.returncode == 2, done.stderr
    assert "The target cannot be reached" in done.stdout
    found = told(artifacts)
    assert found["points"][0] == {**first["points"][0], "on_frontier": found["points"][0]["on_frontier"]}
    assert [point["outcome"] == "refused" for point in found["points"]] == [False, False, True]
    assert versions(artifacts) == [*before, *(point["version"] for point in found["points"][:2])]
    for point in found["points"][:2]:
        reused = json.loads((artifacts / "tiny" / point["version"] / "manifest.json").read_text())["reused"]
        assert {"0-baseline"} <= reused.keys()
        assert point["figures"]["aim"]["expected"] <= float(point["value"])
    assert (artifacts / "tiny" / "current").resolve().name == "v0001"
    again = leanort(artifacts, *words)
    assert again.returncode == 2
    assert versions(artifacts) == [*before, *(point["version"] for point in found["points"][:2])]


@pytest.mark.examples
def test_two_workers_make_each_point_once(artifacts, tmp_path):
    words = [*SWEEP, "--ratio", "0.2,0.4", "--storage", f"sqlite:///{tmp_path / 'sweep.db'}"]
    before = versions(artifacts)
    with forked(artifacts, *words) as (one, _, said), forked(artifacts, *words) as (other, _, heard):
        for process in (one, other):
            process.join(280)
        assert (one.exitcode, other.exitcode) in ((0, 0), (1, 1), (4, 4)), said.read_text() + heard.read_text()
    assert len(versions(artifacts)) == len(before) + 2
    found = told(artifacts)
    assert {point["version"] for point in found["points"]} == set(versions(artifacts)) - set(before)
    assert leanort(artifacts, *words).returncode == one.exitcode
    assert len(versions(artifacts)) == len(before) + 2
