"""Build the wheel, install it where nothing is but what it says it needs, and use it from another folder.

    .venv/bin/python .ci/wheel.py

The bare environment has none of the extras and none of the tools for development. Its libraries are links to those in
the environment that runs this script, so that nothing is downloaded but the build backend.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pipeline", "exporters", "validators", "foundation")
EXTRAS = ("torchvision", "timm", "transformers", "optuna")
NET = """
from torch import nn

def build(num_classes=10):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )
"""
QUICK = [
    "--input-size", "3,16,16", "--name", "net", "--quiet",
    "--set", "baseline.train={epochs=2, lr=0.02}", "--set", "finetune.train={epochs=1}", "--set", "gate.seconds=0.2",
    "--set", 'optimize={candidates=["portable"], seconds=0.2}', "--set", "gate.max_accuracy_drop_points=100.0",
    "--set", "gate.max_latency_ratio=9.0",
]  # fmt: skip


def build(scratch: Path) -> Path:
    """The wheel of this tree, made from a copy, so that no earlier build leaves files in it."""
    source = scratch / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-deps", "--wheel-dir", str(scratch), str(source))
    return next(scratch.glob("leanort-*.whl"))


def pip(*words: str) -> None:
    """Run this environment's pip."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def holds_everything(wheel: Path) -> None:
    """Every file of the packages (templates, schemas, stubs, marks of typing) and the licence are in the wheel, and
    nothing that each start of Python would read: that is for `make setup` alone, in an environment of its own.
    """
    names = set(zipfile.ZipFile(wheel).namelist())
    assert not any(name.endswith(".pth") for name in names), "a file that each start of Python reads"
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert str(path.relative_to(ROOT)) in names, f"{path.relative_to(ROOT)} is not in the wheel"
    assert any(re.fullmatch(r"leanort-.*\.dist-info/licenses/LICENSE", name) for name in names), "no licence"


def needed(wheel: Path) -> set[str]:
    """The distributions that the wheel requires without extras, and those that these require, as they are here."""
    text = next(
        zipfile.ZipFile(wheel).read(name).decode()
        for name in zipfile.ZipFile(wheel).namelist()
        if name.endswith(".dist-info/METADATA")
    )
    waiting = re.findall(r"^Requires-Dist: (.+)$", text, re.MULTILINE)
    found: set[str] = set()
    asked: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        one = Requirement(waiting.pop())
        if one.marker is not None and not one.marker.evaluate({**default_environment(), "extra": ""}):
            continue
        key = (one.name.lower(), frozenset(one.extras))
        if key not in asked:
            asked.add(key)
            found.add(one.name)
            for line in importlib.metadata.requires(one.name) or []:
                inner = Requirement(line)
                extras = ("", *one.extras)
                if inner.marker is None or any(
                    inner.marker.evaluate({**default_environment(), "extra": extra}) for extra in extras
                ):
                    inner.marker = None
                    waiting.append(str(inner))
    return found


def bare(folder: Path, distributions: set[str]) -> Path:
    """A new environment with links to the files of `distributions`, and nothing else; its `bin` folder."""
    venv.create(folder, with_pip=False)
    there = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    for name in distributions:
        for file in importlib.metadata.files(name) or []:
            first = file.parts[0]
            if first not in ("..", "__pycache__") and not (there / first).exists():
                (there / first).symlink_to(Path(str(file.locate())).parents[len(file.parts) - 1] / first)
    return folder / "bin"


def main() -> None:
    """Build, install, use; raises at the first thing that is not as promised."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        wheel = build(scratch)
        holds_everything(wheel)
        distributions = needed(wheel)
        assert not set(EXTRAS) & distributions, "an extra is needed after all"
        bin_ = bare(scratch / "bare", distributions)
        pip("--python", str(bin_ / "python"), "install", "--no-deps", "--no-index", str(wheel))

        def said(*words: str, code: int = 0) -> str:
            done = subprocess.run(
                [str(bin_ / words[0]), *words[1:]], cwd="/", capture_output=True, text=True, check=False
            )
            assert done.returncode == code, f"{' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}"
            return done.stdout + done.stderr

        for package in PACKAGES:
            where = said("python", "-c", f"import {package}; print({package}.__file__)").strip()
            assert Path(where).resolve().is_relative_to((scratch / "bare").resolve()), where
        said("python", "-c", "import torch, onnxruntime")
        for extra in EXTRAS:
            said("python", "-c", f"import {extra}", code=1)

        (scratch / "net.py").write_text(NET)
        out, model = ["--out", str(scratch / "artifacts")], f"{scratch / 'net.py'}:build"
        assert "leanort" in said("leanort", "--version")
        assert "No versions" in said("leanort", "list", *out)
        assert "--no-promote" in said("leanort", "deploy", "--help")
        assert 'pip install "leanort[torchvision]"' in said("leanort", "plan", "resnet18", *out, code=2)
        svg = scratch / "widths.svg"
        words = ["--input-size", "3,16,16", "--svg", str(svg), *out]
        assert "widths can change" in said("leanort", "plan", model, *words)
        assert "<svg" in svg.read_text()
        said("leanort", "deploy", model, *QUICK, *out)
        version = scratch / "artifacts" / "net" / "v0001"
        assert "<html" in (version / "report.html").read_text()
        said("leanort", "verify", "net", *out)
        print(f"{wheel.name}: beside {len(distributions)} libraries and none of the extras, it plans and deploys.")


if __name__ == "__main__":
    main()
