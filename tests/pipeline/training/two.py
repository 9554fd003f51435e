"""Two gloo processes on this machine, as a launcher starts them: what the tests of several processes share."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pipeline.recovery.following import follow
from pipeline.release import fingerprint
from pipeline.training import jobs, launched, processes
from tests.pipeline.chain import FORKS, _forked


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def environment(rank: int, port: int, count: int = 2) -> dict[str, str]:
    """What torchrun sets for one process."""
    return {
        "RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def _one(work: Callable[..., Any], args: tuple[Any, ...], rank: int, port: int, said: Path) -> None:
    os.environ.update(environment(rank, port))
    torch.set_num_threads(1)
    os.dup2(os.open(said / f"stderr{rank}", os.O_WRONLY | os.O_CREAT), 2)
    torch.save(work(*args), said / f"result{rank}.pt")


@contextmanager
def running(said: Path, work: Callable[..., Any], *args: Any) -> Iterator[list[Any]]:
    """`work(*args)` in two processes at once; killed where they have not ended by the end."""
    said.mkdir(exist_ok=True)
    with _started([(_one, (work, args, rank), said) for rank in range(2)]) as started:
        yield started


def together(said: Path, work: Callable[..., Any], *args: Any, seconds: float = 60) -> list[Any]:
    """What `work(*args)` returns in each of two processes, None where it did not; their stderr lies in `said`."""
    with running(said, work, *args) as started:
        for process in started:
            process.join(seconds)
    results = [said / f"result{rank}.pt" for rank in range(2)]
    return [torch.load(path, weights_only=False) if path.exists() else None for path in results]


def led(source: Any, data: Any, task: Any, lead: Callable[[], Any]) -> Any:
    """In a process of two: `lead()` where it is the first one, else follow it."""
    place = launched.place()
    assert place is not None
    try:
        with processes.joined(place) as group:
            if not group.leads:
                return follow(source, data, task)
            made = lead()
            jobs.over()
            return made
    except processes.Over:
        return None


def _command(words: list[str], rank: int, port: int, said: Path) -> None:
    os.environ.update(environment(rank, port))
    torch.set_num_threads(1)
    if words[0] == "another-version":
        fingerprint.project_digest = lambda: "of another version"
        words = words[1:]
    _forked(words, str(said / f"stdout{rank}"), str(said / f"stderr{rank}"), None)


@contextmanager
def commands(said: Path, *words: str, second: tuple[str, ...] | None = None) -> Iterator[list[Any]]:
    """A command in two processes at once, `second` in the other one; killed where they have not ended by the end."""
    said.mkdir(exist_ok=True)
    each = [list(words), list(second or words)]
    with _started([(_command, (each[rank], rank), said) for rank in range(2)]) as started:
        yield started


@contextmanager
def alone(said: Path, rank: int, *words: str) -> Iterator[Any]:
    """A command in one process of two, whose neighbour is never started; killed where it has not ended by the end."""
    said.mkdir(exist_ok=True)
    with _started([(_command, (list(words), rank), said)]) as started:
        yield started[0]


@contextmanager
def _started(works: list[tuple[Callable[..., Any], tuple[Any, ...], Path]]) -> Iterator[list[Any]]:
    port = free_port()
    started = [FORKS.Process(target=work, args=(*args, port, said)) for work, args, said in works]
    for process in started:
        process.start()
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.join()


def ended(started: list[Any], said: Path, seconds: float = 100) -> list[tuple[int, str]]:
    """Exit code and stderr of each, once they have ended by themselves."""
    deadline = time.monotonic() + seconds
    for process in started:
        process.join(max(0.0, deadline - time.monotonic()))
        assert process.exitcode is not None, [p.read_text() for p in said.glob("stderr*")]
    files = [said / f"stderr{rank}" for rank in range(len(started))]  # none of one that was killed at once
    texts = [path.read_text() if path.exists() else "" for path in files]
    return [(process.exitcode, text) for process, text in zip(started, texts, strict=True)]


def errors(text: str) -> list[str]:
    """The lines that say what was wrong; a traceback is none that may be there."""
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if line.startswith("error:")]
