"""Arrays in memory and in .npz files: x and y, or x_train, y_train, x_test, y_test."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foundation.errors import DataError, first_line
from pipeline.data.assemble import Raw, check_finite, cut_parts, hashes, stored
from pipeline.data.parts import PARTS, Part, Split, blocks


def from_npz(path: Path, seed: int) -> Raw:
    """An .npz file, never unpickled; raises DataError where it holds no x and y."""
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
    return from_arrays(given, name, seed, names)


def from_arrays(given: Mapping[Part, tuple[Any, Any]], name: str, seed: int, labels: tuple[str, ...] | None) -> Raw:
    """Arrays in memory, normalised by the training part's own mean and deviation."""
    read = {part: arrays(x, y, f"{name} ({part})" if len(given) > 1 else name) for part, (x, y) in given.items()}
    shapes = {tuple(pixels.shape[1:]) for pixels, _ in read.values()}
    if len(shapes) > 1:
        raise DataError(f"{name}: the parts have different shapes: {sorted(shapes)}.", "Give parts of one shape.")
    splits: dict[Part, Split] = {p: stored(*read[p]) for p in PARTS if p in read}
    digests: dict[Part, list[bytes]] = {p: hashes(read[p][0]) for p in PARTS if p in read}
    parts, digests = cut_parts(splits, digests, seed, name)
    seen = torch.cat(list(parts["train"].stream(blocks(range(len(parts["train"])), 1024))))
    mean = tuple(seen.mean((0, 2, 3)).tolist())
    std = tuple(value or 1.0 for value in seen.std((0, 2, 3)).tolist())  # a constant channel stays 0
    channels, height, width = seen.shape[1:]
    return Raw(name, parts, labels, (channels, height, width), mean, std, digests)


def arrays(x: Any, y: Any, name: str) -> tuple[Tensor, Tensor]:
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
    check_finite(pixels, name)
    return pixels, torch.from_numpy(labels.astype(np.int64))
