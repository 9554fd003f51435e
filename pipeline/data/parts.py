"""A data set as stages see it: three parts that share no sample, read in batches, normalised, reproducible."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from pipeline.models.source import Input, Size

SINGLE = "input"
"""Name of a model's only input where the data gives it none."""

Part = Literal["train", "calibration", "test"]
PARTS: tuple[Part, ...] = ("train", "calibration", "test")

Inputs = tuple[Tensor, ...]
"""What a model is fed with, a tensor for each of `Data.inputs`, samples in dimension 0."""
Target = Any
"""What a sample should give: a tensor, or a mapping or list of tensors, samples in dimension 0; None where there is
none.
"""
PLACES = "places that count"
"""Beside the dense model's outputs as a target: bool (samples, places), False where a sample was only filled up."""
Batch = tuple[Inputs, Target]
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Share:
    """One process's rows of every batch: `which` of `of` equal parts of each of its `cuts`."""

    which: int = 0
    of: int = 1
    cuts: int = 1

    def sizes(self, count: int) -> list[int]:
        """How many rows of a batch of `count` it has in each cut."""
        return [len(_span(_size(count, cut, self.cuts), self.which, self.of)) for cut in range(self.cuts)]

    def rows(self, count: int) -> list[int]:
        """Its rows of a batch of `count`, cut by cut, ascending."""
        found: list[int] = []
        for cut in range(self.cuts):
            start = count * cut // self.cuts
            found += [start + row for row in _span(_size(count, cut, self.cuts), self.which, self.of)]
        return found


def _size(count: int, which: int, of: int) -> int:
    return len(_span(count, which, of))


def _span(count: int, which: int, of: int) -> range:
    """Part `which` of `of`; sizes differ by one at most."""
    return range(count * which // of, count * (which + 1) // of)


ALONE = Share()
"""Every row."""


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

    def __call__(self, images: Tensor, generator: torch.Generator, share: Share | None = None, of: int = 0) -> Tensor:
        """Change images of shape (batch, channels, height, width): those of a `share` of a batch of `of` images.

        Whatever share of it is given, the same image of a batch is changed the same way.
        """
        draw = torch.rand(4, of or len(images), generator=generator) * 2 - 1
        if share is not None and share != ALONE:
            draw = draw[:, share.rows(of)]
        angle = draw[0] * (self.degrees * torch.pi / 180)
        zoom = 1 + draw[1] * self.scale
        shift = draw[2:] * (2 * self.shift)  # the grid runs from -1 to 1
        cos, sin = angle.cos() * zoom, angle.sin() * zoom
        rows = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], dim=1).view(-1, 2, 3)
        grid = F.affine_grid(rows, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode=self.padding, align_corners=False)


UNKNOWN = -1
"""Class number of a sample without one; no loss takes it, so that none can be mistaken for a class."""
IGNORED = -100
"""Class number of a place inside a sample that counts for nothing: torch's losses leave it out (`ignore_index`)."""


@dataclass(frozen=True)
class Split:
    """One part: how many samples, and how to read them."""

    count: int
    stream: Callable[[Sequence[list[int]]], Iterator[Batch]] = field(repr=False)
    """For lists of sample numbers, the inputs and target of each list; images (batch, channels, height, width) of any
    size.
    """
    labels: Tensor | None = None
    """Class numbers, int64, one per sample, where they are known without reading the samples; they are the target then.
    `UNKNOWN` where nobody gave one.
    """

    def __len__(self) -> int:
        return self.count


def image_split(labels: Tensor, images: Callable[[Sequence[list[int]]], Iterator[Tensor]]) -> Split:
    """A part of labelled images: `images` gives those of each list of sample numbers, float, any size."""
    return Split(len(labels), lambda chunks: (((one,), None) for one in images(chunks)), labels)


@dataclass(frozen=True)
class Fed:
    """What the data hands to a model's forward: `args` tensors (or trees of them) by position, the others by name.

    `tree`: of (arguments, keyword arguments), with a leaf for each input.
    """

    args: int
    kwargs: tuple[str, ...]
    tree: pytree.TreeSpec


