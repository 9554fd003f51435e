"""What a launcher (torchrun, accelerate launch) says of this process, and what GPUs a machine has; without torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

LEAVE = os._exit
"""Ends the process from any thread; kept here since the command line bars it to code of others."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Addresses at which only processes of this machine find each other."""


@dataclass(frozen=True)
class Place:
    """One process of several: its rank among all, how many there are, its rank on this machine, where rank 0 runs and
    listens, and whether all of them run on this machine.
    """

    rank: int
    count: int
    local: int
    address: str
    port: int
    together: bool


def place() -> Place | None:
    """The place that a launcher gave this process; None where it runs alone."""
    given = os.environ
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= given.keys():
        return None
    try:
        count, address = int(given["WORLD_SIZE"]), given["MASTER_ADDR"]
        found = Place(
            int(given["RANK"]),
            count,
            int(given.get("LOCAL_RANK", "0")),
            address,
            int(given["MASTER_PORT"]),
            address in LOOPBACK or given.get("LOCAL_WORLD_SIZE") == str(count),
        )
    except ValueError:  # variables of somebody else
        return None
    return found if found.count > 1 else None


def accelerators() -> tuple[str, ...]:
    """What `device = "auto"` may find here, told without loading torch: the GPUs, and which of them are hidden."""
    listed = Path("/proc/driver/nvidia/gpus")
    found = sorted(path.name for path in listed.iterdir()) if listed.is_dir() else []
    hidden = (
        f"{name}={os.environ[name]}" for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES") if name in os.environ
    )
    return (*found, *hidden)
