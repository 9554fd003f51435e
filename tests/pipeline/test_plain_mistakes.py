"""Slips of the hand at the command line and in recipes: one line that says what was wrong, exit 2, nothing written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from foundation.words import printable
from pipeline.cli import main
from tests.pipeline.chain import TINY

MODEL = f"{TINY}:build"
MANY = "9" * 5000

WORDS = {
    "negative seed": ["--seed", "-1"],
    "huge seed": ["--seed", str(2**64)],
    "seed of thousands of digits": ["--set", f"seed={MANY}"],
    "superscript size": ["--input-size", "²,16,16"],
    "negative size": ["--set", "data.input_size=[3,-1,16]"],
    "endless size": ["--set", "data.input_size=[3,1000000,1000000]"],
    "size that fills memory": ["--set", "data.input_size=[60000,60000,60000]"],
    "size of words": ["--input-size", "three,16,16"],
    "ratio of thousands of digits": ["--set", f"prune.ratio={MANY}"],
    "ratio with many decimals": ["--set", f"prune.ratio={MANY}.5"],
    "infinite seconds": ["--set", "gate.seconds=inf"],
    "no number": ["--set", "gate.seconds=nan"],
    "infinite learning rate": ["--set", "finetune.train={lr=inf}"],
    "learning rate that is none": ["--set", "baseline.train={lr=nan}"],
    "threads without end": ["--set", f"gate.threads={10**30}"],
    "a hundred thousand threads": ["--set", "optimize.threads=[100000]"],
    "batch without end": ["--set", f"gate.batch_size={10**30}"],
    "epochs without end": ["--set", f"finetune.epochs={10**30}"],
    "steps without end": ["--set", f"prune.steps={10**30}"],
    "alignment without end": ["--set", f"prune.align={10**30}"],
    "opset without end": ["--set", f"export.opset={10**30}"],
    "nested without end": ["--set", "prune.overrides=" + "[" * 20000],
    "nul in the name": ["--name", "a\0b"],
    "escape in the name": ["--name", "a\x1b[2Jb"],
    "name of the log": ["--name", "releases.jsonl"],
    "name that climbs": ["--name", ".."],
    "name without end": ["--name", "a" * 300],
    "nul in the data": ["--data", "npz:a\0b"],
    "nul in the weights": ["--weights", "a\0b.pt"],
    "limit that can never hold": ["--set", 'gate.limits=[{metric="accuracy", min=2.0}]'],
    "limit upside down": ["--set", 'gate.limits=[{metric="latency", min=2.0, max=1.0}]'],
    "limit below nothing": ["--set", 'gate.limits=[{metric="file_size", max=-1.0}]'],
    "override of no layer": ["--set", 'prune.overrides={"nowhere.*"=0.3}'],
    "override of no number": ["--set", 'prune.overrides={"*"=nan}'],
    "parity of everything": ["--set", "gate.parity=inf"],
}


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_a_slip_is_one_line_and_leaves_no_trace(tmp_path, words):
    out = tmp_path / "artifacts"
    done = CliRunner().invoke(main, ["deploy", MODEL, "--input-size", "3,16,16", *words, "--out", str(out)])
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    assert "bug in leanort" not in done.output
    assert len(done.output) < 5000
    assert sum(line.startswith("error:") for line in done.output.splitlines()) == 1, done.output
    assert not out.exists() or not list(out.rglob("*"))


@pytest.mark.parametrize("model", ["a\0b", "a\x1b]0;b\x07", "resnet18\n", "", "x" * 300, "x" * 100_000, "file.py:\0"])
def test_a_model_of_odd_characters(tmp_path, model):
    done = CliRunner().invoke(main, ["deploy", model, "--out", str(tmp_path / "artifacts")])
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    assert "\x1b" not in done.output
    assert "\0" not in done.output
    assert len(done.output) < 5000


@pytest.mark.parametrize("out", ["x" * 300, "a\0b"])
def test_an_artifacts_folder_that_cannot_be(tmp_path, out):
    done = CliRunner().invoke(main, ["deploy", MODEL, "--input-size", "3,16,16", "--out", f"{tmp_path}/{out}"])
    assert done.exit_code in (2, 3), done.output
    assert "Traceback" not in done.output
    for command in ("list", "show", "gate", "verify", "promote", "rollback", "gc"):
        words = [command, *([] if command in ("list", "gc") else ["tiny"]), "--out", f"{tmp_path}/{out}"]
        done = CliRunner().invoke(main, words)
        assert "Traceback" not in done.output, (command, done.output)
        assert not isinstance(done.exception, ValueError | OSError), (command, done.exception)


@pytest.mark.parametrize(
    "content", ["a = " + "[" * 20000, f"seed = {MANY}", "\0", "seed = 1\nseed = 2", "[prune]\nratio = '\\uZZ'"]
)
def test_a_recipe_that_cannot_be_read(tmp_path, content):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(content)
    done = CliRunner().invoke(main, ["deploy", MODEL, "--recipe", str(recipe), "--out", str(tmp_path / "artifacts")])
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    "words",
    [["--seconds", "nan"],
     ["--seconds", "inf"], ["--threads", str(10**30)], ["--batch", str(10**30)], ["--size", "x=²"],
     ["--size", f"x={MANY}"], ["--size", "x=-1"], ["--input-size", "²,1,1"], ["--metric", "a\0b.py:c"]],
)  # fmt: skip
def test_options_of_gate_and_check(tmp_path, words):
    model = tmp_path / "m.onnx"
    model.write_bytes(b"")
    for command in (["gate", str(model), "--against", str(model)], ["check", str(model), str(model)]):
        done = CliRunner().invoke(main, [*command, *words])
        assert done.exit_code in (2, 3), (done.output, done.exception)
        assert "Traceback" not in done.output
        assert "bug in leanort" not in done.output


def test_a_terminal_that_knows_ascii_only(artifacts, version):
    dense = version / "0-baseline" / "dense.onnx"
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "gate", str(dense), "--against", str(dense), "--seconds", "0.2"],
        capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
    )  # fmt: skip
    assert "UnicodeEncodeError" not in done.stderr
    assert done.returncode in (0, 1, 4)


def test_what_a_terminal_would_obey_is_written_out():
    assert printable("a\x1b[2J\0b\u202ec\u2028d") == r"a\x1b[2J\x00b\u202ec\u2028d"
    assert printable("Grüße, 模型 \U0001f600\n\tnext") == "Grüße, 模型 \U0001f600\n\tnext"
    long = printable("x" * 1_000_000)
    assert len(long) < 2100
    assert "998,000 characters left out" in long


def test_class_names_that_command_the_terminal_do_not(tmp_path):
    path = Path(tmp_path) / "mine.py"
    path.write_text("def build():\n    raise ValueError('a\\x1b[2Jb\\0c' + 'x' * 1_000_000)\n")
    done = CliRunner().invoke(main, ["deploy", f"{path}:build", "--out", str(tmp_path / "artifacts")])
    assert done.exit_code == 2
    assert "\x1b" not in done.output
    assert "\0" not in done.output
    assert len(done.output) < 5000
