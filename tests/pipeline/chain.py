"""The command line on a tiny net: what the tests of the whole chain share."""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from pipeline.cli import main

TINY = Path(__file__).with_name("tiny.py")
STAGES = ["baseline", "prune", "finetune", "fold", "shrink", "export", "optimize", "validate"]
QUICK = [
    "--input-size", "3,16,16", "--name", "tiny",
    "--set", "baseline.train={epochs=4, lr=0.1}",
    "--set", "baseline.seconds=0.2",
    "--set", "finetune.train={epochs=2, lr=0.02}",
    "--set", "gate.seconds=0.3",
    "--set", 'optimize={candidates=["portable", "host"], seconds=0.2}',
    "--set", "gate.max_accuracy_drop_points=15.0",
    "--set", "gate.max_latency_ratio=1000.0",
]  # fmt: skip


# Processes of their own that start with everything imported, which costs more than a command on a tiny net.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["pipeline.runner", "torch._inductor.config", "torch.export._trace", "onnxscript.function_libs.torch_lib.ops",
     "matplotlib.figure", "tests.pipeline.chain"]
)  # fmt: skip


def command(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "pipeline", *words, "--out", str(folder)]


def _forked(words: list[str], stdout: str, stderr: str, largest: int | None) -> None:
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite run in the background ignores it
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    main(words)


@contextmanager
def forked(folder: Path, *words: str, largest: int | None = None) -> Iterator[tuple[Any, Path, Path]]:
    """A command in a process of its own: the process, and the files that its stdout and stderr go to.

    No file that it writes may be larger than `largest` bytes. It is killed where it has not ended by the end.
    """
    with tempfile.TemporaryDirectory() as said:
        out, err = Path(said) / "stdout", Path(said) / "stderr"
        process = FORKS.Process(target=_forked, args=([*words, "--out", str(folder)], str(out), str(err), largest))
        process.start()
        try:
            yield process, out, err
        finally:
            process.kill()
            process.join()


def leanort(folder: Path, *words: str, largest: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    with forked(folder, *words, largest=largest) as (process, out, err):
        process.join(280)
        assert process.exitcode is not None, "it takes too long"
        return subprocess.CompletedProcess(list(words), process.exitcode, out.read_text(), err.read_text())


def deploy(folder: Path, *words: str, largest: int | None = None) -> subprocess.CompletedProcess[str]:
    return leanort(folder, "deploy", f"{TINY}:build", *QUICK, *words, largest=largest)


def manifest(version: Path) -> dict:
    return json.loads((version / "manifest.json").read_text())


def figures(version: Path, stage: str) -> dict:
    return json.loads((version / stage / "artifact.json").read_text())


def said(folder: Path, *words: str, code: int = 0) -> str:
    """What a command prints, run in this process."""
    result = CliRunner().invoke(main, [*words, "--out", str(folder)])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())
