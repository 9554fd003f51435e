"""Data sets by name, by file or as objects: three parts that never overlap, checked once, normalised, reproducible.

digits                     scikit-learn's handwritten digits, part of its package: 1,797 images of 8x8 pixels
imagefolder:PATH           one folder of images per class; train/ and test/ or val/ above them if there are
npz:PATH                   arrays x and y, or x_train, y_train, x_test, y_test
path/to/file.py:callable   own code that returns data sets or loaders; the same can be given as objects
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
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

from foundation.errors import first_line
from pipeline.errors import DataError, nearest
from pipeline.models.from_code import load_callable, user_code
from pipeline.models.source import DEFAULT_SIZE, Size, accepted
from pipeline.models.torchvision_import import torchvision
from pipeline.seeding import seeded

Part = Literal["train", "calibration", "test"]
PARTS: tuple[Part, ...] = ("train", "calibration", "test")

KINDS = ("imagefolder", "npz")
"""Words that stand before a path."""

DIGITS_SIZE: Size = (3, 32, 32)
DIGITS_TEST = 360
"""Test images of `digits`; with a split of its own seed, so that no run ever trains on another run's test images."""

TEST_SHARE = 0.2
"""Of a data set that comes in one piece."""
CALIBRATION_SHARE = 0.1
"""Of the training part; chooses the best epoch and calibrates, so it must not be the test part."""

SCANNED = 50_000
"""Samples of a lazily read data set that are looked at before training; of larger ones, this many, evenly spaced."""
HASHED_BYTES = 2 << 30
"""Up to this size an image folder is fingerprinted by content, above it by names, sizes and times of change."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of image folders, since published weights expect them (torchvision.models, "transforms")."""


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


@dataclass(frozen=True)
class Split:
    """One part: its labels, and how to read its images."""

    labels: Tensor
    """Class numbers, int64, one per sample."""
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
    """Name of each class."""
    input_size: Size
    """Channels, height, width of what `batches` gives."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Per channel: batches are (image - mean) / std."""
    fingerprint: str
    augmentation: Augmentation | None = None
    notes: tuple[str, ...] = ()
    """What the user should know, such as duplicates that were left out."""

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.labels)

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
        chunks = _blocks(order.tolist(), batch_size)
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
        one = replace(self, test=_picked(split, chosen))
        return next(one.batches("test", count))[0]


def load(spec: object, *, input_size: Size | None = None, seed: int = 0) -> Data:
    """Find a data set, check it, and cut it into train, calibration and test.

    `input_size` (channels, height, width): images are resized to it; None keeps the data's own. `seed` decides the cut
    where the data has none of its own (`digits` is always cut the same). Raises DataError if there is no such data set,
    or it is empty, has a single class, holds NaN, has labels outside 0..classes-1, or samples of unequal shape.
    """
    if isinstance(spec, Data):
        return spec
    if not isinstance(spec, str):
        return _finish(_from_objects(spec, f"object:{type(spec).__name__}", seed), input_size)
    kind, colon, rest = spec.partition(":")
    if spec == "digits":
        return _finish(_digits(), input_size or DIGITS_SIZE)
    if kind == "imagefolder" and colon:
        return _finish(_from_folder(Path(rest).expanduser(), input_size or DEFAULT_SIZE, seed), input_size)
    if kind == "npz" and colon:
        return _finish(_from_npz(Path(rest).expanduser(), seed), input_size)
    if colon and not _misspelt(kind):
        call, _ = load_callable(spec, DataError)
        with user_code(spec, DataError), seeded(seed):
            content = call(**accepted(call, input_size=input_size, seed=seed))
        return _finish(_from_objects(content, spec, seed), input_size)
    raise DataError(
        f"There is no data set {spec!r}.",
        nearest(kind, ("digits", *KINDS)) or "Give digits, imagefolder:PATH, npz:PATH or file.py:callable.",
    )


