"""From what a source read to a `Data`: parts cut, compared and checked, labels named, all of it fingerprinted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
)

from foundation.errors import DataError, first_line
from pipeline.data.parts import (
    ONE_IMAGE,
    PARTS,
    UNKNOWN,
    Augmentation,
    Data,
    Fed,
    Part,
    Split,
    image_split,
    picked,
)
from pipeline.models.source import Input, Size

TEST_SHARE = 0.2
"""Of a data set that comes in one piece."""
CALIBRATION_SHARE = 0.1
"""Of the training part; chooses the best epoch and calibrates, so it must not be the test part."""


CHUNK = 1024
"""Samples of an array that are looked at together at most: it may lie in a file, and is never read whole."""
_NUMBERS = 1 << 22


def at_once(numbers: int) -> int:
    """Samples of so many numbers each that are looked at together."""
    return max(1, min(CHUNK, _NUMBERS // max(1, numbers)))


@dataclass(frozen=True)
class Raw:
    """A data set as read, before the parts are compared and normalised."""

    name: str
    parts: dict[Part, Split]
    digests: dict[Part, list[bytes]]
    """A hash per sample, to find the same sample in two parts; empty where the data is too large to be read first."""
    labels: tuple[str, ...] | None = None
    size: Size | None = None
    """Channels, height, width of images that may be resized; None for anything else."""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    augmentation: Augmentation | None = None
    labelled: bool = True
    """False: there are no targets; every class number, where there are such, is `UNKNOWN`."""
    inputs: tuple[Input, ...] = ()
    """What is no single image says what it is."""
    fed: Fed = ONE_IMAGE
    lengths: tuple[tuple[str, tuple[int, ...]], ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    """Of classes inside targets that are no single class numbers."""
    fit: Literal["cover", "stretch"] = "cover"
    sample_rate: int = 0
    """Of recordings."""
    notes: tuple[str, ...] = ()


def finish(raw: Raw, input_size: Size | None) -> Data:
    """Check labels, take duplicates out, fingerprint."""
    size = (input_size or raw.size) if raw.size is not None else None
    if input_size is not None and raw.size is None:
        raise DataError(
            f"{raw.name} holds no images that could be resized to data.input_size.", "Leave data.input_size out."
        )
    if size is not None and raw.size is not None and size[0] != raw.size[0] and raw.size[0] != 1:
        raise DataError(
            f"{raw.name} has images of {raw.size[0]} channels, which cannot become {size[0]}.",
            f"Set data.input_size to {raw.size[0]} channels.",
        )
    parts, digests, notes = _disjoint(raw)
    for part in PARTS:
        if not len(parts[part]):
            raise DataError(f"{raw.name}: the {part} part is empty.", "Give more data; the parts never share a sample.")
    numbered = all(parts[part].labels is not None for part in PARTS)
    labels = _label_names(raw, parts) if raw.labelled and numbered else ()
    inputs = raw.inputs or (Input("", size or ()),)
    digest = hashlib.sha256(
        repr((size, labels, raw.mean, raw.std, raw.augmentation, inputs, raw.fed.args, raw.fed.kwargs)).encode()
    )
    for part in PARTS:
        numbers = parts[part].labels
        digest.update(part.encode() + (b"" if numbers is None else numbers.numpy().tobytes()))
        for one in digests.get(part, ()):
            digest.update(one)
    for name, content in sorted(raw.files.items()):
        digest.update(name.encode() + content)
    if raw.sample_rate:
        digest.update(repr(raw.sample_rate).encode())
    if raw.names:
        digest.update(repr(raw.names).encode())
    wide = size[0] if size is not None else 1
    mean, std = ((values * wide if len(values) == 1 else values) for values in (raw.mean, raw.std))
    return Data(
        name=raw.name,
        train=parts["train"],
        calibration=parts["calibration"],
        test=parts["test"],
        inputs=inputs,
        fingerprint=digest.hexdigest(),
        labels=labels,
        mean=mean,
        std=std,
        augmentation=raw.augmentation,
        notes=(*raw.notes, *notes),
        labelled=raw.labelled,
        fed=raw.fed,
        image_size=size,
        lengths=raw.lengths,
        files=raw.files,
        names=raw.names,
        fit=raw.fit,
        sample_rate=raw.sample_rate,
    )


def _disjoint(raw: Raw) -> tuple[dict[Part, Split], dict[Part, list[bytes]], tuple[str, ...]]:
    """Leave out of training what is in calibration or test, and out of calibration what is in test."""
    parts, digests, notes = dict(raw.parts), dict(raw.digests), []
    if any(len(digests.get(part, ())) != len(parts[part]) for part in PARTS):
        return parts, digests, ()
    taken: set[bytes] = set()
    names: list[str] = []
    for part in reversed(PARTS):
        keep = [i for i, one in enumerate(digests[part]) if one not in taken]
        dropped = len(parts[part]) - len(keep)
        if dropped and not keep:
            raise DataError(
                f"{raw.name}: every {part} sample is also in {' or '.join(names)}.", "Give parts that differ."
            )
        if dropped:
            notes.append(f"{dropped} of the {part} samples also occur in {' or '.join(names)}; left out of {part}.")
            parts[part] = picked(parts[part], torch.tensor(keep))
            digests[part] = [digests[part][i] for i in keep]
        taken.update(digests[part])
        names.append(part)
    return parts, digests, tuple(notes)


def _label_names(raw: Raw, parts: Mapping[Part, Split]) -> tuple[str, ...]:
    """Name every class, having checked that labels are 0..classes-1 and that there is something to tell apart."""
    numbers = {part: _numbers(parts[part]) for part in PARTS}
    every = torch.cat([numbers[part] for part in PARTS])
    low, high = int(every.min()), int(every.max())
    if raw.labels is None and high >= len(parts["train"]):  # before as many names are made
        raise DataError(
            f"{raw.name} has the label {high}, and {len(parts['train'])} training samples are too few for classes 0 to "
            f"{high}.",
            "Number the classes from 0 without gaps, each with training samples.",
        )
    names = raw.labels or tuple(str(number) for number in range(high + 1))
    if low < 0 or high >= len(names):
        wrong = low if low < 0 else high
        raise DataError(
            f"{raw.name} has the label {wrong}, outside 0..{len(names) - 1}.",
            "Number the classes from 0, without gaps.",
        )
    counts = torch.bincount(numbers["train"], minlength=len(names))
    if int((counts > 0).sum()) < 2:
        raise DataError(f"{raw.name} has a single class in its training part.", "Give data of at least two classes.")
    absent = [names[i] for i in (counts == 0).nonzero().flatten().tolist()]
    if absent:
        raise DataError(
            f"{raw.name}: nothing to train on for {len(absent)} of {len(names)} classes: {', '.join(absent[:5])}.",
            "Number the classes from 0 without gaps, each with training samples.",
        )
    return names


def as_float(pixels: Tensor) -> Tensor:
    """Float32; bytes become 0..1."""
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()


def _numbers(split: Split) -> Tensor:
    assert split.labels is not None
    return split.labels


def stored(pixels: Tensor, labels: Tensor) -> Split:
    """A part of images that lies in memory, pixels (samples, channels, height, width)."""
    return image_split(labels, lambda chunks: (as_float(pixels[chunk]) for chunk in chunks))


def listed(samples: Dataset[tuple[Tensor, int]], labels: Tensor, workers: int) -> Split:
    """A part of images that is read sample by sample when needed."""

    def images(chunks: Sequence[list[int]]) -> Iterator[Tensor]:
        return (as_float(pixels) for pixels, _ in loaded(samples, chunks, workers))

    return image_split(labels, images)


def loaded(
    samples: Dataset[Any], chunks: Sequence[list[int]], workers: int, collate: Callable[[list[Any]], Any] | None = None
) -> Iterator[Any]:
    """The samples of each list of positions as one batch, read by `workers` processes where there is more than one."""
    loader = DataLoader(
        samples,
        batch_sampler=chunks,
        num_workers=workers if len(chunks) > 1 else 0,
        generator=torch.Generator().manual_seed(0),  # otherwise it draws from the global one
        collate_fn=collate,
    )
    try:
        yield from loader
    except DataError as error:  # of a worker, the message is its whole traceback, and its last line the error
        *above, last = error.message.strip().splitlines()
        if not above:
            raise
        raise DataError(last.partition(f"{DataError.__name__}: ")[2] or last) from error
    except RuntimeError as error:
        if "worker" not in str(error):
            raise
        raise DataError(
            f"A process that reads the data died: {first_line(error)}",
            "It may have run out of memory, or called sys.exit: try with num_workers=0.",
        ) from error


def cut_parts(
    given: dict[Part, Split], digests: dict[Part, list[bytes]], seed: int, name: str, test: int | None = None
) -> tuple[dict[Part, Split], dict[Part, list[bytes]]]:
    """Take the test and calibration parts that were not given out of the training part.

    With every class in its share; samples without labels (all of them `UNKNOWN`) are one class here.
    """
    parts, hashes = dict(given), dict(digests)
    wanted: list[tuple[Part, float]] = [("test", TEST_SHARE), ("calibration", CALIBRATION_SHARE)]
    for part, share in wanted:
        if part in parts:
            continue
        whole, known = parts["train"], hashes.get("train", [])
        if not len(whole):
            raise DataError(f"{name} is empty.", "Give a data set with samples in it.")
        numbers = torch.full((len(whole),), UNKNOWN) if whole.labels is None else whole.labels
        if set(numbers.tolist()) != {UNKNOWN} and len(set(numbers.tolist())) < 2:
            raise DataError(f"{name} has a single class.", "Give data of at least two classes.")
        count = test if part == "test" and test is not None else _share(numbers, share)
        rest, taken = _cut(numbers, count, seed, name)
        parts["train"], parts[part] = picked(whole, rest), picked(whole, taken)
        if len(known) == len(whole):
            hashes["train"], hashes[part] = [known[i] for i in rest], [known[i] for i in taken]
    return parts, hashes


def _cut(labels: Tensor, count: int, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """Positions of the rest and of `count` samples, both with every class in its share."""
    from sklearn.model_selection import train_test_split  # a second to import

    try:
        rest, taken = train_test_split(np.arange(len(labels)), test_size=count, stratify=labels, random_state=seed)
    except ValueError as error:
        raise DataError(
            f"{name} cannot be cut into parts: {error}", "Give more samples of each class, or the parts themselves."
        ) from error
    return torch.from_numpy(np.sort(rest)), torch.from_numpy(np.sort(taken))


def _share(labels: Tensor, share: float) -> int:
    """How many samples to set apart: that share, but one per class at least."""
    return max(round(len(labels) * share), len(set(labels.tolist())))


def hashes(pixels: Tensor) -> list[bytes]:
    """A digest of each sample, to find the same one in two parts."""
    return [hashlib.sha256(one.contiguous().numpy().tobytes()).digest() for one in pixels]


def check_finite(pixels: Tensor, name: str) -> None:
    """Raise DataError where a sample holds NaN or infinity."""
    if not pixels.is_floating_point():
        return
    step = at_once(pixels[:1].numel())
    bad = [
        start + place
        for start in range(0, len(pixels), step)
        for place in (~pixels[start : start + step].float().isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    ]
    if bad:
        raise DataError(
            f"{name} holds NaN or infinity in {len(bad)} samples (first: sample {bad[0]}).",
            "Correct or leave out those samples.",
        )
