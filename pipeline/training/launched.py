"""What a launcher (torchrun, accelerate launch) says of this process, and what GPUs a machine has; without torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

LEAVE = os._exit
"""Ends the process from any thread; kept here since the command line bars it to code of others."""


@dataclass(frozen=True)
class Place:
    """One process of several: its rank among all, how many there are, its rank on this machine, where rank 0 runs."""

    rank: int
    count: int
    local: int
    address: str


def place() -> Place | None:
    """The place that a launcher gave this process; None where it runs alone."""
    given = os.environ
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= given.keys():
        return None
    try:
        found = Place(
            int(given["RANK"]), int(given["WORLD_SIZE"]), int(given.get("LOCAL_RANK", "0")), given["MASTER_ADDR"]
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