def _misspelt(kind: str) -> bool:
    """Whether what stands before the colon is no module, but close to a kind of data set."""
    return kind.isidentifier() and bool(nearest(kind, KINDS)) and importlib.util.find_spec(kind) is None


@dataclass(frozen=True)
class _Raw:
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


def _finish(raw: _Raw, input_size: Size | None) -> Data:
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
    labels = _label_names(raw, parts)
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
    )


def _disjoint(raw: _Raw) -> tuple[dict[Part, Split], dict[Part, list[bytes]], tuple[str, ...]]:
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
            parts[part] = _picked(parts[part], torch.tensor(keep))
            digests[part] = [digests[part][i] for i in keep]
        taken.update(digests[part])
        names.append(part)
    return parts, digests, tuple(notes)


def _label_names(raw: _Raw, parts: Mapping[Part, Split]) -> tuple[str, ...]:
    """Name every class, having checked that labels are 0..classes-1 and that there is something to tell apart."""
    every = torch.cat([parts[part].labels for part in PARTS])
    low, high = int(every.min()), int(every.max())
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


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _fit(images: Tensor, size: Size) -> Tensor:
    """Bilinear resize to `size`; one channel is repeated if more are wanted."""
    channels, height, width = size
    if tuple(images.shape[2:]) != (height, width):
        images = F.interpolate(images, (height, width), mode="bilinear", align_corners=False, antialias=True)
    return images.expand(-1, channels, -1, -1) if images.shape[1] != channels else images


def _as_float(pixels: Tensor) -> Tensor:
    """Float32; bytes become 0..1."""
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()


def _stored(pixels: Tensor, labels: Tensor) -> Split:
    """A part that lies in memory, pixels (samples, channels, height, width)."""
    return Split(labels, lambda chunks: (_as_float(pixels[chunk]) for chunk in chunks))


def _listed(samples: Dataset[tuple[Tensor, int]], labels: Tensor, workers: int) -> Split:
    """A part that is read sample by sample when needed."""

    def stream(chunks: Sequence[list[int]]) -> Iterator[Tensor]:
        loader = DataLoader(
            samples,
            batch_sampler=chunks,
            num_workers=workers if len(chunks) > 1 else 0,
            generator=torch.Generator().manual_seed(0),  # otherwise it draws from the global one
        )
        for images, _ in loader:
            yield _as_float(images)

    return Split(labels, stream)


def _picked(split: Split, chosen: Tensor) -> Split:
    """The samples of `split` at the positions `chosen`."""

    def stream(chunks: Sequence[list[int]]) -> Iterator[Tensor]:
        return split.stream([chosen[chunk].tolist() for chunk in chunks])

    return Split(split.labels[chosen], stream)