ONE_IMAGE = Fed(1, (), pytree.tree_structure(((0,), {})))
"""One tensor, by position."""


@dataclass(frozen=True)
class AnsweredBy:
    """Gives what `model` answers to a batch's inputs as their target."""

    model: Callable[..., Mapping[str, Tensor]]

    def __call__(self, inputs: Inputs) -> Target:
        """The target of a batch with these inputs."""
        return self.model(*inputs)


@dataclass(frozen=True)
class Data:
    """A data set in three parts that share no sample."""

    name: str
    train: Split
    calibration: Split
    test: Split
    inputs: tuple[Input, ...]
    """What `batches` gives, in this order; the name is "" where the data gives none."""
    fingerprint: str
    labels: tuple[str, ...] = ()
    """Name of each class, where the targets are class numbers; none while the data has no labels."""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    """Per channel, of images: batches are (image - mean) / std; empty where nothing is done to them."""
    augmentation: Augmentation | None = None
    notes: tuple[str, ...] = ()
    """What the user should know, such as duplicates that were left out."""
    labelled: bool = True
    """Whether the targets are the data's own; if not, there are none, or the answers of the dense model."""
    made_up: bool = False
    """Whether the inputs are random, since there is no data."""
    fed: Fed = ONE_IMAGE
    image_size: Size | None = None
    """Channels, height, width that images are resized to; None for data that is no images, or has its own size."""
    lengths: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Free dimension -> sizes that samples have: the usual one, the smallest, the largest."""
    answer: Callable[[Inputs], Target] | None = field(default=None, repr=False, compare=False)
    """Gives the target of a batch in place of the data's own: what the dense model answers."""
    names: tuple[str, ...] = ()
    """Name of each class inside a target that is no single class number: of a label map, of boxes, of tokens."""
    fit: Literal["cover", "stretch"] = "cover"
    """How image files come to `image_size`: covering it, the rest cut away, or stretched to it."""
    sample_rate: int = 0
    """Samples per second of recordings; 0 for data that is none."""
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False, compare=False)
    """Beside the model a bundle needs these to read raw inputs, by file name: a tokenizer, say."""

    @property
    def classes(self) -> int | None:
        """Number of classes; None while nothing says how many there are."""
        return len(self.labels) or None

    @property
    def input_size(self) -> Size | None:
        """Channels, height, width where the model is fed one image, else None."""
        shape = self.inputs[0].shape if len(self.inputs) == 1 and self.inputs[0].kind == "float" else ()
        return (shape[0], shape[1], shape[2]) if len(shape) == 3 else None

    def answered(self, answers: Mapping[str, Tensor], classes: int) -> Data:
        """Data without labels, with what the dense model answers in their place.

        `answers`: part -> class number per sample, int64, in the order of the part; of `classes` classes.
        """
        parts = {part: replace(self.split(part), labels=answers.get(part, self.split(part).labels)) for part in PARTS}
        names = tuple(map(str, range(classes)))
        return replace(self, labels=names, train=parts["train"], calibration=parts["calibration"], test=parts["test"])

    def answered_by(self, model: Callable[..., Mapping[str, Tensor]]) -> Data:
        """Data whose targets are what `model` gives for each batch: a mapping of tensors."""
        return replace(self, answer=AnsweredBy(model))

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
        share: Share = ALONE,
        turn: tuple[int, int] = (0, 1),
    ) -> Iterator[Batch]:
        """Yield inputs, a tensor for each of `inputs` (images normalised, float32), and the target of each batch.

        Order and augmentation depend on `seed` alone, so give each epoch another one. `share`: the rows of every batch
        that are read; all shares together give what one would. A batch that has none for a share is left out there.
        `turn`: (which, of how many) takes whole batches in turn.
        """
        split = self.split(part)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(split), generator=generator) if shuffle else torch.arange(len(split))
        chunks = blocks(order.tolist(), batch_size)
        if drop_last and len(chunks) > 1 and len(chunks[-1]) < batch_size:
            chunks.pop()
        chunks = chunks[turn[0] :: turn[1]]
        wholes = [len(chunk) for chunk in chunks]
        owns = [share.rows(whole) for whole in wholes]
        chunks = [[chunk[row] for row in own] for chunk, own in zip(chunks, owns, strict=True)]
        while chunks and not chunks[-1]:  # only a short batch at the end has none for a part, unless all of them do
            chunks.pop()
        for chunk, (raw, target), whole in zip(chunks, split.stream(chunks), wholes[: len(chunks)], strict=True):
            inputs = raw
            if self.image_size is not None:
                images = _fit(raw[0], self.image_size)
                if augment and self.augmentation is not None:
                    images = self.augmentation(images, generator, share, whole)
                inputs = (images, *raw[1:])
            if self.mean:
                mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
                inputs = ((inputs[0] - mean) / std, *inputs[1:])
            if split.labels is not None:
                target = split.labels[chunk]
            yield inputs, target if self.answer is None else self._answered(inputs)

    def _answered(self, inputs: Inputs) -> Target:
        """What the dense model answers, and which places of it count."""
        assert self.answer is not None
        answer, places = self.answer(inputs), self.counted(inputs)
        return answer if places is None else {**answer, PLACES: places}

    def counted(self, inputs: Inputs) -> Tensor | None:
        """Which places (samples, places) of a batch hold something, where a mask among its inputs says so; the others
        only fill samples up to one length. None: there is no mask.
        """
        for one, value in zip(self.inputs, inputs, strict=True):
            if one.kind == "mask" and len(one.shape) == 1 and "pad" not in one.name.lower():  # those mark what fills up
                return value != 0
        return None

    def arrays(self, part: Part, count: int) -> dict[str, Array]:
        """`sample` as arrays by the inputs' names."""
        return self.feed(self.sample(part, count))

    def feed(self, inputs: Inputs) -> dict[str, Array]:
        """A batch's inputs as arrays by name."""
        return {one.name or SINGLE: value.numpy() for one, value in zip(self.inputs, inputs, strict=True)}

    def feeds(self, part: Part, batch_size: int) -> Iterator[tuple[dict[str, Array], Target]]:
        """`batches` with the inputs as arrays by name."""
        return ((self.feed(inputs), target) for inputs, target in self.batches(part, batch_size))

    def sample(self, part: Part, count: int) -> Inputs:
        """Inputs of `count` samples, evenly spaced over the part, as `batches` gives them."""
        return next(self.some(part, count).batches(part, count))[0]

    def some(self, part: Part, count: int) -> Data:
        """The same data with at most `count` samples of `part`, evenly spaced."""
        return self.only(part, evenly(len(self.split(part)), count))

    def only(self, part: Part, chosen: Tensor) -> Data:
        """The same data with the samples of `part` at the positions `chosen`."""
        made: Data = replace(self, **{part: picked(self.split(part), chosen)})  # type: ignore[arg-type]
        return made


def _fit(images: Tensor, size: Size) -> Tensor:
    """Bilinear resize to `size`; one channel is repeated if more are wanted."""
    channels, height, width = size
    if tuple(images.shape[2:]) != (height, width):
        images = F.interpolate(images, (height, width), mode="bilinear", align_corners=False, antialias=True)
    return images.expand(-1, channels, -1, -1) if images.shape[1] != channels else images


def evenly(most: int, count: int) -> Tensor:
    """Positions of at most `count` of `most` samples, evenly spaced."""
    return torch.linspace(0, most - 1, min(count, most)).long()


def picked(split: Split, chosen: Tensor) -> Split:
    """The samples of `split` at the positions `chosen`."""

    def stream(chunks: Sequence[list[int]]) -> Iterator[Batch]:
        return split.stream([chosen[chunk].tolist() for chunk in chunks])

    return Split(len(chosen), stream, None if split.labels is None else split.labels[chosen])


def blocks(positions: Sequence[int], size: int) -> list[list[int]]:
    """Cut positions into lists of `size`, the last one shorter."""
    return [list(positions[start : start + size]) for start in range(0, len(positions), size)]
