"""The examples as their docstrings say, whole: `python benchmarks/examples.py [NAME ...] [--out FOLDER]`.

Each runs in a new folder, so that nothing is reused, and gives one row of a table: scores, latency and file of the
dense and the shipped model, and seconds from the first command to the verdict. A verdict other than `pass` is told in
its row.
"""

from __future__ import annotations

import argparse
import ast
import os
import shlex
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
EXAMPLES = {path.stem: path for path in sorted((HERE / "examples").glob("*.py"))}
PROGRAMS = {"python": [sys.executable], "leanort": [sys.executable, "-m", "pipeline"]}
JUDGED = (0, 1, 4)
"""Exit codes of a run that came to a verdict."""


def commands(example: Path) -> list[list[str]]:
    """The commands in the docstring of an example, in words; the last one deploys."""
    text = ast.get_docstring(ast.parse(example.read_text())) or ""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith(tuple(f"{name} " for name in PROGRAMS))]


def lacks(example: Path) -> str:
    """The first package that an example imports and that is not installed; "" where all are."""
    body = ast.parse(example.read_text()).body
    named = [one.name for node in body if isinstance(node, ast.Import) for one in node.names]
    named += [node.module or "" for node in body if isinstance(node, ast.ImportFrom)]
    return next((name for name in (one.partition(".")[0] for one in named) if find_spec(name) is None), "")


def run(example: Path, folder: Path) -> tuple[Path, float]:
    """Run an example in `folder`: its version, and how many seconds it took. Raises CalledProcessError."""
    folder.mkdir(parents=True)
    (folder / "examples").symlink_to(example.parent)
    start = time.perf_counter()
    for program, *words in commands(example):
        done = subprocess.run(
            [*PROGRAMS[program], *words],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(HERE)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode not in (JUDGED if program == "leanort" else (0,)):
            print(done.stdout, file=sys.stderr)
            done.check_returncode()
    (version,) = (folder / "artifacts").glob("*/v0001")
    return version, time.perf_counter() - start


def row(name: str, version: Path, seconds: float) -> str:
    """What a version says of itself, as a row of the table."""
    from pipeline.artifacts.verdict import Validated

    made = Validated.load(version / Validated.STAGE)
    score = made.judged_score
    held = (
        ""
        if score is None
        else f"{score.name} {_shown(score.dense, score.share)} → {_shown(score.shipped, score.share)}"
    )
    if made.latency_ratio is None or made.bytes is None or made.dense_bytes is None:
        return f"| {name} | {made.task} | {held} | {made.verdict.outcome} | | {seconds:.0f} |"
    spread = f"{made.latency_ratio_low:.3f} to {made.latency_ratio_high:.3f}"
    times = f"{made.dense_latency_ms:.3g} → {made.latency_ms:.3g} ms, × {made.latency_ratio:.3f} ({spread})"
    sizes = f"{made.dense_bytes / 1e6:.3g} → {made.bytes / 1e6:.3g} MB, × {made.bytes / made.dense_bytes:.3f}"
    verdict = "" if made.verdict.outcome == "pass" else f" **{made.verdict.outcome}**"
    return f"| {name} | {made.task} | {held}{verdict} | {times} | {sizes} | {seconds:.0f} |"


def _shown(value: float, share: bool) -> str:
    return f"{100 * value:.1f} %" if share else f"{value:.3g}"


def main() -> None:
    """Run them one after the other; a row each as it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EXAMPLES))
    parser.add_argument("--out", type=Path, help="an empty folder to keep the versions in")
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in EXAMPLES]
    if unknown:
        parser.error(f"there is no example {unknown[0]}; there are {', '.join(EXAMPLES)}")
    print("| example | task | score | latency | file | seconds |\n|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name in given.names or EXAMPLES:
            if missing := lacks(EXAMPLES[name]):
                print(f"| {name} | not run: it needs {missing} (docs/examples.md) | | | | |", flush=True)
                continue
            print(row(name, *run(EXAMPLES[name], (given.out or Path(scratch)) / name)), flush=True)


if __name__ == "__main__":
    main()
