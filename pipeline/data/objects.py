"""Data sets and loaders of anybody's: own code that returns them, or the objects themselves."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
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
    default_collate,
)

from foundation.errors import DataError, brief, nearest
from pipeline.data.arrays import class_numbers, from_arrays
from pipeline.data.assemble import Raw, cut_parts, loaded
from pipeline.data.imagefolder import SCANNED
from pipeline.data.parts import PARTS, UNKNOWN, Batch, Inputs, Part, Split, Target
from pipeline.data.prepared import Prepared
from pipeline.data.samples import (
    TARGETS,
    Parting,
    Reading,
    Sample,
    Shapes,
    batched,
    class_number,
    digest_of,
    input_tensor,
    kind_of,
    leafed,
    sliced,
    target_tree,
)
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


def from_objects(content: Any, name: str, seed: int, reading: Reading | None = None) -> Raw:
    """Data sets, loaders or arrays, labelled or not: one, a mapping of parts, or (train, test[, calibration])."""
    reading = reading or Reading()
    given = _named_parts(content, name)
    if reading.targets != "values" and all(_is_images(value) for value in given.values()):
        pairs = {part: (value[0], value[1]) if _is_arrays(value) else (value, None) for part, value in given.items()}
        return from_arrays(pairs, name, seed, None)
    return from_samples(given, name, seed, reading)


def from_samples(given: Mapping[Part, Any], name: str, seed: int, reading: Reading) -> Raw:
    """Data sets and loaders by part; every sample is read once (of large sets, some) and checked."""
    parting = Parting(reading, name)
    parts: dict[Part, Split] = {}
    digests: dict[Part, list[bytes]] = {}
    shapes: Shapes | None = None
    names: tuple[str, ...] | None = None
    for part in PARTS:
        if part not in given:
            continue
        value = given[part]
        if _is_arrays(value):
            value = TensorDataset(*_alike_arrays(value, f"{name} ({part})"))
        samples, workers = _samples(value, f"{name} ({part})", parting)
        parts[part], digests[part], shapes = _scan(samples, workers, seed, shapes)
        with user_code(f"{name}: the names in .classes", DataError):
            classes = getattr(samples.source, "classes", None) or _class_names(value, reading)
            if names is None and isinstance(classes, Sequence) and not isinstance(classes, str):
                names = tuple(str(one) for one in classes)
    if len({split.labels is None for split in parts.values()}) > 1:  # classes in one part, values in another
        parts = {part: Split(split.count, split.stream) for part, split in parts.items()}
    cut, hashes = cut_parts(parts, digests, seed, name)
    assert shapes is not None and parting.fed is not None
    parting.shapes = shapes
    inputs = shapes.inputs()
    one = inputs[0]
    # What own code returns is what the model gets: its transforms have normalised already.
    image = len(inputs) == 1 and one.kind == "float" and len(one.shape) == 3 and not one.free
    channels = one.shape[0] if image else 0
    return Raw(
        name,
        cut,
        hashes,
        names if parting.labelled else None,
        (one.shape[0], one.shape[1], one.shape[2]) if image else None,
        (0.0,) * channels,
        (1.0,) * channels,
        labelled=bool(parting.labelled),
        inputs=() if image and not one.name else inputs,
        fed=parting.fed,
        lengths=shapes.lengths(),
    )


def _is_images(value: Any) -> bool:
    """Whether a part is arrays of images, with labels or without."""
    x = value[0] if _is_arrays(value) else value
    if not isinstance(x, Tensor | np.ndarray):
        return False
    if _is_arrays(value) and value[1].ndim > 1 and tuple(value[1].shape[1:]) != (1,):  # no class number each
        return False
    whole = str(x.dtype).removeprefix("torch.") not in ("uint8", "float16", "float32", "float64")
    return x.ndim > 3 or (x.ndim == 3 and not (whole and _is_arrays(value) and value[1].ndim > 1))


def _alike_arrays(value: Sequence[Any], name: str) -> tuple[Tensor, ...]:
    for letter, one in zip("xy", value, strict=True):
        if not one.ndim:
            raise DataError(f"{name}: {letter} is an array without rows.", "Give arrays (samples, ...).")
        if isinstance(one, np.ndarray) and one.dtype.kind not in "iufb":
            raise DataError(f"{name}: {letter} holds {one.dtype}, not numbers.", "Give arrays of numbers.")
    made = tuple(target_tree(one, name) if isinstance(one, np.ndarray) else one for one in value)
    if len({len(one) for one in made}) > 1:
        sizes = " and ".join(str(len(one)) for one in made)
        raise DataError(f"{name}: arrays of {sizes} samples.", "Give one target per sample.")
    return made


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


class _Samples(Dataset[Any]):
    """A data set of anybody's, each sample as it is (where a collate makes batches) or as tensors."""

    def __init__(self, source: Any, indices: Sequence[int] | None, name: str, parting: Parting) -> None:
        self.source, self.name, self.parting = source, name, parting
        with user_code(f"{name}: its length", DataError):
            self.indices = range(len(source)) if indices is None else indices
        self.collate: Callable[[list[Any]], Any] | None = parting.reading.collate

    def __len__(self) -> int:
        return len(self.indices)

    def place(self, index: int) -> str:
        """The sample, as messages call it."""
        number = self.indices[index]
        if isinstance(self.source, Prepared):
            return f"{self.name}, {self.source.place(number)}"
        return f"{self.name}, sample {number}"

    def raw(self, index: int) -> Any:
        """A sample as the user's own code returns it."""
        number = self.indices[index]
        try:
            with user_code(self.place(index), DataError):
                return self.source[number]
        except DataError as error:
            if isinstance(error.__cause__, IndexError):
                raise DataError(
                    f"{self.place(index)} is gone (IndexError): the data set said that it has {len(self)} samples.",
                    "Keep its length.",
                ) from error
            raise

    def __getitem__(self, index: int) -> Any:
        return (index, self.raw(index)) if self.collate is not None else self.one(index)

    def one(self, index: int) -> Sample:
        """The inputs and the target of a sample, without a dimension for the batch."""
        place = self.place(index)
        if self.collate is None:
            return self._tensors(*self.parting(self.raw(index), place), place)
        inputs, target = self.batch([(index, self.raw(index))])
        if any(len(one) != 1 for one in inputs):
            raise DataError(
                f"{place}: the collate makes {len(inputs[0])} samples of one.",
                "Let it return a batch with the samples in dimension 0.",
            )
        return tuple(one[0] for one in inputs), None if target is None else sliced(target, 0)

    def batch(self, samples: list[Any]) -> Batch:
        """Samples as a batch, by the user's own collate or by ours."""
        if self.collate is None:
            if isinstance(self.source, Prepared):
                return self.source.batch(samples)
            return batched(samples, self.parting.reading.pad)
        place = f"{self.place(samples[0][0])} and {len(samples) - 1} others"
        with user_code(f"{place}: the collate", DataError):
            made = self.collate([sample for _, sample in samples])
        inputs, target = self._tensors(*self.parting(made, place), place, whole=True)
        return tuple(one.float() / 255 if one.dtype == torch.uint8 else one for one in inputs), target

    def _tensors(self, leaves: Sequence[Any], target: Any, place: str, whole: bool = False) -> tuple[Inputs, Target]:
        images = self.parting.reading.images and not whole
        named = list(zip(self.parting.names, leaves, strict=True))
        inputs = tuple(input_tensor(one, f"{place}: {name}" if name else place, images) for name, one in named)
        if len(inputs) == 1 and not inputs[0].dim() and not self.parting.names[0]:
            raise DataError(f"{place} is {brief(leaves[0])}: one number is no sample.", "Return tensors or arrays.")
        if not whole and self.parting.shapes is not None:
            self.parting.shapes.check(inputs, place)
        made = None if target is None else target_tree(target, place)
        if made is not None and not whole:
            kind = self.parting.kind = self.parting.kind or kind_of(made)
            if kind_of(made) != kind and not _both_numbers(made, kind):
                raise DataError(
                    f"{place}: the target is {brief(target)} ({kind_of(made)}), others are {kind}.",
                    "Give all samples the same kind of target.",
                )
        return inputs, made


