"""What `verify`, `gate` and `promote` see: any byte that changed, anything added, a version that is another's."""

import contextlib
import json
import os
import shutil

import pytest
from click.testing import CliRunner

from foundation.errors import StoreError, VersionError
from pipeline import runner
from pipeline.artifacts.verdict import Promoted, Validated
from pipeline.cli import main
from pipeline.release import checks, journal, promotion, records, reuse, store
from tests.pipeline.release.fabricated import made, seal_again, validated, writable


@pytest.fixture
def version(tmp_path):
    return writable(made(tmp_path))


def test_what_was_sealed_has_no_fault(version):
    assert checks.faults(version) == []


EDITS = {
    "project": "9", "model": "other", "created": "2020-01-01T00:00:00Z", "model_fingerprint": "f",
    "data_fingerprint": "f",
    "reused": {"7-validate": "v0009"}, "parents": {}, "tools": {"torch": "9"}, "host": {"cpu": "x"},
    "git": {"commit": "x"}, "request": "x", "name": "other", "version": "v0009", "recipe": "0", "stages": [],
}  # fmt: skip


@pytest.mark.parametrize("field", EDITS)
def test_every_line_of_the_manifest_counts(version, field):
    path = version / records.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: EDITS[field]}))
    assert checks.faults(version)


@pytest.mark.parametrize("field", EDITS)
def test_the_log_knows_the_manifest_when_the_file_beside_it_was_made_right(version, field):
    path = version / records.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: EDITS[field]}))
    (version / records.SEAL).write_text(f"{records.seal_of(version)}  {records.MANIFEST}\n")
    assert any("releases.jsonl" in fault for fault in checks.faults(version))


def test_the_seal_is_a_file_that_sha256sum_reads(version):
    digest, name = (version / records.SEAL).read_text().split()
    assert (digest, name) == (records.seal_of(version), "manifest.json")
    (version / records.SEAL).unlink()
    assert checks.faults(version)


def test_no_parents_is_a_fault_even_where_all_hashes_were_made_right(version, tmp_path):
    made_again = records.read(version).model_copy(update={"parents": {}})
    records.write(version, made_again)
    (tmp_path / journal.FILE).unlink()
    assert any("dense weights" in fault for fault in checks.faults(version))
    records.write(version, made_again.model_copy(update={"parents": {"grandmother": "x"}}))
    assert any("grandmother" in fault for fault in checks.faults(version))


@pytest.mark.parametrize("place", ["", "4-shrink", "7-validate"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "file", "pipe in place of a file"])
def test_the_tree_is_exact(version, place, kind):
    stray = version / place / "stray"
    if kind == "folder":
        stray.mkdir()
    elif kind == "file":
        stray.write_text("x")
    elif kind == "pipe":
        os.mkfifo(stray)
    else:
        stray = version / "7-validate" / "artifact.json"
        stray.unlink()
        os.mkfifo(stray)
    assert any(stray.name in fault for fault in checks.faults(version))


def test_a_copy_under_another_number_or_model_is_refused_everywhere(version, tmp_path):
    for copy in (tmp_path / "m" / "v0002", tmp_path / "other" / "v0001"):
        shutil.copytree(version, copy)
        assert any("is that of m/v0001" in fault for fault in checks.faults(copy))
        with pytest.raises(StoreError, match="is that of m/v0001"):
            promotion.promote(copy, forced=True, reason="hurry")
        done = CliRunner().invoke(main, ["gate", f"{copy.parent.name}/{copy.name}", "--out", str(tmp_path)])
        assert done.exit_code not in (0, 1)


def test_a_bundle_that_is_not_what_was_raced_shows(version):
    (version / "bundle").mkdir()
    (version / "bundle" / "model.onnx").write_bytes(b"another")
    seal_again(version)
    assert any("none of the files in 6-optimize" in fault for fault in checks.faults(version))


def test_gate_believes_no_version_that_was_changed(tmp_path):
    version = writable(made(tmp_path, "fail"))
    runner = CliRunner()
    assert runner.invoke(main, ["gate", "m/v0001", "--out", str(tmp_path)]).exit_code == 1
    recipe = version / records.RECIPE
    recipe.write_text(recipe.read_text().replace("max_latency_ratio = 1.0", "max_latency_ratio = 99.0"))
    done = runner.invoke(main, ["gate", "m/v0001", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "config.toml was changed" in done.output


def test_promote_judges_again_what_a_stored_verdict_says(tmp_path):
    version = writable(made(tmp_path, "fail"))
    validated(version / "7-validate", "pass")
    passing = (version / "7-validate" / "artifact.json").read_text()
    validated(version / "7-validate", "fail")
    figures = json.loads((version / "7-validate" / "artifact.json").read_text())
    figures["verdict"] = json.loads(passing)["verdict"]
    (version / "7-validate" / "artifact.json").write_text(json.dumps(figures))
    seal_again(version)
    (tmp_path / journal.FILE).unlink()
    assert Validated.load(version / "7-validate").verdict.outcome == "pass"
    assert checks.faults(version) == []
    with pytest.raises(VersionError, match="its verdict is fail"):
        promotion.promote(version)
    assert store.current(tmp_path / "m") is None


@pytest.mark.parametrize("stages", [[], [{}], "x", None])
def test_a_manifest_that_is_none_is_an_error_and_no_traceback(version, stages):
    path = version / records.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stages": stages}))
    with contextlib.suppress(StoreError):
        assert checks.faults(version)


def test_a_model_file_that_was_cut_is_a_fault_and_no_traceback(version):
    exported = version / "5-export" / "model.onnx"
    exported.write_bytes(exported.read_bytes()[: exported.stat().st_size // 2])
    found = checks.faults(version)
    assert any("model.onnx was changed" in fault for fault in found)
    assert any("model.onnx cannot be read" in fault for fault in found)


def test_a_damaged_version_stands_in_nobodys_way(tmp_path):
    """What it was is not known: it is not compared with, answered with or kept for, and the next version is made."""
    first, second = made(tmp_path), made(tmp_path, parent="v0001")
    promotion.promote(first)
    recipe = (first / records.RECIPE).read_text()
    (writable(first) / records.MANIFEST).write_text("{")
    said: list[str] = []
    assert reuse.compared_with(tmp_path / "m", {}, said.append) == Promoted()
    assert "v0001 is damaged" in said[0]
    assert runner._same_version(tmp_path / "m", recipe, []) is None
    (writable(second) / records.MANIFEST).write_text("{")
    assert promotion.removable(tmp_path / "m", keep=1) == []
    assert made(tmp_path).name == "v0003"
