"""From what a source read to a `Data`: parts cut, compared and checked, labels named, all of it fingerprinted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
)

from foundation.errors import DataError
from pipeline.data.parts import PARTS, UNKNOWN, Augmentation, Data, Part, Split, picked
from pipeline.models.source import Size

TEST_SHARE = 0.2
"""Of a data set that comes in one piece."""
CALIBRATION_SHARE = 0.1
"""Of the training part; chooses the best epoch and calibrates, so it must not be the test part."""


@dataclass(frozen=True)
class Raw:
    """A data set as read, before the parts are compared and normalised."""

    name: str
    parts: dict[Part, Split]
    labels: tuple[str, ...] | None
    size: Size
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digests: dict[Part, list[bytes]]
    """A hash per sample, to find the same sample in two parts; empty where the data is too large to be read first."""
    augmentation: Augmentation | None = None
    labelled: bool = True
    """False: every label is `UNKNOWN`."""


def finish(raw: Raw, input_size: Size | None) -> Data:
    """Check labels, take duplicates out, fingerprint."""
    size = input_size or raw.size
    if size[0] != raw.size[0] and raw.size[0] != 1:
        raise DataError(
            f"{raw.name} has images of {raw.size[0]} channels, which cannot become {size[0]}.",
            f"Set data.input_size to {raw.size[0]} channels.",
        )
    parts, digests, notes = _disjoint(raw)
    for part in PARTS:
        if not len(parts[part]):
            raise DataError(f"{raw.name}: the {part} part is empty.", "Give more data; the parts never share a sample.")
    labels = _label_names(raw, parts) if raw.labelled else ()
    digest = hashlib.sha256(repr((size, labels, raw.mean, raw.std, raw.augmentation)).encode())
    for part in PARTS:
        digest.update(part.encode() + parts[part].labels.numpy().tobytes())
        for one in digests.get(part, ()):
            digest.update(one)
    mean, std = ((values * size[0] if len(values) == 1 else values) for values in (raw.mean, raw.std))
    return Data(
        raw.name,
        parts["train"],
        parts["calibration"],
        parts["test"],
        labels,
        size,
        mean,
        std,
        digest.hexdigest(),
        raw.augmentation,
        notes,
        raw.labelled,
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
    every = torch.cat([parts[part].labels for part in PARTS])
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
    counts = torch.bincount(parts["train"].labels, minlength=len(names))
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


def stored(pixels: Tensor, labels: Tensor) -> Split:
    """A part that lies in memory, pixels (samples, channels, height, width)."""
    return Split(labels, lambda chunks: (as_float(pixels[chunk]) for chunk in chunks))


def listed(samples: Dataset[tuple[Tensor, int]], labels: Tensor, workers: int) -> Split:
    """A part that is read sample by sample when needed."""

    def stream(chunks: Sequence[list[int]]) -> Iterator[Tensor]:
        loader = DataLoader(
            samples,
            batch_sampler=chunks,
            num_workers=workers if len(chunks) > 1 else 0,
            generator=torch.Generator().manual_seed(0),  # otherwise it draws from the global one
        )
        try:
            for images, _ in loader:
                yield as_float(images)
        except DataError as error:  # of a worker, the message is its whole traceback, and its last line the error
            *above, last = error.message.strip().splitlines()
            if not above:
                raise
            raise DataError(last.partition(f"{DataError.__name__}: ")[2] or last) from error

    return Split(labels, stream)


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
        if set(whole.labels.tolist()) != {UNKNOWN} and len(set(whole.labels.tolist())) < 2:
            raise DataError(f"{name} has a single class.", "Give data of at least two classes.")
        count = test if part == "test" and test is not None else _share(whole.labels, share)
        rest, taken = _cut(whole.labels, count, seed, name)
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
    return [hashlib.sha256(one.numpy().tobytes()).digest() for one in pixels.contiguous()]


def check_finite(pixels: Tensor, name: str) -> None:
    """Raise DataError where a sample holds NaN or infinity."""
    if pixels.is_floating_point() and not bool(pixels.isfinite().all()):
        bad = (~pixels.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        raise DataError(
            f"{name} holds NaN or infinity in {len(bad)} samples (first: sample {bad[0]}).",
            "Correct or leave out those samples.",
        )
