"""No exception class of the user's code decides an exit code: not SystemExit, not one of its own."""

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from pipeline.cli import main
from tests.pipeline.chain import QUICK, leanort

ENDINGS = {
    "exit(0)": "sys.exit(0)",
    "exit()": "sys.exit()",
    "own": "raise Mine('gone')",
    "os._exit": "import os; os._exit(0)",
    "broken pipe": "raise BrokenPipeError",
    "click": "import click; raise click.exceptions.Exit(0)",
    "generator": "raise GeneratorExit('gone')",
}
CODE = """
import sys
import torch
from foundation.errors import UserError

class Mine(BaseException):
    pass

class Fine(UserError):
    exit_code = 0

def fine(outputs, labels):
    raise Fine("all is well")

def score(outputs, labels):
    {ending}

def build(num_classes=10):
    {ending}

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3 * 16 * 16, 10)

    def forward(self, x):
        {ending}

def samples():
    {ending}
"""


@pytest.fixture(params=ENDINGS)
def code(request, tmp_path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(CODE.format(ending=ENDINGS[request.param]))
    return path


def gated_with(version: Path, metric: str) -> subprocess.CompletedProcess[str]:
    dense = version / "0-baseline" / "dense.onnx"
    words = ["gate", str(dense), "--against", str(dense), "--data", "digits", "--input-size", "3,16,16"]
    words += ["--seconds", "0.2", "--metric", metric]
    return leanort(version.parents[1], *words)


def test_a_metric_that_ends_the_process_fails_the_gate(artifacts, version, code, tmp_path):
    done = gated_with(version, f"{code}:score")
    assert done.returncode == 1, done.stderr
    assert "score could not be measured" in " ".join(done.stdout.split())


@pytest.mark.parametrize("name", ["build", "Net"])
def test_a_model_that_ends_the_process_is_refused(code, tmp_path, name):
    done = CliRunner().invoke(main, ["deploy", f"{code}:{name}", *QUICK, "--out", str(tmp_path / "artifacts")])
    assert done.exit_code == 2, done.output
    assert "error:" in done.output


def test_data_that_ends_the_process_is_refused(code, tmp_path):
    words = ["deploy", "resnet18", "--data", f"{code}:samples", *QUICK, "--out", str(tmp_path / "artifacts")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2, done.output
    assert "mine.py, line" in done.output


def test_an_error_class_of_ours_with_an_own_exit_code_is_no_pass(artifacts, version, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(CODE.format(ending="pass"))
    done = gated_with(version, f"{path}:fine")
    assert done.returncode == 1, done.stderr
    assert "all is well" in done.stdout


def test_a_reader_who_leaves_hears_no_pass(artifacts, version):
    """`leanort gate ... | head -0`: the verdict reached nobody."""
    dense = version / "0-baseline" / "dense.onnx"
    command = [sys.executable, "-m", "pipeline", "gate", str(dense), "--against", str(dense), "--seconds", "0.2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as gate:
        gate.stdout.close()
        assert gate.wait() not in (0, 1)


def test_a_table_that_nobody_reads_to_its_end_is_no_code_that_exits(monkeypatch, capsys):
    """`leanort list | head`: rich answers a broken pipe by SystemExit."""

    def broken() -> None:
        try:
            raise BrokenPipeError
        except BrokenPipeError:
            raise SystemExit(1)  # noqa: B904  # as rich does

    monkeypatch.setitem(main.commands, "list", click.Command("list", callback=broken))
    with pytest.raises(SystemExit) as ended:
        main.main(["list"])
    assert ended.value.code == 141
    assert "exit" not in capsys.readouterr().err
