"""A data set as stages see it: three parts that share no sample, read in batches, normalised, reproducible."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.source import Size

Part = Literal["train", "calibration", "test"]
PARTS: tuple[Part, ...] = ("train", "calibration", "test")


@dataclass(frozen=True)
class Augmentation:
    """A random affine change of each training image, drawn anew in every epoch."""

    degrees: float = 10.0
    """Rotation, at most this much either way."""
    shift: float = 0.08
    """Shift along each axis, at most this share of its length."""
    scale: float = 0.1
    """Relative change of size, at most this much either way."""
    padding: Literal["zeros", "border"] = "border"
    """What comes in from beyond the edge."""

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Change images of shape (batch, channels, height, width)."""
        draw = torch.rand(4, len(images), generator=generator) * 2 - 1
        angle = draw[0] * (self.degrees * torch.pi / 180)
        zoom = 1 + draw[1] * self.scale
        shift = draw[2:] * (2 * self.shift)  # the grid runs from -1 to 1
        cos, sin = angle.cos() * zoom, angle.sin() * zoom
        rows = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], dim=1).view(-1, 2, 3)
        grid = F.affine_grid(rows, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode=self.padding, align_corners=False)


UNKNOWN = -1
"""Label of a sample without one; no loss takes it, so that none can be mistaken for a class."""


@dataclass(frozen=True)
class Split:
    """One part: its labels, and how to read its images."""

    labels: Tensor
    """Class numbers, int64, one per sample; `UNKNOWN` where nobody gave one."""
    stream: Callable[[Sequence[list[int]]], Iterator[Tensor]] = field(repr=False)
    """For lists of sample numbers, the float images of each, (batch, channels, height, width), any size."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """A data set in three parts that share no sample."""

    name: str
    train: Split
    calibration: Split
    test: Split
    labels: tuple[str, ...]
    """Name of each class; none while the data has no labels."""
    input_size: Size
    """Channels, height, width of what `batches` gives."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Per channel: batches are (image - mean) / std."""
    fingerprint: str
    augmentation: Augmentation | None = None
    notes: tuple[str, ...] = ()
    """What the user should know, such as duplicates that were left out."""
    labelled: bool = True
    """Whether the labels are the data's own; if not, they are unknown, or the answers of the dense model."""

    @property
    def classes(self) -> int | None:
        """Number of classes; None while nothing says how many there are."""
        return len(self.labels) or None

    def answered(self, answers: Mapping[str, Tensor], classes: int) -> Data:
        """Data without labels, with what the dense model answers in their place.

        `answers`: part -> class number per sample, int64, in the order of the part; of `classes` classes.
        """
        parts = {part: replace(self.split(part), labels=answers.get(part, self.split(part).labels)) for part in PARTS}
        names = tuple(map(str, range(classes)))
        return replace(self, labels=names, train=parts["train"], calibration=parts["calibration"], test=parts["test"])

    def split(self, part: Part) -> Split:
        """One part by name."""
        return {"train": self.train, "calibration": self.calibration, "test": self.test}[part]

    def batches(
        self,
        part: Part,
        batch_size: int = 256,
        shuffle: bool = False,
        seed: int = 0,
        *,
        augment: bool = False,
        drop_last: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised images (batch, C, H, W) float32 and labels (batch,) int64.

        Order and augmentation depend on `seed` alone, so give each epoch another one.
        """
        split = self.split(part)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(split), generator=generator) if shuffle else torch.arange(len(split))
        chunks = blocks(order.tolist(), batch_size)
        if drop_last and len(chunks) > 1 and len(chunks[-1]) < batch_size:
            chunks.pop()
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        for chunk, raw in zip(chunks, split.stream(chunks), strict=True):
            images = _fit(raw, self.input_size)
            if augment and self.augmentation is not None:
                images = self.augmentation(images, generator)
            yield (images - mean) / std, split.labels[chunk]

    def sample(self, part: Part, count: int) -> Tensor:
        """Return `count` images, evenly spaced over the part, as `batches` gives them."""
        split = self.split(part)
        chosen = torch.linspace(0, len(split) - 1, min(count, len(split))).long()
        one = replace(self, test=picked(split, chosen))
        return next(one.batches("test", count))[0]


def _fit(images: Tensor, size: Size) -> Tensor:
    """Bilinear resize to `size`; one channel is repeated if more are wanted."""
    channels, height, width = size
    if tuple(images.shape[2:]) != (height, width):
        images = F.interpolate(images, (height, width), mode="bilinear", align_corners=False, antialias=True)
    return images.expand(-1, channels, -1, -1) if images.shape[1] != channels else images


def picked(split: Split, chosen: Tensor) -> Split:
    """The samples of `split` at the positions `chosen`."""

    def stream(chunks: Sequence[list[int]]) -> Iterator[Tensor]:
        return split.stream([chosen[chunk].tolist() for chunk in chunks])

    return Split(split.labels[chosen], stream)


def blocks(positions: Sequence[int], size: int) -> list[list[int]]:
    """Cut positions into lists of `size`, the last one shorter."""
    return [list(positions[start : start + size]) for start in range(0, len(positions), size)]
