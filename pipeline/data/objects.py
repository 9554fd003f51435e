"""Data sets and loaders of anybody's: own code that returns them, or the objects themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from foundation.errors import DataError, brief, nearest
from pipeline.data.arrays import arrays, class_numbers, from_arrays, pixels_of
from pipeline.data.assemble import Raw, cut_parts, listed
from pipeline.data.imagefolder import SCANNED
from pipeline.data.parts import PARTS, UNKNOWN, Part, Split
from pipeline.models.extras import need
from pipeline.models.from_code import user_code
from pipeline.seeding import seeded

_SYNONYMS: dict[str, Part] = {
    "train": "train",
    "training": "train",
    "test": "test",
    "val": "calibration",
    "valid": "calibration",
    "validation": "calibration",
    "calibration": "calibration",
}


def from_objects(content: Any, name: str, seed: int) -> Raw:
    """Data sets, loaders or arrays, labelled or not: one, a mapping of parts, or (train, test[, calibration])."""
    given = _named_parts(content, name)
    if all(_is_arrays(value) or isinstance(value, Tensor | np.ndarray) for value in given.values()):
        pairs = {part: (value[0], value[1]) if _is_arrays(value) else (value, None) for part, value in given.items()}
        return from_arrays(pairs, name, seed, None)
    parts: dict[Part, Split] = {}
    digests: dict[Part, list[bytes]] = {}
    shapes: set[tuple[int, ...]] = set()
    labelled: set[bool] = set()
    names: tuple[str, ...] | None = None
    for part in PARTS:
        if part not in given:
            continue
        value = given[part]
        if _is_arrays(value):
            value = TensorDataset(*arrays(value[0], value[1], f"{name} ({part})"))
        samples, workers = _samples(value, f"{name} ({part})")
        labels, digests[part], shape = _scan(samples, f"{name} ({part})", seed)
        parts[part] = listed(samples, labels, workers)
        labelled.add(bool(samples.labelled))
        shapes.add(shape)
        with user_code(f"{name}: the names in .classes", DataError):
            classes = getattr(samples.source, "classes", None)
            if names is None and isinstance(classes, Sequence) and not isinstance(classes, str):
                names = tuple(str(one) for one in classes)
    if len(shapes) > 1:
        raise DataError(f"{name}: the parts have different shapes: {sorted(shapes)}.", "Give parts of one shape.")
    if len(labelled) > 1:
        raise DataError(f"{name}: some parts have labels and others none.", "Give labels for all parts, or for none.")
    cut, hashes = cut_parts(parts, digests, seed, name)
    channels, height, width = shapes.pop()
    # What own code returns is what the model gets: its transforms have normalised already.
    known = labelled == {True}
    size, mean, std = (channels, height, width), (0.0,) * channels, (1.0,) * channels
    return Raw(name, cut, names if known else None, size, mean, std, hashes, labelled=known)


def _named_parts(content: Any, name: str) -> dict[Part, Any]:
    if isinstance(content, Mapping):
        unknown = [brief(key) for key in content if key not in _SYNONYMS]
        if unknown:
            hint = nearest(unknown[0].strip("'"), _SYNONYMS) or "Name them train, test and calibration."
            raise DataError(f"{name} has a part named {unknown[0]}.", hint)
        parts = {_SYNONYMS[key]: value for key, value in content.items()}
    elif isinstance(content, tuple | list) and len(content) in (2, 3) and not _is_arrays(content):
        parts = dict(zip(("train", "test", "calibration"), content, strict=False))
    else:
        parts = {"train": content}
    if "train" not in parts:
        raise DataError(f"{name} has no training part.", "Name the parts train, test and calibration.")
    if "test" not in parts and "calibration" in parts:
        parts["test"] = parts.pop("calibration")  # two parts, the second called validation: it is the judge
    if "test" in parts and parts["test"] is parts["train"]:
        raise DataError(f"{name} gives the same data for training and test.", "Give parts that differ.")
    return parts


def _is_arrays(value: Any) -> bool:
    return (
        isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(v, Tensor | np.ndarray) for v in value)
    )


class _Samples(Dataset[tuple[Tensor, int]]):
    """A data set of anybody's, each sample as (tensor, class number); `UNKNOWN` where it has no label."""

    def __init__(self, source: Any, indices: Sequence[int] | None, name: str) -> None:
        self.source, self.name = source, name
        with user_code(f"{name}: its length", DataError):
            self.indices = range(len(source)) if indices is None else indices
        self.like: Tensor | None = None
        """The first sample that was read: the others have its shape, and are bytes where it is."""
        self.labelled: bool | None = None
        """Whether the first sample that was read had a label: the others do as it does."""

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        number = self.indices[index]
        place = f"{self.name}, sample {number}"
        with user_code(place, DataError):
            sample = self.source[number]
        image, label = self._pair(sample, place)
        if isinstance(image, Image.Image):
            need("torchvision")
            from pipeline.models import torchvision_operators  # noqa: F401  # before torchvision itself

            # isort: split
            import torchvision

            image = torchvision.transforms.functional.pil_to_tensor(image)
        if not isinstance(image, Tensor | np.ndarray) or image.ndim not in (2, 3):
            what = tuple(image.shape) if isinstance(image, Tensor | np.ndarray) else type(image).__name__
            raise DataError(f"{place} is {what}, not an image.", "Return tensors (channels, height, width).")
        pixels = pixels_of(image, f"{place}: the image")
        number = UNKNOWN if label is None else _class_number(label, place)
        self.labelled = label is not None if self.labelled is None else self.labelled
        if self.labelled != (label is not None):
            odd, others = ("no label", "have one") if label is None else ("a label", "have none")
            raise DataError(f"{place} has {odd}, others {others}.", "Give labels for all samples, or for none.")
        return self._alike(pixels if pixels.ndim == 3 else pixels[None], place), number

    @staticmethod
    def _pair(sample: Any, place: str) -> tuple[Any, Any]:
        """Image and label of a sample; the label is None where there is none: an image alone, (image,), or so given."""
        if isinstance(sample, Image.Image | Tensor | np.ndarray):
            return sample, None
        if not isinstance(sample, tuple | list) or len(sample) not in (1, 2):
            raise DataError(
                f"{place} is no pair (image, label).", "Return (image, label) from the data set, or the image alone."
            )
        return sample[0], sample[1] if len(sample) == 2 else None

    def _alike(self, image: Tensor, place: str) -> Tensor:
        """The image, having checked that it has numbers, and the shape and scale of the others."""
        like = self.like = image if self.like is None else self.like
        if not image.numel():
            raise DataError(f"{place} has the shape {tuple(image.shape)}: no pixel.", "Leave it out.")
        if image.shape != like.shape:
            raise DataError(
                f"{place} has the shape {tuple(image.shape)}, others {tuple(like.shape)}.",
                "Resize all samples to one shape.",
            )
        if image.dtype != like.dtype:  # bytes go from 0 to 255, floats as a rule from 0 to 1
            raise DataError(f"{place} is {image.dtype}, others {like.dtype}.", "Return one type of image.")
        if not bool(image.isfinite().all()):
            raise DataError(f"{place} holds NaN or infinity.", "Correct it or leave it out.")
        return image


