"""Arrays in memory and in .npz files: x and y, or x_train, y_train, x_test, y_test; without any y, unlabelled."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Container, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib.format import (
    MAGIC_PREFIX,
    read_array,
    read_array_header_1_0,
    read_array_header_2_0,
    read_magic,
)
from torch import Tensor

from foundation.errors import DataError, first_line
from foundation.files import storage_of
from pipeline.data.assemble import Raw, check_finite, cut_parts, hashes, stored
from pipeline.data.parts import PARTS, UNKNOWN, Part, Split, blocks


def from_npz(path: Path, seed: int) -> Raw:
    """An .npz file, never unpickled; raises DataError where it holds no x, or y for some parts alone."""
    name = f"npz:{path}"
    if not path.is_file():
        raise DataError(f"{path}: no such file.", "Give npz:PATH of a file with arrays x and y.")
    named: tuple[tuple[Part, str], ...] = (("train", ""), *((part, f"_{part}") for part in PARTS))
    wanted = {"labels", *(f"{letter}{suffix}" for _, suffix in named for letter in "xy")}
    arrays, others = _members(path, wanted)
    names: tuple[str, ...] | None = None
    if "labels" in arrays:
        if arrays["labels"].ndim != 1:
            raise DataError(
                f"{name}: labels has the shape {arrays['labels'].shape}.", "Give one name per class, or leave it out."
            )
        names = tuple(str(one) for one in arrays["labels"])
    labelled = any(name.startswith("y") for name in (*arrays, *others))
    if not labelled and names is not None:
        raise DataError(f"{path} names classes, but holds no y.", "Add y, or leave labels out.")
    for _, suffix in named if labelled else ():
        pair = (f"x{suffix}", f"y{suffix}")
        for one, other in (pair, pair[::-1]):
            if one in arrays and other not in arrays:
                raise DataError(
                    f"{path} holds {', '.join((*arrays, *others))}, but not {other}.", "Give images and their labels."
                )
    given: dict[Part, tuple[Any, Any]] = {
        part: (arrays[f"x{suffix}"], arrays.get(f"y{suffix}")) for part, suffix in named if f"x{suffix}" in arrays
    }
    if "train" not in given:
        raise DataError(
            f"{path} holds {', '.join(others) or 'nothing'}, but not x and y.", "Name the arrays x and y, or x_train, …"
        )
    return from_arrays(given, name, seed, names)


def from_arrays(given: Mapping[Part, tuple[Any, Any]], name: str, seed: int, labels: tuple[str, ...] | None) -> Raw:
    """Arrays in memory, normalised by the training part's own mean and deviation; y is None where there are no labels.

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
    seen = torch.cat([x for (x,), _ in parts["train"].stream(blocks(range(len(parts["train"])), 1024))])
    mean = tuple(seen.mean((0, 2, 3)).tolist())
    std = tuple(value or 1.0 for value in seen.std((0, 2, 3)).tolist())  # a constant channel stays 0
    channels, height, width = seen.shape[1:]
    size = (channels, height, width)
    return Raw(name, parts, digests, labels, size, mean, std, labelled=unlabelled == {False})


def _members(path: Path, wanted: Container[str]) -> tuple[dict[str, np.ndarray[Any, Any]], list[str]]:
    """The arrays of an .npz file that are wanted, and the names of the others.

    An array is read only once its header claims no more than the archive holds, and that fits into memory.
    """
    hint = "Save numeric arrays x and y with numpy.savez."
    found: dict[str, np.ndarray[Any, Any]] = {}
    others: list[str] = []
    name = ""
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC_PREFIX)) == MAGIC_PREFIX:
                raise DataError(f"{path} is one array, not an archive of several.", hint)
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if name not in wanted:
                    others.append(name)
                    continue
                with archive.open(member) as stream:
                    _check_header(stream, member.file_size, f"{path}: {name}")
                with archive.open(member) as stream:
                    found[name] = read_array(stream, allow_pickle=False)
    except DataError:
        raise
    except Exception as error:  # zipfile, its decompressors and numpy's parser raise anything, given any bytes
        what = f"{path}: {name}" if name else str(path)
        raise DataError(f"{what} cannot be read: {first_line(error)}", hint) from error
    return found, others


def _check_header(stream: IO[bytes], size: int, name: str) -> None:
    """Raise DataError unless the array at the start of `stream`, `size` bytes long, has numbers, all of them there."""
    version = read_magic(stream)
    read = {(1, 0): read_array_header_1_0, (2, 0): read_array_header_2_0}.get(version)
    if read is None:  # 3.0 is written for arrays with named fields alone
        raise DataError(f"{name} is no array of numbers.", "Give uint8 or float images, and whole numbers as labels.")
    shape, _, dtype = read(stream)
    if dtype.hasobject:
        raise DataError(f"{name} cannot be read: it holds Python objects.", "Give arrays of numbers.")
    needed = math.prod(shape) * dtype.itemsize
    if any(length < 0 for length in shape) or needed > size:
        raise DataError(f"{name} claims the shape {shape}, which the file does not hold.", "Save the array again.")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise DataError(
            f"{name} takes {needed / 1e9:.1f} GB, and this machine has {memory / 1e9:.1f} GB of memory.",
            "Give a folder of images, or a data set that reads sample by sample.",
        )


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
    return images.contiguous(), labels


def pixels_of(value: Any, what: str) -> Tensor:
    """A tensor or array of numbers as a plain tensor: uint8 as it is, anything else float32.

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
