"""Several processes that are killed, fail or do not fit: one line, the right exit code, and the next run goes on."""

import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch

from pipeline.training import launched, processes
from tests.pipeline.chain import TINY
from tests.pipeline.training import two as of_two
from tests.pipeline.training.test_processes import two
from tests.pipeline.training.two import commands, ended, errors, running, together

LONG = [
    "--input-size", "3,16,16", "--name", "tiny", "--until", "baseline", "--set", "baseline.train={epochs=5, lr=0.1}",
    "--set", "baseline.seconds=0.05",
]  # fmt: skip


def words(folder, *more: str) -> list[str]:
    return ["deploy", f"{TINY}:build", *LONG, *more, "--out", str(folder)]


def survived(said, started, victim: int) -> None:
    """The process that was not killed says one line within 30 s and has the exit code of a failed stage."""
    started[victim].kill()
    code, text = ended(started, said, seconds=30)[1 - victim]
    assert code == 3
    assert errors(text) == [f"error: Process {victim} of 2 has ended: it was killed, or its machine was lost."]
    shutil.rmtree(said)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_training_and_the_next_one_resumes_to_the_same_weights(tmp_path, victim):
    changes, said = {"epochs": 6}, tmp_path / "said"
    said.mkdir()
    undisturbed, _ = together(said, two, changes, {})
    checkpoint = tmp_path / "training.pt"
    shutil.rmtree(said)
    with running(said, two, changes, {"checkpoint": checkpoint}) as started:
        while not checkpoint.exists():
            assert started[0].is_alive(), (said / "stderr0").read_text()
            time.sleep(0.001)
        survived(said, started, victim)
    said.mkdir()
    resumed, _ = together(said, two, changes, {"checkpoint": checkpoint})
    assert 0 < resumed.resumed_from < 6
    assert all(torch.equal(resumed.state[name], value) for name, value in undisturbed.state.items())


@pytest.mark.examples
def test_a_run_of_two_that_was_killed_goes_on_and_ends_with_the_digest_of_an_undisturbed_one(tmp_path):
    baselines = [tmp_path / name / "tiny" / ".partial" / "0-baseline" for name in ("undisturbed", "killed")]
    said, checkpoint = tmp_path / "said", baselines[1].with_name("0-baseline.building") / "training.pt"
    with commands(said, *words(tmp_path / "killed")) as started:
        while not checkpoint.exists():
            assert started[0].is_alive(), (said / "stderr0").read_text()
            time.sleep(0.001)
        survived(said, started, 1)
    for folder in (tmp_path / "killed", tmp_path / "undisturbed"):
        with commands(said, *words(folder)) as started:
            (code, first), (other, second) = ended(started, said)
        assert (code, other, second) == (0, 0, ""), first
        assert ("Resuming after epoch" in first) == (folder.name == "killed")
        shutil.rmtree(said)
    one, other = (path / "weights.safetensors" for path in baselines)
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "baseline.train.batch_size=1"], "A batch of 1 samples cannot feed 2 processes."),
        (["--set", "baseline.train.lr=1e12", "--set", "baseline.train.grad_clip=0"], "The loss became"),
        (["--set", "baseline.train.device=cuda"], "Process 0 wants GPU 0, and this machine has no CUDA GPU"),
        (["--set", "baseline.train.precision=fp16"], "precision is 'fp16', and a CPU cannot train in it."),
    ],
    ids=["too many processes", "diverging", "no GPU", "fp16"],
)
def test_what_is_wrong_is_said_once(tmp_path, more, message):
    with commands(tmp_path / "said", *words(tmp_path, *more)) as started:
        (code, first), (_, second) = ended(started, tmp_path / "said")
    (line,) = errors(first)
    assert message in line
    assert code == (3 if "loss" in line else 2)
    assert second == ""
    assert not list(tmp_path.glob("tiny/.partial/0-baseline"))


def test_processes_of_other_models_are_refused(tmp_path):
    with commands(tmp_path / "said", *words(tmp_path), second=tuple(words(tmp_path, "--seed", "1"))) as started:
        (code, first), (_, second) = ended(started, tmp_path / "said")
    assert code == 2
    assert errors(first) == ["error: Process 1 has another model than process 0."]
    assert second == ""
    assert not list(tmp_path.glob("tiny/.partial"))


def test_a_process_that_runs_another_version_is_refused(tmp_path):
    with commands(tmp_path / "said", *words(tmp_path), second=("another-version", *words(tmp_path))) as started:
        (code, first), _ = ended(started, tmp_path / "said")
    assert code == 2
    assert errors(first) == ["error: Process 1 has another version of leanort than process 0."]