def _class_number(label: Any, place: str) -> int:
    try:
        number = int(label)
        if isinstance(label, str | bytes) or number != label or abs(number) >> 63:
            raise ValueError("no whole number of 64 bits")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # `label` can be an object of anybody's
        raise DataError(f"{place}: {brief(label)} is no class number.", "Return whole numbers from 0.") from error
    return number


def _samples(value: Any, name: str) -> tuple[_Samples, int]:
    """See a loader or data set as samples with positions; also how many workers its loader had."""
    workers, indices = 0, None
    if isinstance(value, DataLoader):
        sampler, workers = value.sampler, value.num_workers
        if isinstance(sampler, SubsetRandomSampler):
            indices = list(sampler.indices)
        elif not isinstance(value.dataset, IterableDataset) and not isinstance(
            sampler, SequentialSampler | RandomSampler | WeightedRandomSampler
        ):
            raise DataError(
                f"{name}: a loader with a {type(sampler).__name__}.", "Give the data set itself, or a Subset."
            )
        value = value.dataset
    if isinstance(value, IterableDataset) or not (hasattr(value, "__getitem__") and hasattr(value, "__len__")):
        raise DataError(
            f"{name}: a {type(value).__name__} has no length and positions, so it cannot be cut and repeated.",
            "Give a data set with __len__ and __getitem__, a DataLoader of one, or arrays (x, y).",
        )
    return _Samples(value, indices, name), workers


def _scan(samples: _Samples, name: str, seed: int) -> tuple[Tensor, list[bytes], tuple[int, ...]]:
    """Read every sample once (of large sets, some): labels, a hash of each, the shape they share."""
    count = len(samples)
    if not count:
        raise DataError(f"{name} is empty.", "Give a data set with samples in it.")
    known: Tensor | None = None
    if count > SCANNED:
        with user_code(f"{name}: its targets", DataError):
            targets = getattr(samples.source, "targets", None)
            known = None if targets is None else class_numbers(targets, f"{name}: targets")
        if known is not None and len(known) <= max(samples.indices):
            raise DataError(f"{name}: targets names the class of {len(known)} samples only.", "Give one per sample.")
    chosen = range(count) if known is None else range(0, count, count // SCANNED + 1)
    digests: list[bytes] = []
    labels: list[int] = []
    shape: tuple[int, ...] = ()
    with seeded(seed):  # random transforms draw the same each time, so the fingerprint is the same
        for position in chosen:
            image, label = samples[position]
            shape = tuple(image.shape)
            digests.append(hashlib.sha256(image.contiguous().numpy().tobytes()).digest())
            labels.append(label)
    if known is None:
        return torch.tensor(labels), digests, shape
    return known[list(samples.indices)], digests, shape