def _cut(labels: Tensor, count: int, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """Positions of the rest and of `count` samples, both with every class in its share."""
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


def _cut_parts(
    given: dict[Part, Split], digests: dict[Part, list[bytes]], seed: int, name: str, test: int | None = None
) -> tuple[dict[Part, Split], dict[Part, list[bytes]]]:
    """Take the test and calibration parts that were not given out of the training part."""
    parts, hashes = dict(given), dict(digests)
    wanted: list[tuple[Part, float]] = [("test", TEST_SHARE), ("calibration", CALIBRATION_SHARE)]
    for part, share in wanted:
        if part in parts:
            continue
        whole, known = parts["train"], hashes.get("train", [])
        if not len(whole):
            raise DataError(f"{name} is empty.", "Give a data set with samples in it.")
        if len(set(whole.labels.tolist())) < 2:
            raise DataError(f"{name} has a single class.", "Give data of at least two classes.")
        count = test if part == "test" and test is not None else _share(whole.labels, share)
        rest, taken = _cut(whole.labels, count, seed, name)
        parts["train"], parts[part] = _picked(whole, rest), _picked(whole, taken)
        if len(known) == len(whole):
            hashes["train"], hashes[part] = [known[i] for i in rest], [known[i] for i in taken]
    return parts, hashes


def _hashes(pixels: Tensor) -> list[bytes]:
    return [hashlib.sha256(one.numpy().tobytes()).digest() for one in pixels.contiguous()]


def _check_finite(pixels: Tensor, name: str) -> None:
    if pixels.is_floating_point() and not bool(pixels.isfinite().all()):
        bad = int((~pixels.isfinite()).flatten(1).any(1).sum())
        raise DataError(f"{name} holds NaN or infinity in {bad} samples.", "Correct or leave out those samples.")


# ── the kinds ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _digits() -> _Raw:
    content = load_digits()
    pixels = torch.from_numpy(content.images).float()[:, None] / 16  # ink from 0 to 16
    labels = torch.from_numpy(content.target).long()
    given: dict[Part, Split] = {"train": _stored(pixels, labels)}
    parts, digests = _cut_parts(given, {"train": _hashes(pixels)}, 0, "digits", DIGITS_TEST)
    seen = next(parts["train"].stream([list(range(len(parts["train"])))]))
    names = tuple(str(name) for name in content.target_names)
    return _Raw(
        "digits",
        parts,
        names,
        (1, 8, 8),
        (float(seen.mean()),),
        (float(seen.std()),),
        digests,
        Augmentation(padding="zeros"),  # paper is 0
    )


def _from_npz(path: Path, seed: int) -> _Raw:
    name = f"npz:{path}"
    if not path.is_file():
        raise DataError(f"{path}: no such file.", "Give npz:PATH of a file with arrays x and y.")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError, EOFError) as error:
        raise DataError(
            f"{path} cannot be read: {first_line(error)}", "Save numeric arrays x and y with numpy.savez."
        ) from error
    names = tuple(str(one) for one in arrays["labels"]) if "labels" in arrays else None
    named: tuple[tuple[Part, str], ...] = (("train", ""), *((part, f"_{part}") for part in PARTS))
    given: dict[Part, tuple[Any, Any]] = {
        part: (arrays[f"x{suffix}"], arrays[f"y{suffix}"])
        for part, suffix in named
        if f"x{suffix}" in arrays and f"y{suffix}" in arrays
    }
    if "train" not in given:
        raise DataError(
            f"{path} holds {', '.join(arrays) or 'nothing'}, but not x and y.", "Name the arrays x and y, or x_train, …"
        )
    return _from_arrays(given, name, seed, names)


def _from_arrays(given: Mapping[Part, tuple[Any, Any]], name: str, seed: int, labels: tuple[str, ...] | None) -> _Raw:
    """Arrays in memory, normalised by the training part's own mean and deviation."""
    stored = {part: _arrays(x, y, f"{name} ({part})" if len(given) > 1 else name) for part, (x, y) in given.items()}
    shapes = {tuple(pixels.shape[1:]) for pixels, _ in stored.values()}
    if len(shapes) > 1:
        raise DataError(f"{name}: the parts have different shapes: {sorted(shapes)}.", "Give parts of one shape.")
    splits: dict[Part, Split] = {p: _stored(*stored[p]) for p in PARTS if p in stored}
    digests: dict[Part, list[bytes]] = {p: _hashes(stored[p][0]) for p in PARTS if p in stored}
    parts, digests = _cut_parts(splits, digests, seed, name)
    seen = torch.cat(list(parts["train"].stream(_blocks(range(len(parts["train"])), 1024))))
    mean = tuple(seen.mean((0, 2, 3)).tolist())
    std = tuple(value or 1.0 for value in seen.std((0, 2, 3)).tolist())  # a constant channel stays 0
    channels, height, width = seen.shape[1:]
    return _Raw(name, parts, labels, (channels, height, width), mean, std, digests)


