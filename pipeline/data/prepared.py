"""A data set of ours in which every sample is known by its place and its digest before it is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from pipeline.data.parts import Batch
from pipeline.data.samples import Sample, batched


class Prepared(Dataset[Any], ABC):
    """Samples by position, each what `Parting` takes apart. Of a large set only `scanned` samples are read at first."""

    scanned: int = 50_000
    """Samples that are read before anything is spent, evenly spaced."""
    workers: int = 0
    """Processes that read."""
    targets: Tensor | None = None
    """Class number of each sample, int64, `UNKNOWN` without labels; None where targets are no class numbers."""
    classes: tuple[str, ...] | None = None
    """Names of these classes."""
    digests: Sequence[bytes]
    """A hash per sample."""

    def __len__(self) -> int:
        return len(self.digests)

    @abstractmethod
    def place(self, index: int) -> str:
        """The sample, as messages call it."""

    @abstractmethod
    def __getitem__(self, index: int) -> Any: ...

    def batch(self, samples: Sequence[Sample]) -> Batch:
        """Samples as one batch."""
        return batched(samples)
