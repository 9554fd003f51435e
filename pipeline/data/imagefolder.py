"""One folder of images per class, or images without labels; train/ and test/ or val/ above them if there are."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    Dataset,
)

from foundation.errors import DataError, first_line
from pipeline.data.assemble import Raw, cut_parts, listed
from pipeline.data.folders import classed_parts, digests_of, parts_of, readers
from pipeline.data.parts import Augmentation, Part, Split
from pipeline.data.samples import Reading
from pipeline.models.extras import need
from pipeline.models.source import Size

SCANNED = 50_000
"""Samples of a lazily read data set that are looked at before training; of larger ones, this many, evenly spaced."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of image folders, since published weights expect them (torchvision.models, "transforms")."""
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Whatever an image file is called. A bundle's serve.py reads the same."""
PIXELS = 89_478_485
"""Of an image, as it is and as it is resized: what pillow itself warns of. A bundle's serve.py has the same limit."""
logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs is said in the error, too


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Image files, opened when asked for: the shorter side resized, the middle cut out, bytes (channels, H, W)."""

    def __init__(self, files: list[tuple[str, int]], size: Size) -> None:
        from pipeline.models import torchvision_operators  # noqa: F401  # before torchvision itself

        # isort: split
        import torchvision

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
        if fitted[0] * fitted[1] > PIXELS:
            raise ValueError(f"it is too narrow, {image.width}×{image.height} pixels")
        return image.resize(fitted, Image.Resampling.BILINEAR)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        with opened(path) as image:
            return self.transform(eight_bits(image).convert("RGB" if self.size[0] == 3 else "L")), label


@contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """An image file, its pixels not yet read. Raises DataError for whatever is wrong with it, also inside the block."""
    try:
        if not Path(path).is_file():  # of a pipe, reading would wait for ever
            raise ValueError("it is no file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it is refused below
            opened = Image.open(path, formats=FORMATS)
        with opened as image:
            if image.width * image.height > PIXELS:
                raise ValueError(f"it has {image.width}×{image.height} pixels, more than {PIXELS}")
            yield image
    except Exception as error:  # a damaged or hostile file: pillow's readers raise a dozen classes
        reason = first_line(error).rstrip(".")
        raise DataError(f"{path} is not a readable image: {reason}.", "Replace or remove the file.") from error


def stretched(path: str, size: Size) -> tuple[Tensor, tuple[int, int]]:
    """An image file as bytes (channels, H, W), its sides brought to `size` each for itself; its own width and height.

    Raises DataError, naming the file, where it is no image.
    """
    channels, height, width = size
    with opened(path) as image:
        own = image.size
        fitted = (
            eight_bits(image)
            .convert("RGB" if channels == 3 else "L")
            .resize((width, height), Image.Resampling.BILINEAR)
        )
        pixels = np.array(fitted).reshape(height, width, -1).transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(pixels)), own


def eight_bits(image: Image.Image) -> Image.Image:
    """An image of 16 bits per pixel with 8 (pillow would clip it to white); any other as it is."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image


def from_folder(path: Path, size: Size, seed: int, reading: Reading) -> Raw:
    """A folder of images, read when asked for; raises DataError where it is none, or a file in it is no image."""
    name = f"imagefolder:{path}"
    if not path.is_dir():
        raise DataError(
            f"{path}: no such folder.",
            "Give imagefolder:PATH with one folder of images per class, or images without labels.",
        )
    mean, std = normalisation(name, size, reading.pixels)
    found = classed_parts(name, parts_of(path), _suffixes(), "images (.png, .jpg, …)", reading.ordered)
    names = found["train"].classes
    digests = digests_of([one.files for one in found.values()], "image")
    parts: dict[Part, Split] = {}
    for part, one in found.items():
        for file in one.files[:: max(1, len(one.files) // SCANNED)]:
            with opened(file) as image:
                image.verify()
        files = list(zip(one.files, one.labels, strict=True))
        parts[part] = listed(ImageFiles(files, size), torch.tensor(one.labels), readers(len(files)))
    cut, hashes = cut_parts(parts, dict(zip(found, digests, strict=True)), seed, name)
    return Raw(name, cut, hashes, names or None, size, mean, std, Augmentation(), labelled=bool(names))


def normalisation(
    name: str, size: Size, own: tuple[tuple[float, ...], tuple[float, ...]] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of image files: the model's `own`, else ImageNet's. Raises DataError for
    channels that they cannot have.
    """
    if size[0] not in (1, 3):
        raise DataError(f"{name}: images have 1 or 3 channels, not {size[0]}.", "Set data.input_size to 3 channels.")
    return (own or (IMAGENET_MEAN, IMAGENET_STD)) if size[0] == 3 else ((0.5,), (0.5,))


def _suffixes() -> tuple[str, ...]:
    need("torchvision")
    from pipeline.models import torchvision_operators  # noqa: F401  # before torchvision itself

    # isort: split
    import torchvision

    return tuple(torchvision.datasets.folder.IMG_EXTENSIONS)