def _class_names(value: Any, reading: Reading) -> Any:
    """Names of the classes of a Hugging Face data set, which knows of each column what it holds."""
    features = getattr(value, "features", None)
    if not isinstance(features, Mapping):
        return None
    target = reading.target or next((name for name in TARGETS if name in features), None)
    return getattr(features.get(target), "names", None)


MOST_SPOOLED = 1_000_000
"""Samples of a data set without positions: one that has no end would fill the disk."""


class _Spooled(Dataset[Any]):
    """Samples that can only be read one after the other, kept in a file without a name so that they have positions."""

    def __init__(self, samples: Iterable[Any], name: str) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as this object
        self.places: list[tuple[int, int]] = []
        with user_code(name, DataError):
            for sample in samples:
                if len(self.places) == MOST_SPOOLED:
                    raise DataError(
                        f"{name} gave {MOST_SPOOLED:,} samples and has no end yet.",
                        "Give fewer (itertools.islice), or a data set with __len__ and __getitem__.",
                    )
                self._keep(sample, f"{name}, sample {len(self.places)}")
        self.file.flush()

    def _keep(self, sample: Any, place: str) -> None:
        if sample is None or isinstance(sample, str | int | float):
            raise DataError(
                f"{place} is {brief(sample)}, no sample.", "Return (input, target), a mapping, or the input alone."
            )
        held = io.BytesIO()
        torch.save(_kept(sample, place), held)
        start = self.file.tell()
        self.file.write(held.getbuffer())
        self.places.append((start, held.tell()))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        start, size = self.places[index]
        # By position: processes that share the file share where it is read, too.
        return torch.load(io.BytesIO(os.pread(self.file.fileno(), size, start)), weights_only=True)


