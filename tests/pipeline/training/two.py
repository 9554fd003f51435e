"""Two gloo processes on this machine, as a launcher starts them: what the tests of several processes share."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.training import jobs, launched, processes
from pipeline.training.following import follow
from tests.pipeline.chain import FORKS


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


def together(folder: Path, work: Callable[..., Any], *args: Any, seconds: float = 60) -> list[Any]:
    """What `work(*args)` returns in each of two processes, None where it did not; stderr lies in `folder`."""
    port = free_port()
    started = [FORKS.Process(target=_one, args=(work, args, rank, port, folder)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(seconds)
    for process in started:
        process.kill()
        process.join()
    results = [folder / f"result{rank}.pt" for rank in range(2)]
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
