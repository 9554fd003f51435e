"""Arrays of images, in memory or mapped from a file, with class numbers or without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foundation.errors import DataError
from foundation.files import storage_of
from pipeline.data.assemble import Raw, at_once, check_finite, cut_parts, hashes, stored
from pipeline.data.parts import PARTS, UNKNOWN, Part, Split, blocks


def from_arrays(given: Mapping[Part, tuple[Any, Any]], name: str, seed: int, labels: tuple[str, ...] | None) -> Raw:
    """Arrays of images, normalised by the training part's own mean and deviation; y is None where there are no labels.

    Raises DataError where some parts have labels and others none.
    """
    unlabelled = {y is None for _, y in given.values()}
    if len(unlabelled) > 1:
        raise DataError(f"{name}: some parts have labels and others none.", "Give labels for all parts, or for none.")
    read = {part: arrays(x, y, f"{name} ({part})" if len(given) > 1 else name) for part, (x, y) in given.items()}
    shapes = {tuple(pixels.shape[1:]) for pixels, _ in read.values()}
    if len(shapes) > 1:
        raise DataError(f"{name}: the parts have different shapes: {sorted(shapes)}.", "Give parts of one shape.")
    splits: dict[Part, Split] = {p: stored(*read[p]) for p in PARTS if p in read}
    digests: dict[Part, list[bytes]] = {p: hashes(read[p][0]) for p in PARTS if p in read}
    parts, digests = cut_parts(splits, digests, seed, name)
    channels, height, width = next(iter(shapes))
    mean, std = _moments(parts["train"], at_once(channels * height * width))
    size = (channels, height, width)
    return Raw(name, parts, digests, labels, size, mean, std, labelled=unlabelled == {False})


def _moments(split: Split, step: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel, read in blocks; a constant channel, which stays 0, has the deviation 1.

    `step`: samples that are read at once.
    """
    count = 0
    mean = squares = torch.zeros((), dtype=torch.float64)
    for (images,), _ in split.stream(blocks(range(len(split)), step)):
        flat = images.transpose(0, 1).flatten(1)
        spread, centre = (one.double() for one in torch.var_mean(flat, 1, correction=0))
        more, apart = flat.shape[1], centre - mean
        # Of two sets: Chan, Golub and LeVeque 1979, equation 2.1.
        squares = squares + spread * more + apart.square() * (count * more / (count + more))
        mean = mean + apart * (more / (count + more))
        count += more
    deviation = (squares / max(count - 1, 1)).sqrt().float()
    return tuple(mean.float().tolist()), tuple(value if value > 1e-9 else 1.0 for value in deviation.tolist())


def arrays(x: Any, y: Any, name: str) -> tuple[Tensor, Tensor]:
    """Images as (samples, channels, height, width) and labels as int64, checked; `UNKNOWN` where `y` is None."""
    images = pixels_of(x, f"{name}: x")
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[3] in (1, 3) and images.shape[1] not in (1, 3):
        images = images.permute(0, 3, 1, 2)  # colour last, as image files have it
    if images.ndim != 4:
        raise DataError(
            f"{name}: x has the shape {tuple(images.shape)}.",
            "Give (samples, height, width), (samples, channels, height, width) or (samples, height, width, channels).",
        )
    if len(images) == 0:
        raise DataError(f"{name} is empty.", "Give a data set with samples in it.")
    if not images.numel():
        raise DataError(f"{name}: x has the shape {tuple(images.shape)}: no pixel.", "Give images with pixels in them.")
    labels = torch.full((len(images),), UNKNOWN) if y is None else class_numbers(y, f"{name}: y")
    if len(labels) != len(images):
        raise DataError(
            f"{name}: {len(images)} images, but y has the shape {tuple(labels.shape)}.", "Give one label per image."
        )
    check_finite(images, name)
    return images, labels


def pixels_of(value: Any, what: str) -> Tensor:
    """A tensor or array of numbers as a plain tensor: uint8 and what lies in a file as it is, anything else float32.

    Raises DataError, beginning with `what`, where it holds no real numbers or not all of them (sparse, quantised).
    """
    if isinstance(value, Tensor):
        odd = "complex" if value.is_complex() else storage_of(value)
        if odd:
            raise DataError(f"{what} is a {odd} tensor, not plain numbers.", "Give uint8 or float images.")
        plain = value.detach().cpu().resolve_neg()
        return plain if plain.dtype == torch.uint8 else plain.float()
    array = np.asarray(value)
    if array.dtype.kind not in "iufb":
        raise DataError(f"{what} holds {array.dtype}, not numbers.", "Give uint8 or float images.")
    if isinstance(array, np.memmap) and array.dtype.isnative and array.dtype not in (np.uint16, np.uint32, np.uint64):
        return torch.from_numpy(array)  # it stays in its file; the samples that are read become float32
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
        return torch.from_numpy(np.ascontiguousarray(array if array.dtype == np.uint8 else array.astype(np.float32)))


def class_numbers(value: Any, what: str) -> Tensor:
    """Labels (samples,) or (samples, 1) as int64.

    Raises DataError, beginning with `what`, where one is no whole number of 64 bits; it is named.
    """
    if isinstance(value, Tensor):
        odd = "complex" if value.is_complex() else storage_of(value)
        if odd:
            raise DataError(f"{what} is a {odd} tensor, not class numbers.", "Give whole numbers from 0.")
        plain = value.detach().cpu().resolve_neg()
        labels = (plain.double() if plain.is_floating_point() else plain).numpy()
    else:
        labels = np.asarray(value)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise DataError(f"{what} has the shape {labels.shape}.", "Give one label per image.")
    if labels.dtype.kind not in "iuf":
        raise DataError(f"{what} holds {labels.dtype}, not class numbers.", "Give whole numbers from 0.")
    if labels.dtype.kind == "f":  # NaN compares unequal to itself, and infinity is beyond int64, too
        wrong = (labels != np.round(labels)) | (labels >= 2.0**63) | (labels < -(2.0**63))
    else:
        wrong = labels > np.iinfo(np.int64).max
    if bool(wrong.any()):
        first = int(wrong.argmax())
        raise DataError(
            f"{what} holds {labels[first]} for sample {first}: not class numbers.",
            "Give whole numbers from 0, or name the task: --set task.name=regression",
        )
    return torch.from_numpy(labels.astype(np.int64))