def _arrays(x: Any, y: Any, name: str) -> tuple[Tensor, Tensor]:
    """Images as (samples, channels, height, width) and labels as int64, checked."""
    images, labels = (value.numpy() if isinstance(value, Tensor) else np.asarray(value) for value in (x, y))
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if images.dtype.kind not in "iufb":
        raise DataError(f"{name}: x holds {images.dtype}, not numbers.", "Give uint8 or float images.")
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[3] in (1, 3) and images.shape[1] not in (1, 3):
        images = images.transpose(0, 3, 1, 2)  # colour last, as image files have it
    if images.ndim != 4:
        raise DataError(
            f"{name}: x has the shape {images.shape}.",
            "Give (samples, height, width), (samples, channels, height, width) or (samples, height, width, channels).",
        )
    if len(images) == 0:
        raise DataError(f"{name} is empty.", "Give a data set with samples in it.")
    if labels.shape != (len(images),):
        raise DataError(
            f"{name}: {len(images)} images, but y has the shape {labels.shape}.", "Give one label per image."
        )
    if labels.dtype.kind not in "iuf" or bool((labels != np.round(labels)).any()):
        raise DataError(f"{name}: y holds {labels.dtype}, not class numbers.", "Give whole numbers from 0.")
    pixels = torch.from_numpy(np.ascontiguousarray(images if images.dtype == np.uint8 else images.astype(np.float32)))
    _check_finite(pixels, name)
    return pixels, torch.from_numpy(labels.astype(np.int64))


def _blocks(positions: Sequence[int], size: int) -> list[list[int]]:
    """Cut positions into lists of `size`, the last one shorter."""
    return [list(positions[start : start + size]) for start in range(0, len(positions), size)]


class _ImageFiles(Dataset[tuple[Tensor, int]]):
    """Image files, opened when asked for: the shorter side resized, the middle cut out, bytes (channels, H, W)."""

    def __init__(self, files: list[tuple[str, int]], size: Size) -> None:
        self.files, self.size = files, size
        _, height, width = size
        self.transform = torchvision.transforms.Compose(
            [
                torchvision.transforms.Lambda(self._cover),
                torchvision.transforms.CenterCrop((height, width)),
                torchvision.transforms.PILToTensor(),
            ]
        )

    def _cover(self, image: Image.Image) -> Image.Image:
        _, height, width = self.size
        factor = max(height / image.height, width / image.width)
        fitted = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
        return image.resize(fitted, Image.Resampling.BILINEAR)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        try:
            with Image.open(path) as image:
                return self.transform(image.convert("RGB" if self.size[0] == 3 else "L")), label
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"{path} is not a readable image: {error}.", "Replace or remove the file.") from error


def _from_folder(path: Path, size: Size, seed: int) -> _Raw:
    name = f"imagefolder:{path}"
    if not path.is_dir():
        raise DataError(f"{path}: no such folder.", "Give imagefolder:PATH with one folder of images per class.")
    if size[0] not in (1, 3):
        raise DataError(f"{name}: images have 1 or 3 channels, not {size[0]}.", "Set data.input_size to 3 channels.")
    folders: dict[Part, Path] = {"train": path}
    if (path / "train").is_dir():
        held = [path / key for key in ("test", "val", "valid", "validation") if (path / key).is_dir()]
        folders = {"train": path / "train"}
        if held:
            folders["test"] = held[0]
        if len(held) > 1:
            folders["calibration"] = held[1]
    found = {part: _image_files(folder) for part, folder in folders.items()}
    names = found["train"][0]
    numbers = {one: number for number, one in enumerate(names)}
    parts: dict[Part, Split] = {}
    digests: dict[Part, list[bytes]] = {}
    whole = sum(os.path.getsize(file) for _, files in found.values() for file, _ in files)  # noqa: PTH202
    for part, (classes, files) in found.items():
        if not set(classes) <= set(names):
            unknown = sorted(set(classes) - set(names))
            raise DataError(
                f"{folders[part]} has classes that {folders['train']} has not: {', '.join(unknown[:5])}.",
                "Give every part the same class folders.",
            )
        renumbered = [(file, numbers[classes[label]]) for file, label in files]
        labels = torch.tensor([label for _, label in renumbered])
        workers = (
            min(4, (os.cpu_count() or 1) - 1) if len(files) >= 2000 else 0
        )  # fewer are read sooner than shared out
        parts[part] = _listed(_ImageFiles(renumbered, size), labels, workers)
        digests[part] = [_file_digest(Path(file), whole <= HASHED_BYTES) for file, _ in renumbered]
    cut, hashes = _cut_parts(parts, digests, seed, name)
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if size[0] == 3 else ((0.5,), (0.5,))
    return _Raw(name, cut, names, size, mean, std, hashes, Augmentation())


