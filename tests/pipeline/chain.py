"""The command line on a tiny net: what the tests of the whole chain share."""

import json
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

from pipeline.cli import main

TINY = Path(__file__).with_name("tiny.py")
STAGES = ["baseline", "prune", "finetune", "fold", "shrink", "export", "optimize", "validate"]
QUICK = [
    "--input-size", "3,16,16", "--name", "tiny",
    "--set", "baseline.train={epochs=4, lr=0.1}",
    "--set", "finetune.train={epochs=2, lr=0.02}",
    "--set", "gate.seconds=0.3",
    "--set", 'optimize={candidates=["portable", "host"], seconds=0.2}',
    "--set", "gate.max_accuracy_drop_points=15.0",
    "--set", "gate.max_latency_ratio=1000.0",
]  # fmt: skip


def command(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "pipeline", *words, "--out", str(folder)]


def leanort(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *words), capture_output=True, text=True, timeout=280)


def deploy(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return leanort(folder, "deploy", f"{TINY}:build", *QUICK, *words)


def manifest(version: Path) -> dict:
    return json.loads((version / "manifest.json").read_text())


def figures(version: Path, stage: str) -> dict:
    return json.loads((version / stage / "artifact.json").read_text())


def said(folder: Path, *words: str, code: int = 0) -> str:
    """What a command prints, run in this process."""
    result = CliRunner().invoke(main, [*words, "--out", str(folder)])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())