def _kept(sample: Any, place: str) -> Any:
    """A sample with everything that is no text as tensors, so that it can be written and read without any code."""
    if isinstance(sample, Mapping):
        return {str(key): _kept(leafed(one), place) for key, one in sample.items()}
    if isinstance(sample, tuple | list):
        return tuple(_kept(leafed(one), place) for one in sample)
    if sample is None or isinstance(sample, str | int | float | Tensor):
        return sample
    return target_tree(sample, place)


def _both_numbers(target: Target, kind: str) -> bool:
    """Whether a target is a whole number among numbers, or 2.0 among whole ones, as some write them."""
    if not isinstance(target, Tensor) or target.dim():
        return False
    return kind == kind_of(torch.tensor(0.5)) or (kind == kind_of(torch.tensor(1)) and float(target).is_integer())


def _samples(value: Any, name: str, parting: Parting) -> tuple[_Samples, int]:
    """See a loader or data set as samples with positions; also how many workers its loader had."""
    workers, indices, collate = 0, None, None
    if isinstance(value, DataLoader):
        sampler, workers = value.sampler, value.num_workers
        collate = None if value.collate_fn is default_collate else value.collate_fn
        if isinstance(value.dataset, IterableDataset):
            indices = None
        elif isinstance(sampler, SubsetRandomSampler):
            indices = list(sampler.indices)
        elif not isinstance(sampler, SequentialSampler | RandomSampler | WeightedRandomSampler):
            raise DataError(
                f"{name}: a loader with a {type(sampler).__name__}.", "Give the data set itself, or a Subset."
            )
        value = value.dataset
        if collate is not None and collate.__module__.startswith("torch.utils.data"):  # of a loader without batches
            collate = None
    if not (hasattr(value, "__getitem__") and hasattr(value, "__len__")) or isinstance(value, IterableDataset):
        if not hasattr(value, "__iter__"):
            raise DataError(
                f"{name}: a {type(value).__name__} has neither positions nor an order, so it cannot be read.",
                "Give a data set with __len__ and __getitem__, an iterable, a DataLoader of one, or arrays (x, y).",
            )
        value = _Spooled(value, name)
    if isinstance(value, Prepared):
        workers = value.workers
    samples = _Samples(value, indices, name, parting)
    samples.collate = samples.collate or collate
    return samples, workers


def _scan(samples: _Samples, workers: int, seed: int, shapes: Shapes | None) -> tuple[Split, list[bytes], Shapes]:
    """Read every sample once (of large sets, some): class numbers, a hash of each, what their inputs have in common."""
    count, name, reading = len(samples), samples.name, samples.parting.reading
    if not count:
        raise DataError(f"{name} is empty.", "Give a data set with samples in it.")
    known: Tensor | None = None
    prepared = samples.source if isinstance(samples.source, Prepared) else None
    if prepared is not None:
        known = prepared.targets
        if known is not None and reading.targets == "values" and bool((known != UNKNOWN).any()):
            known = None
    elif count > SCANNED and reading.targets != "values":
        with user_code(f"{name}: its targets", DataError):
            targets = getattr(samples.source, "targets", None)
            known = None if targets is None else class_numbers(targets, f"{name}: targets")
        if known is not None and len(known) <= max(samples.indices):
            raise DataError(f"{name}: targets names the class of {len(known)} samples only.", "Give one per sample.")
    limit = prepared.scanned if prepared is not None else SCANNED if known is not None else count
    chosen = range(0, count, (count - 1) // limit + 1)
    digests: list[bytes] = []
    numbers: list[int | None] = []
    with seeded(seed):  # random transforms draw the same each time, so the fingerprint is the same
        for position in chosen:
            inputs, target = samples.one(position)
            shapes = shapes or Shapes(name, samples.parting.names, reading.dims)
            shapes.add(inputs, samples.place(position))
            if prepared is None:
                digests.append(digest_of(inputs))
            number = class_number(target) if target is not None else UNKNOWN
            if reading.targets == "classes" and number is None:
                raise DataError(
                    f"{samples.place(position)}: {brief(target)} is no class number.",
                    "Return whole numbers from 0, or name another task: --set task.name=regression",
                )
            numbers.append(number if reading.targets != "values" or target is None else None)
    assert shapes is not None
    labels: Tensor | None = None
    if known is not None:
        labels = known[list(samples.indices)]
    elif prepared is None and all(number is not None for number in numbers):
        labels = torch.tensor(numbers)

    def stream(chunks: Sequence[list[int]]) -> Iterator[Batch]:
        yield from loaded(samples, chunks, workers, samples.batch)

    return Split(count, stream, labels), digests if prepared is None else list(prepared.digests), shapes
