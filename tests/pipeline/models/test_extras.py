"""Without torchvision, timm or transformers: whatever needs one names its extra, and everything else works."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.release import fingerprint
from tests.pipeline.chain import TINY

EXTRAS = ("torchvision", "timm", "transformers")
ROOT = Path(__file__).resolve().parents[3]

# A hook in place of the import system's own finder: what is barred is neither found, nor known to importlib.metadata.
HOOK = """
import importlib.metadata, json, sys
from importlib.machinery import PathFinder

class Without:
    def __init__(self, finder, barred):
        self.finder, self.barred = finder, barred

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.barred:
            {refusal}
        return self.finder.find_spec(name, path, target)

    def find_distributions(self, context=importlib.metadata.DistributionFinder.Context()):
        return (d for d in self.finder.find_distributions(context) if d.metadata["Name"] not in self.barred)

barred = set(sys.argv.pop(1).split(","))
sys.meta_path[:] = [Without(f, barred) if f is PathFinder else f for f in sys.meta_path]
from click.testing import CliRunner
from pipeline.cli import main
ran = [CliRunner().invoke(main, words) for words in json.load(sys.stdin)]
json.dump([(done.exit_code, done.stdout, done.stderr) for done in ran], sys.stdout)
"""
ABSENT = HOOK.format(refusal="return None")
RAISES = HOOK.format(refusal='raise ModuleNotFoundError(f"No module named {name!r}", name=name)')


def plan(barred: tuple[str, ...], folder: Path, *models: list[str], hook: str = ABSENT) -> list[tuple[int, str, str]]:
    """`plan` for each of several models, all in one new process: the exit codes, and what went to stdout and stderr."""
    words = json.dumps([["plan", *model, "--out", str(folder)] for model in models])
    command = [sys.executable, "-c", hook, ",".join(barred)]
    done = subprocess.run(command, input=words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture
def photos(tmp_path) -> Path:
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "photos" / label / "0.png")
    return tmp_path / "photos"


@pytest.mark.parametrize("hook", [ABSENT, RAISES], ids=["absent", "raises"])
@pytest.mark.parametrize(
    ("library", "models"),
    [
        (
            "torchvision",
            [
                ["resnet18"],
                ["timm:resnet18"],
                [f"{TINY}:build", "--data", "imagefolder:PHOTOS", "--input-size", "3,8,8"],
            ],
        ),
        ("timm", [["timm:resnet18"]]),
        ("transformers", [["hf:bert"]]),
    ],
    ids=["torchvision", "timm", "transformers"],
)
def test_a_missing_library_is_named_with_its_extra(library, models, hook, photos, tmp_path):
    models = [[word.replace("PHOTOS", str(photos)) for word in model] for model in models]
    ran = plan((library,), tmp_path / "out", *models, hook=hook)
    for model, (code, _, said) in zip(models, ran, strict=True):
        lines = [f"error: {library} is not installed.", f'  -> pip install "leanort[{library}]"']
        assert said.splitlines() == lines, model
        assert code == 2, model
    assert not (tmp_path / "out").exists()


def test_a_name_that_only_timm_could_know_is_refused_as_before_without_timm(tmp_path):
    ((code, _, said),) = plan(("timm",), tmp_path, ["vit_tiny_patch16_224"])
    assert "torchvision has no model named 'vit_tiny_patch16_224'" in said
    assert code == 2


@pytest.mark.parametrize("hook", [ABSENT, RAISES], ids=["absent", "raises"])
def test_own_code_on_digits_needs_none_of_them(hook, tmp_path):
    ((code, shown, said),) = plan(EXTRAS, tmp_path, [f"{TINY}:build", "--input-size", "3,16,16"], hook=hook)
    assert code == 0, said
    assert "widths can change" in shown
    assert "bug" not in said


def test_tools_leave_out_what_is_not_installed(monkeypatch):
    version = fingerprint.importlib.metadata.version

    def without(name: str) -> str:
        if name in EXTRAS:
            raise fingerprint.importlib.metadata.PackageNotFoundError(name)
        return version(name)

    fingerprint.tools.cache_clear()
    whole = fingerprint.tools()
    assert set(EXTRAS) < set(whole)
    monkeypatch.setattr(fingerprint.importlib.metadata, "version", without)
    fingerprint.tools.cache_clear()
    try:
        assert fingerprint.tools() == {name: value for name, value in whole.items() if name not in EXTRAS}
    finally:
        fingerprint.tools.cache_clear()


def test_the_extras_are_declared_and_make_setup_installs_all_of_them():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [line.partition(">")[0] for line in project["dependencies"]]
    assert not set(EXTRAS) & set(names)
    for library in EXTRAS:
        assert any(line.startswith(library) for line in project["optional-dependencies"][library])
    assert project["optional-dependencies"]["all"] == [f"leanort[{','.join((*EXTRAS, 'sweep'))}]"]
    assert '-e ".[all,dev]"' in (ROOT / "Makefile").read_text()
