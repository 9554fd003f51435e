"""Recipes and options of nonsense."""

from __future__ import annotations

import random
from pathlib import Path

from click.testing import CliRunner

from benchmarks.faults.outcome import NET, Outcome
from pipeline.cli import main
from pipeline.recipe.config import Config
from pipeline.recipe.section import Section

VALUES = (
    "-1", "0", "1", "1e400", "nan", "inf", "-inf", "9" * 30, "9" * 5000, "'text'", "''", "[]", "{}", "[[[[]]]]", "true",
    "1979-05-27", "'\x1b[2J'", "'\x00'", "'../x'", "'²'", "0x7fffffffffffffff", "{a={b={c=1}}}", "[1, 'a', {}]", "-0.0",
    "'" + "x" * 5000 + "'", "[" * 5000, "\"\\u202e\"", "1_000", "=", "'npz:nowhere.npz'", "'file.py:x'", "'hf:nowhere'",
)  # fmt: skip


def run(folder: Path, tries: int, chance: random.Random) -> Outcome:
    """`leanort plan` with one or two keys of the recipe set to something odd: refused in one line, or planned."""
    outcome = Outcome()
    (folder / "net.py").write_text(NET, encoding="utf-8")
    keys = [
        f"{section}.{key}"
        for section, value in Config()
        if isinstance(value, Section)
        for key in type(value).model_fields
    ] + ["seed", "name", "model", "artifacts", "baseline.train.lr", "finetune.train.epochs", "nowhere", "prune.x"]
    for number in range(tries):
        settings = [f"{chance.choice(keys)}={chance.choice(VALUES)}" for _ in range(chance.choice([1, 1, 2]))]
        words = ["plan", f"{folder / 'net.py'}:build", "--input-size", "3,16,16", "--out", str(folder / "artifacts")]
        done = CliRunner().invoke(main, [*words, *(word for text in settings for word in ("--set", text))])
        faults = []
        if "Traceback" in done.output or "bug in leanort" in done.output:
            faults.append("a traceback")
        if done.exit_code not in (0, 2, 3):
            faults.append(f"exit {done.exit_code}")
        if done.exit_code and sum(line.startswith(("error:", "Error:")) for line in done.output.splitlines()) != 1:
            faults.append("not one line")
        if len(done.output) > 20_000 or "\x1b" in done.output or "\0" in done.output:
            faults.append("what a terminal would obey, or far too long")
        if (folder / "artifacts").exists():
            faults.append("something was written")
        outcome.expect(not faults, done.exit_code == 0, f"{number}, {[s[:60] for s in settings]}: {', '.join(faults)}")
    return outcome