@pytest.mark.parametrize("wrong", [["--set", "baseline.train.lr=-1"], ["--no-such-option"]], ids=["recipe", "option"])
def test_a_wrong_command_is_said_by_the_first_process_alone(tmp_path, wrong):
    with commands(tmp_path / "said", *words(tmp_path, *wrong)) as started:
        (code, first), (other, second) = ended(started, tmp_path / "said")
    assert (code, other, second) == (2, 2, "")
    assert "lr" in first or "--no-such-option" in first


@pytest.mark.parametrize("there", [0, 1])
def test_a_process_whose_neighbour_never_comes_says_so_and_ends(tmp_path, there):
    began = time.monotonic()
    with of_two.alone(tmp_path / "said", there, *words(tmp_path)) as started:
        started.join(100)
        assert started.exitcode == 3
    text = (tmp_path / "said" / f"stderr{there}").read_text()
    assert time.monotonic() - began < processes.NEAR + 40  # which a process may take to start on a busy machine
    missing = "not all others have" if there == 0 else "the first one has not"
    assert errors(text) == [f"error: Process {there} of 2: {missing} come within 15 s, killed or never started."]
    assert "c10d" not in text
    assert not list(tmp_path.glob("tiny/.partial"))


def test_a_connection_to_itself_is_nobody_that_listens(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = launched.Place(1, 2, 1, *server.getsockname(), together=True)
        assert processes._listens(place, 1)
    assert not processes._listens(place, 1)
    own = socket.socket()
    own.bind(("127.0.0.1", 0))
    own.connect(own.getsockname())
    monkeypatch.setattr(socket, "create_connection", lambda *given, **more: own)
    assert not processes._listens(place, 1)


def test_a_port_that_is_taken_is_named(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setattr(of_two, "free_port", lambda: port)
        with commands(tmp_path / "said", *words(tmp_path)) as started:
            started[1].kill()
            code, text = ended(started, tmp_path / "said")[0]
    assert code == 2
    assert errors(text) == [f"error: Port {port} (MASTER_PORT) of this machine is taken."]


def waits() -> float:
    """Seconds that one of two joined processes waits for word of the other, as NCCL does before its first sum."""
    place = launched.place()
    assert place is not None
    with processes.joined(place):
        return float(torch.distributed.distributed_c10d._get_default_store().timeout.total_seconds())


def test_processes_that_have_joined_wait_for_the_first_as_long_as_it_takes(tmp_path):
    assert together(tmp_path / "said", waits) == [processes.LONG.total_seconds()] * 2


def scripts(text: str, count: int) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of the first two of `count` processes that run a script, started by two alone."""
    port = of_two.free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", text],
            env=os.environ | of_two.environment(rank, port, count),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=60) for process in started]
    return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]


COMES = """
from pipeline.training import launched, processes
processes.NEAR = 5.0
with processes.joined(launched.place()):
    pass
"""


def test_where_a_third_process_never_comes_nobody_takes_the_first_for_missing():
    (_, _, first), (code, _, second) = scripts(COMES, 3)
    assert "Process 0 of 3: not all others have come within 5 s" in first
    assert "Process 1 of 3: not all others have come within 5 s" in second
    assert code == 3


TRAINED = """
import os
from pathlib import Path
import torch
from torch import nn
from pipeline.training import launched, processes
with processes.joined(launched.place()):
    import torch.distributed.fsdp, torch.distributed.optim
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
    model(torch.randn(4, 3)).sum().backward()
    del model
names = [Path(f"/proc/self/task/{thread}/comm").read_text() for thread in os.listdir("/proc/self/task")]
print([name for name in names if "gloo" in name])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the names of threads are read from /proc")
def test_processes_that_have_left_keep_no_threads_of_the_group():
    """Such a thread aborts its process where that exits while the thread lets a tensor go. In processes that have
    imported nothing yet: it depends on what is imported when.
    """
    first, second = scripts(TRAINED, 2)
    assert [out for _, out, _ in (first, second)] == ["[]\n"] * 2


HELD = """
import time
import torch.distributed as dist
from pipeline.training import launched, processes
processes.SETTLE = 3.0
with processes.joined(launched.place()):
    group = dist.group.WORLD
    began = time.monotonic()
print(time.monotonic() - began > 3)
"""


def test_a_group_that_somebody_holds_gets_the_time_to_let_its_tensors_go():
    assert [out for _, out, _ in scripts(HELD, 2)] == ["True\n"] * 2
