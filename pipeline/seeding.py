"""Reproducible randomness that leaves the caller's own generators as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def of_epoch(seed: int, epoch: int) -> int:
    """The seed of one pass over the data, the first being 1: those of near seeds never meet."""
    return seed * 1_000_003 + epoch


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Run the block with Python's, NumPy's and torch's CPU generators seeded, and restore all three afterwards.

    The generator of `device` is seeded and restored, too, where it is no CPU.
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        with _seeded_device(seed, device):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)


@contextmanager
def _seeded_device(seed: int, device: torch.device | None) -> Iterator[None]:
    if device is None or device.type == "cpu":
        yield
        return
    module = torch.get_device_module(device)
    state = module.get_rng_state()  # of the current device, which is the one that is trained on
    module.manual_seed(seed)
    try:
        yield
    finally:
        module.set_rng_state(state)