def _image_files(folder: Path) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """Class names and (file, class number) of a folder, every file opened as far as its header."""
    try:
        found = torchvision.datasets.ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise DataError(
            f"{folder}: {error}", "Put each class's images (.png, .jpg, …) into a folder of its own."
        ) from error
    files: list[tuple[str, int]] = found.samples
    for file, _ in files[:: max(1, len(files) // SCANNED)]:
        try:
            with Image.open(file) as image:
                image.verify()
        except (OSError, UnidentifiedImageError, SyntaxError) as error:  # SyntaxError: a broken PNG
            raise DataError(f"{file} is not a readable image.", "Replace or remove the file.") from error
    return tuple(found.classes), files


def _file_digest(path: Path, by_content: bool) -> bytes:
    if by_content:
        return hashlib.sha256(path.read_bytes()).digest()
    status = path.stat()
    return hashlib.sha256(f"{path} {status.st_size} {status.st_mtime_ns}".encode()).digest()


# ── objects ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_SYNONYMS: dict[str, Part] = {
    "train": "train",
    "training": "train",
    "test": "test",
    "val": "calibration",
    "valid": "calibration",
    "validation": "calibration",
    "calibration": "calibration",
}


def _from_objects(content: Any, name: str, seed: int) -> _Raw:
    """Data sets, loaders or arrays: one, a mapping of parts, or (train, test[, calibration])."""
    given = _named_parts(content, name)
    if all(_is_arrays(value) for value in given.values()):
        return _from_arrays(given, name, seed, None)
    parts: dict[Part, Split] = {}
    digests: dict[Part, list[bytes]] = {}
    shapes: set[tuple[int, ...]] = set()
    names: tuple[str, ...] | None = None
    for part in PARTS:
        if part not in given:
            continue
        value = given[part]
        if _is_arrays(value):
            value = TensorDataset(*_arrays(value[0], value[1], f"{name} ({part})"))
        samples, workers = _samples(value, f"{name} ({part})")
        labels, digests[part], shape = _scan(samples, f"{name} ({part})", seed)
        parts[part] = _listed(samples, labels, workers)
        shapes.add(shape)
        classes = getattr(samples.source, "classes", None)
        if names is None and isinstance(classes, Sequence) and not isinstance(classes, str):
            names = tuple(str(one) for one in classes)
    if len(shapes) > 1:
        raise DataError(f"{name}: the parts have different shapes: {sorted(shapes)}.", "Give parts of one shape.")
    cut, hashes = _cut_parts(parts, digests, seed, name)
    channels, height, width = shapes.pop()
    # What own code returns is what the model gets: its transforms have normalised already.
    return _Raw(name, cut, names, (channels, height, width), (0.0,) * channels, (1.0,) * channels, hashes)


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
        except (TypeError, ValueError) as error:
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
            _check_finite(image[None], f"{name}, sample {position}")
            digests.append(hashlib.sha256(image.contiguous().numpy().tobytes()).digest())
            labels.append(label)
    if known is None:
        return torch.tensor(labels), digests, shape
    return torch.as_tensor(known).long()[list(samples.indices)], digests, shape
