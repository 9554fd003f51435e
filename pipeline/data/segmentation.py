"""Images and a mask of class numbers for each: images/ and masks/ with the same names; train/ and test/ above them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foundation.errors import DataError, nearest
from pipeline.data.assemble import Raw
from pipeline.data.folders import digests_of, parts_of, readers
from pipeline.data.imagefolder import normalisation, opened, stretched
from pipeline.data.objects import from_samples
from pipeline.data.parts import IGNORED, Part
from pipeline.data.prepared import Prepared
from pipeline.data.samples import Reading
from pipeline.models.source import Size

SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"))
UNNUMBERED = 255
"""In a mask: a place without a class, by the custom of such data sets; it becomes `IGNORED`."""
NAMES = "classes.txt"
CLASSES = 255


def from_segmentation(path: Path, size: Size, seed: int, reading: Reading) -> Raw:
    """Images stretched to `size`, masks with them. Raises DataError for an image without a mask, a mask of another size
    than its image, or one that holds no class numbers.
    """
    name = f"segmentation:{path}"
    mean, std = normalisation(name, size, reading.pixels)
    parts = parts_of(path)
    pairs = {part: _pairs(folder) for part, folder in parts.items()}
    named = _class_names(path)
    digests = digests_of([[file for pair in some for file in pair] for some in pairs.values()], "image")
    given: dict[Part, Masked] = {
        part: Masked(some, [a + b for a, b in zip(hashed[::2], hashed[1::2], strict=True)], size, len(named) or CLASSES)
        for (part, some), hashed in zip(pairs.items(), digests, strict=True)
    }
    raw = from_samples(given, name, seed, reading)
    highest = max(one.highest for one in given.values())
    names = named or tuple(map(str, range(highest + 1)))
    if len(names) < 2:
        raise DataError(
            f"{name} has a single class, {highest}.", "Give masks of at least two classes, numbered from 0."
        )
    for one in given.values():
        one.limit = len(names)
    return replace(raw, mean=mean, std=std, names=names, fit="stretch")


def _class_names(path: Path) -> tuple[str, ...]:
    file = path / NAMES
    if not file.is_file():
        return ()
    try:
        names = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}", "Give one name per line, in UTF-8.") from error
    if not 2 <= len(names) <= CLASSES or len(set(names)) != len(names):
        raise DataError(f"{file} holds {len(names)} names.", f"Give each of 2 to {CLASSES} classes a name of its own.")
    return names


def _pairs(folder: Path) -> list[tuple[str, str]]:
    """Image and mask of each sample, in the order of their names."""
    for needed in ("images", "masks"):
        if not (folder / needed).is_dir():
            raise DataError(
                f"{folder} has no folder {needed}.", "Give segmentation:PATH with images/ and masks/ of the same names."
            )
    images, masks = (_by_stem(folder / each) for each in ("images", "masks"))
    if not images:
        raise DataError(f"{folder / 'images'} is empty.", "Put images (.png, .jpg, …) there.")
    for one, others, what in ((images, masks, "mask"), (masks, images, "image")):
        alone = next((stem for stem in one if stem not in others), None)
        if alone is not None:
            raise DataError(
                f"{one[alone]} has no {what}.",
                nearest(alone, others) or f"Give a {what} of the same name, or leave it out.",
            )
    return [(images[stem], masks[stem]) for stem in sorted(images)]


def _by_stem(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda one: one.name):
            stem, suffix = os.path.splitext(entry.name)  # noqa: PTH122  # there may be a million
            if suffix.lower() not in SUFFIXES:
                continue
            if stem in found:
                raise DataError(f"{found[stem]} and {entry.name} have the same name.", "Leave one of them out.")
            found[stem] = entry.path
    return found


class Masked(Prepared):
    """Pairs of image and mask: bytes (channels, H, W), and class numbers (H, W) int64."""

    scanned = 2_000

    def __init__(self, pairs: list[tuple[str, str]], digests: list[bytes], size: Size, limit: int) -> None:
        self.pairs, self.digests, self.size, self.limit = pairs, digests, size, limit
        self.highest = 0
        """Class number that a mask has held."""
        self.workers = readers(len(pairs))

    def place(self, index: int) -> str:
        """The image's file."""
        return self.pairs[index][0]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.pairs[index]
        pixels, whole = stretched(image, self.size)
        return pixels, self._mask(mask, whole, image)

    def _mask(self, file: str, whole: tuple[int, int], image: str) -> Tensor:
        with opened(file) as found:
            size, mode = found.size, found.mode
            if mode not in ("1", "L", "P", "I", "I;16"):
                raise DataError(
                    f"{file} is a mask of colours ({mode}), not of class numbers.",
                    "Save one number per pixel, from 0 (a grey or palette PNG).",
                )
            if size != whole:
                raise DataError(
                    f"{file} has {size[0]}×{size[1]} pixels, and {image} has {whole[0]}×{whole[1]}.",
                    "Give each image a mask of its own size.",
                )
            numbers = np.asarray(found).astype(np.int64)
        numbers[numbers == UNNUMBERED] = IGNORED
        highest = int(numbers.max())
        if highest >= self.limit:
            raise DataError(
                f"{file} holds the class {highest}, outside 0..{self.limit - 1}.",
                f"Number classes from 0 ({UNNUMBERED}: none), and name all of them in {NAMES}, a line each.",
            )
        self.highest = max(self.highest, highest)
        _, height, width = self.size
        exact = Image.fromarray(numbers.astype(np.int32)).resize((width, height), Image.Resampling.NEAREST)
        return torch.from_numpy(np.array(exact).astype(np.int64))
