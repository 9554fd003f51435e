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

from foundation.errors import DataError, nearest
from pipeline.data.arrays import arrays, from_arrays
from pipeline.data.assemble import Raw, check_finite, cut_parts, listed
from pipeline.data.imagefolder import SCANNED
from pipeline.data.parts import PARTS, Part, Split
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
    """Data sets, loaders or arrays: one, a mapping of parts, or (train, test[, calibration])."""
    given = _named_parts(content, name)
    if all(_is_arrays(value) for value in given.values()):
        return from_arrays(given, name, seed, None)
    parts: dict[Part, Split] = {}
    digests: dict[Part, list[bytes]] = {}
    shapes: set[tuple[int, ...]] = set()
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
        shapes.add(shape)
        classes = getattr(samples.source, "classes", None)
        if names is None and isinstance(classes, Sequence) and not isinstance(classes, str):
            names = tuple(str(one) for one in classes)
    if len(shapes) > 1:
        raise DataError(f"{name}: the parts have different shapes: {sorted(shapes)}.", "Give parts of one shape.")
    cut, hashes = cut_parts(parts, digests, seed, name)
    channels, height, width = shapes.pop()
    # What own code returns is what the model gets: its transforms have normalised already.
    return Raw(name, cut, names, (channels, height, width), (0.0,) * channels, (1.0,) * channels, hashes)


def _named_parts(content: Any, name: str) -> dict[Part, Any]:
    if isinstance(content, Mapping):
        unknown = [str(key) for key in content if key not in _SYNONYMS]
        if unknown:
            hint = nearest(unknown[0], _SYNONYMS) or "Name them train, test and calibration."
            raise DataError(f"{name} has a part named {unknown[0]!r}.", hint)
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
    """A data set of anybody's, each sample as (tensor, class number)."""

    def __init__(self, source: Any, indices: Sequence[int] | None, name: str) -> None:
        self.source, self.name = source, name
        self.indices = range(len(source)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with user_code(self.name, DataError):
            sample = self.source[self.indices[index]]
        if not isinstance(sample, tuple | list) or len(sample) != 2:
            raise DataError(
                f"{self.name}: a sample is no pair (image, label).", "Return (image, label) from the data set."
            )
        image, label = sample
        if isinstance(image, Image.Image):
            need("torchvision")
            from pipeline.models import torchvision_operators  # noqa: F401  # before torchvision itself

            # isort: split
            import torchvision

            image = torchvision.transforms.functional.pil_to_tensor(image)
        elif isinstance(image, np.ndarray):
            image = torch.from_numpy(image)
        if not isinstance(image, Tensor) or image.ndim not in (2, 3):
            what = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise DataError(
                f"{self.name}: a sample is {what}, not an image.", "Return tensors (channels, height, width)."
            )
        try:
            number = int(label)
            if abs(number) >> 63:
                raise ValueError("more than 64 bits")
        except (TypeError, ValueError, OverflowError) as error:  # OverflowError: infinity
            raise DataError(f"{self.name}: {label!r} is no class number.", "Return whole numbers from 0.") from error
        return image if image.ndim == 3 else image[None], number


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
    known = getattr(samples.source, "targets", None) if count > SCANNED else None
    chosen = range(count) if known is None else range(0, count, count // SCANNED + 1)
    digests: list[bytes] = []
    labels: list[int] = []
    shape: tuple[int, ...] = ()
    with seeded(seed):  # random transforms draw the same each time, so the fingerprint is the same
        for position in chosen:
            image, label = samples[position]
            shape = shape or tuple(image.shape)
            if tuple(image.shape) != shape:
                raise DataError(
                    f"{name}: sample {position} has the shape {tuple(image.shape)}, others {shape}.",
                    "Resize all samples to one shape.",
                )
            check_finite(image[None], f"{name}, sample {position}")
            digests.append(hashlib.sha256(image.contiguous().numpy().tobytes()).digest())
            labels.append(label)
    if known is None:
        return torch.tensor(labels), digests, shape
    return torch.as_tensor(known).long()[list(samples.indices)], digests, shape
