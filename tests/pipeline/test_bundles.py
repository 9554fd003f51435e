"""Bundles from the command line, and what is left on a disk by onnxruntime."""

import gzip
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from exporters import check, unpack
from foundation.errors import ExportError, VersionError
from pipeline.artifacts.race import Optimized
from pipeline.release import bundling
from tests.exporters.bundles import reseal, rewrite


def reported(home: Path) -> list[str]:
    return [str(path) for path in home.rglob("*") if {"onnxruntime", "Microsoft", ".ses"} & set(path.parts)] + [
        str(path) for path in home.rglob("*onnxruntime*")
    ]


def test_a_deployment_a_gate_and_a_bundle_leave_nothing_of_onnxruntimes(artifacts, environment, home, tmp_path):
    version = artifacts / "tiny" / "v0001"
    dense, small = str(version / "0-baseline" / "dense.onnx"), str(version / "5-export" / "model.onnx")
    archive = str(tmp_path / "tiny.tar.gz")
    for words in (
        ["gate", small, "--against", dense, "--data", "digits", "--input-size", "3,16,16", "--seconds", "0.2"],
        ["check", dense, small, "--seconds", "0.2"],
        ["bundle", "tiny", "-o", archive, "--out", str(artifacts)],
        ["bundle", archive, "--check"],
    ):
        start = [sys.executable, "-m", "pipeline", *words]
        done = subprocess.run(start, capture_output=True, text=True, timeout=250, env=environment)
        assert done.returncode in (0, 1, 4), (words, done.stderr)
        assert "error:" not in done.stderr, (words, done.stderr)
    for code in ("import pipeline", "import exporters", "import validators"):
        code += ", onnxruntime; onnxruntime.get_available_providers()"
        assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
    assert reported(home) == []


def test_the_probe_would_see_it(environment, tmp_path):
    """onnxruntime before 1.31 reports nothing anyway."""
    import onnxruntime

    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 31) or sys.platform != "linux":
        pytest.skip("this onnxruntime reports nothing")
    moved = {**environment, "ORT_DISABLE_TELEMETRY": "0"} | dict.fromkeys(("HOME", "TMPDIR"), str(tmp_path))
    code = "import pipeline, exporters, onnxruntime; onnxruntime.get_available_providers()"
    assert subprocess.run([sys.executable, "-c", code], env=moved).returncode == 0
    assert reported(tmp_path)


@pytest.fixture
def version(artifacts, tmp_path) -> Path:
    """A copy that can be changed."""
    copy = shutil.copytree(artifacts / "tiny" / "v0001", tmp_path / "tiny" / "v0001")
    for path in (copy, *copy.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return copy


def test_a_version_whose_shipped_file_fails_its_golden_answers_is_not_packed(version, tmp_path):
    """All hashes are right; another variant in the bundle would pass."""
    folder, archive = version / "bundle", tmp_path / "x.tar.gz"
    shipped = Optimized.load(version / "6-optimize").winner
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["variants"][0]["file"] == shipped.file
    assert len(manifest["variants"]) > 1
    with np.load(folder / "golden.npz") as golden:
        kept = dict(golden)
    kept["output_0"] += np.float32(0.01)
    np.savez(tmp_path / "golden.npz", **kept)
    rewrite(folder, "golden.npz", (tmp_path / "golden.npz").read_bytes())
    reseal(folder, lambda manifest: [one.update(tolerance=0.5) for one in manifest["variants"][1:]])
    report = check(folder)
    assert report["variants"][shipped.name]["status"] == "fail"
    assert report["ok"]
    with pytest.raises(ExportError, match=f"ships {shipped.name}, which fails its self-test"):
        bundling.pack(version, archive)

    def another_first(manifest):
        manifest["variants"].reverse()
        manifest["metadata"]["leanort.ships"] = manifest["variants"][0]["name"]

    reseal(folder, another_first)
    with pytest.raises(ExportError, match=f"does not ship {shipped.name}"):
        bundling.pack(version, archive)
    assert not archive.exists()


def test_a_bundle_that_holds_another_file_than_was_chosen_is_not_packed(version, tmp_path):
    shipped = Optimized.load(version / "6-optimize").winner.file
    rewrite(version / "bundle", shipped, b"another")
    with pytest.raises(VersionError, match=f"does not hold 6-optimize/{shipped}, which ships"):
        bundling.pack(version, tmp_path / "x.tar.gz")


def test_a_hostile_archive_is_one_line_and_leaves_nothing(tmp_path, environment, home):
    entry = tarfile.TarInfo("b/x")
    entry.size = 8 << 30
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(entry.tobuf(tarfile.GNU_FORMAT) + bytes(2048)))
    before = sorted(home.iterdir())
    words = [sys.executable, "-m", "pipeline", "bundle", str(tmp_path / "x.tar.gz"), "--check"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 3
    assert done.stdout == ""
    assert "at most 1000 of" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(home.iterdir()) == before


def test_a_packed_bundle_starts_on_a_device_by_either_program(version, tmp_path):
    bundling.pack(version, tmp_path / "tiny.tar.gz")
    unpack(tmp_path / "tiny.tar.gz", tmp_path / "there")
    done = subprocess.run([sys.executable, "selftest.py"], capture_output=True, text=True, cwd=tmp_path / "there")
    assert done.returncode == 0, done.stdout
    assert json.loads(done.stdout)["ships"] == Optimized.load(version / "6-optimize").shipped
    (tmp_path / "photos").mkdir()
    done = subprocess.run(
        [sys.executable, "serve.py", "../photos"], capture_output=True, text=True, cwd=tmp_path / "there"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
