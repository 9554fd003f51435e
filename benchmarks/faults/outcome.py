"""What came of one campaign, and the command line as the campaigns run it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

NET = """
import torch
from torch import nn

def build(num_classes=10):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, num_classes),
    )
"""
"""A net that goes through the whole chain in seconds."""

QUICK = (
    "--input-size", "3,16,16", "--name", "tiny", "--set", "baseline.train={epochs=2, lr=0.1}",
    "--set", "finetune.train={epochs=1, lr=0.02}", "--set", "gate.seconds=0.2",
    "--set", 'optimize={candidates=["portable"], seconds=0.1}', "--set", "gate.max_accuracy_drop_points=100.0",
    "--set", "gate.max_latency_ratio=1000.0",
)  # fmt: skip


@dataclass
class Outcome:
    """How many tries there were, how many were refused and how many accepted, and what went wrong, one line each."""

    tries: int = 0
    refused: int = 0
    accepted: int = 0
    wrong: list[str] = field(default_factory=list)

    def expect(self, right: bool, accepted: bool, what: str) -> None:
        """Count one try; `what` is listed unless it came out right."""
        self.tries += 1
        self.accepted += accepted
        self.refused += not accepted
        if not right:
            self.wrong.append(what)


def command(*words: str | Path) -> list[str]:
    """`leanort WORDS` of this checkout."""
    return [sys.executable, "-m", "pipeline", *map(str, words)]


def leanort(*words: str | Path, seconds: float = 300.0) -> subprocess.CompletedProcess[str]:
    """Run `leanort WORDS`; one that does not end in time is exit code 124."""
    try:
        return subprocess.run(
            command(*words),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
            **SURROUNDINGS,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command(*words), 124, "", f"no end after {seconds:g} s")


SURROUNDINGS = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}}


def crashed(done: subprocess.CompletedProcess[str]) -> bool:
    """Whether a command broke down instead of saying what was wrong."""
    said = done.stdout + done.stderr
    return "Traceback" in said or "bug in leanort" in said or done.returncode < 0 or done.returncode == 124


def deployed(folder: Path, *words: str) -> Path:
    """An artifacts folder in `folder` with one passed version of the small net. Raises RuntimeError if it is none."""
    (folder / "net.py").write_text(NET, encoding="utf-8")
    done = leanort("deploy", f"{folder / 'net.py'}:build", *QUICK, *words, "--out", folder / "artifacts")
    if done.returncode:
        raise RuntimeError(done.stderr + done.stdout)
    return folder / "artifacts"
