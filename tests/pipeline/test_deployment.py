"""What was asked before is answered from the store; whatever could make another answer goes to the runner."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

from pipeline import deployment, runner
from pipeline.recipe.config import Config, load
from pipeline.release import fingerprint, journal, records
from tests.pipeline.release.fabricated import writable


class Said:
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


@pytest.fixture
def asked(artifacts, tmp_path) -> Config:
    """A store whose one version was made for the request that is this recipe: resnet18 on the digits."""
    shutil.copytree(artifacts, tmp_path / "artifacts", symlinks=True)
    config = Config(model="resnet18", name="tiny", artifacts=tmp_path / "artifacts")
    version = writable(tmp_path / "artifacts" / "tiny" / "v0001")
    request = deployment.request_of("resnet18", None, config)
    records.write(version, records.read(version).model_copy(update={"request": request}))
    (tmp_path / "artifacts" / journal.FILE).unlink()
    return config


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """What reaches the runner, which does nothing here."""
    models: list[str] = []
    monkeypatch.setattr(runner, "run", lambda model, *args, **options: models.append(model))
    return models


def test_what_was_asked_before_is_answered_from_the_store(asked, ran):
    said = Said()
    release = deployment.deploy("resnet18", config=asked, progress=said)
    assert (release.folder.name, ran) == ("v0001", [])
    assert [line for line in said.lines if line.endswith("reused from v0001")] == said.lines[:8]
    assert "Nothing changed since v0001." in said.lines


def test_nothing_heavy_is_loaded_for_that(asked):
    code = (
        "import sys; from pathlib import Path\n"
        "from pipeline import deployment; from pipeline.recipe.config import Config\n"
        f"config = Config(model='resnet18', name='tiny', artifacts=Path({str(asked.artifacts)!r}))\n"
        "assert deployment.deploy('resnet18', config=config) is not None\n"
        "print({'torch', 'torchvision', 'sklearn', 'onnxruntime'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("resnet34", {}),
        ("resnet18", {"prune.ratio": 0.4}),
        ("resnet18", {"seed": 1}),
        ("resnet18", {"data.input_size": [3, 64, 64]}),
    ],
)
def test_another_request_is_run(asked, ran, model, settings):
    given = {"model": "resnet18", "name": "tiny", "artifacts": asked.artifacts} | settings
    deployment.deploy(model, config=load(None, given))
    assert ran == [model]


def test_from_and_until_are_run(asked, ran):
    deployment.deploy("resnet18", config=asked, start="prune")
    deployment.deploy("resnet18", config=asked, until="prune")
    assert ran == ["resnet18"] * 2


def test_a_changed_byte_or_an_interrupted_run_is_not_taken_for_an_answer(asked, ran):
    version = asked.artifacts / "tiny" / "v0001"
    (version.parent / ".partial").mkdir()
    deployment.deploy("resnet18", config=asked)
    (version.parent / ".partial").rmdir()
    report = version / "report.md"
    report.chmod(0o644)
    report.write_text(report.read_text() + "one word more")
    deployment.deploy("resnet18", config=asked)
    assert ran == ["resnet18"] * 2


def test_changed_code_tools_or_host_make_another_request(asked, monkeypatch):
    before = deployment.request_of("resnet18", None, asked)
    for name in ("project_digest", "tools", "host_facts"):
        with monkeypatch.context() as patch:
            patch.setattr(fingerprint, name, lambda: "another")
            assert deployment.request_of("resnet18", None, asked) != before


def test_files_are_known_by_their_bytes(tmp_path):
    arrays, weights = tmp_path / "d.npz", tmp_path / "w.pt"
    seen = set()
    for value in (0.0, 1.0):
        np.savez(arrays, x=np.full((4, 3, 8, 8), value), y=np.arange(4))
        weights.write_bytes(b"%f" % value)
        given = {"baseline.weights": str(weights)}
        seen.add(deployment.request_of("resnet18", f"npz:{arrays}", Config()))
        seen.add(deployment.request_of("resnet18", "digits", load(None, given)))
    assert len(seen) == 4
    assert "" not in seen


@pytest.mark.parametrize("model", ["net.py:build", "package.module:build", "hf:bert", object()])
def test_what_own_code_may_read_is_not_known_beforehand(model):
    assert deployment.request_of(model, None, Config()) == ""
    assert deployment.request_of("resnet18", "imagefolder:photos", Config()) == ""
    assert deployment.request_of("resnet18", {"train": []}, Config()) == ""
