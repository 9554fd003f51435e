"""Which samples run at once, and how many of a weight's rows are looked at: the same for observing and for fitting."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pipeline.channels.program.capture import Captured

CHUNK = 32
"""Samples that are computed at once, where the batch is free."""
ROWS = 16384
PER_COLUMN = 8
"""Rows of a weight: so many, or so many for each of its columns, where the samples have them."""
MOST = 1 << 26
"""Numbers in the rows of one weight: a quarter of a gigabyte. Fewer positions are drawn beyond."""


def batches(captured: Captured, samples: Tensor) -> Iterator[Tensor]:
    """`samples` in batches that the program takes; none of one sample, a case of its own to torch.export.

    Where the program fixes its batch, samples that do not fill one are repeated, and those that are left over left out.
    """
    if not captured.dynamic_batch:
        size = len(captured.example[0])
        if len(samples) < size:
            samples = samples.repeat(-(-size // len(samples)), *[1] * (samples.dim() - 1))
        yield from (samples[at : at + size] for at in range(0, len(samples) - size + 1, size))
        return
    if len(samples) == 1:
        samples = torch.cat([samples, samples])
    parts = [samples[at : at + CHUNK] for at in range(0, len(samples), CHUNK)]
    if len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    yield from parts


def chunked(captured: Captured, inputs: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """All inputs of a model, samples in dimension 0 of each, in batches that the program takes."""
    return list(zip(*(batches(captured, one) for one in inputs), strict=True))


def rows_wanted(groups: int, columns: int) -> int:
    """How many rows of a weight's matrices (groups, outputs, columns) are looked at."""
    return min(max(ROWS, PER_COLUMN * columns), max(1, MOST // (groups * columns)))


def seed_of(name: str) -> int:
    """A number of a node's name that is the same in every process."""
    return zlib.crc32(name.encode())
