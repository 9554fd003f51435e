"""The examples, each the whole way in a small form: by the commands of its docstring, with fewer samples and epochs."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from benchmarks.examples import EXAMPLES, commands, lacks
from pipeline.cli import main

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 60
SMALL = [
    "--set", "baseline.seconds=0.2",
    "--set", "finetune.epochs=1",
    "--set", "finetune.samples=64",
    "--set", "gate.seconds=0.3",
    "--set", "optimize.seconds=0.3",
    "--set", 'optimize.candidates=["portable"]',
    "--set", "gate.max_score_lost=100",
    "--set", "gate.max_latency_ratio=1000",
    "--set", "gate.max_size_ratio=10",
]  # fmt: skip

# Example -> samples, epochs (enough that the model does better than chance), task, the score that is gated.
TOLD = {
    "already_pruned": (300, 0, "classification", "accuracy"),
    "detector": (200, 6, "detection", "mAP"),
    "forecast": (300, 4, "regression", "R2"),
    "image_classes": (400, 3, "classification", "accuracy"),
    "keywords": (180, 3, "classification", "accuracy"),
    "loop_lightning": (400, 8, "regression", "R2"),
    "loop_plain": (400, 6, "classification", "accuracy"),
    "loop_trainer": (400, 6, "classification", "accuracy"),
    "loop_yolo": (200, 12, "task", "found"),
    "multilabel": (300, 3, "multilabel", "macro F1"),
    "reader": (240, 6, "ctc", "1 - CER"),
    "segmentation": (100, 10, "segmentation", "mean IoU"),
    "sentences": (160, 0, "embedding", "cosine"),
    "tabular": (442, 2, "regression", "R2"),
    "texts": (160, 3, "classification", "accuracy"),
}
MAPS = ("detector", "segmentation")
"""Many targets per sample: few samples, in many steps."""
INT8 = "image_classes"


def test_each_example_is_tried_and_in_the_docs():
    assert set(TOLD) == set(EXAMPLES)
    page = (ROOT / "docs" / "examples.md").read_text()
    for name in EXAMPLES:
        assert f"[{name}.py](../examples/{name}.py)" in page
        assert f"`make examples ONLY={name}`" in page


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_knows_nothing_of_leanort(name):
    text = EXAMPLES[name].read_text()
    assert len(text.splitlines()) <= LONGEST
    first, second, *_ = text.splitlines()
    assert first.startswith('"""')
    assert first.endswith(".")
    assert not second
    tree = ast.parse(text)
    imported = {one.name for node in ast.walk(tree) if isinstance(node, ast.Import) for one in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file()} | {"leanort"}
    assert not {module.partition(".")[0] for module in imported} & ours
    assert commands(EXAMPLES[name])[-1][0] == "leanort"


@pytest.mark.examples
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_goes_the_whole_way(name, tmp_path, monkeypatch):
    if missing := lacks(EXAMPLES[name]):
        pytest.skip(f"{missing} is not installed")
    samples, epochs, task, score = TOLD[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAMPLES", str(samples))
    monkeypatch.setenv("EPOCHS", str(epochs))
    Path("examples").symlink_to(ROOT / "examples")
    *before, (_, *words) = commands(EXAMPLES[name])
    for program, *rest in before:
        assert program == "python"
        subprocess.run([sys.executable, *rest], check=True, timeout=200)
    batch, rate = (8, 0.002) if name in MAPS else (16, 0.005)
    train = f"baseline.train={{epochs={epochs}, batch_size={batch}, lr={rate}}}"
    by_loop = any(word.startswith("baseline.train=examples/") for word in words)
    more = ["--set", train] if epochs and not by_loop else []
    int8 = ["--set", "optimize.int8=true"] if name == INT8 else []
    done = CliRunner().invoke(main, [*words, *SMALL, *more, *int8])
    assert done.exit_code == 0, done.output
    (version,) = (tmp_path / "artifacts").glob("*/v0001")
    verdict = json.loads((version / "verdict.json").read_text())
    assert verdict["task"] == task
    assert verdict["scores"][0]["name"] == score
    assert verdict["outcome"] == "pass", verdict["reasons"]
    if by_loop:
        rungs = json.loads((version / "2-finetune" / "artifact.json").read_text())["rungs"]
        assert f"by examples/{name}.py:fit" in rungs[-1]["why"]
    made = json.loads((version / "6-optimize" / "artifact.json").read_text())
    assert any("int8" in one["name"] for one in made["candidates"]) == (name == INT8)
    checked = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_TORCH, "selftest.py"],
        cwd=version / "bundle", capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert json.loads(checked.stdout)["ok"]
    if name in FILES:
        folder = tmp_path / "served"
        folder.mkdir()
        FILES[name](folder)
        served = subprocess.run(
            [sys.executable, "-I", "-c", WITHOUT_TORCH, "serve.py", folder],
            cwd=version / "bundle", capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        assert served.returncode == 0, served.stdout + served.stderr
        assert len(served.stdout.splitlines()) == len(list(folder.iterdir()))


def recordings(folder: Path) -> None:
    for kind in ("buzz", "low"):
        (folder / f"{kind}.wav").write_bytes(Path("made/keywords", kind, "0.wav").read_bytes())


def images(folder: Path) -> None:
    for size in ((48, 48), (96, 48), (60, 100)):
        Image.effect_noise(size, 40).save(folder / f"{size}.png")


FILES = {"keywords": recordings, "segmentation": images}
"""Files that the bundle's server reads by itself."""

# Any import of torch ends it.
WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
