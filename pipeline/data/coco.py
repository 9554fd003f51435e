"""Images with boxes, as COCO notes them: images/ and annotations.json; train/ and test/ of these above them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from foundation.errors import DataError, brief, first_line
from pipeline.data.assemble import Raw
from pipeline.data.folders import digests_of, parts_of, readers
from pipeline.data.imagefolder import normalisation, stretched
from pipeline.data.objects import from_samples
from pipeline.data.parts import Part
from pipeline.data.prepared import Prepared
from pipeline.data.samples import Reading
from pipeline.models.source import Size

FILE = "annotations.json"
LARGEST = 1e9
"""Pixels: no box has numbers beyond."""
OVERHANG = 2.0
"""Pixels that a box may stick out of its image, from rounding; it is cut off."""

Box = tuple[float, float, float, float, int]
"""Left, top, right, bottom in pixels of the file, and the class from 0."""


def from_coco(path: Path, size: Size, seed: int, reading: Reading) -> Raw:
    """Images stretched to `size`, boxes with them. Raises DataError, with the annotation's number, for one whose image,
    class or box is none.
    """
    name = f"coco:{path}"
    mean, std = normalisation(name, size, reading.pixels)
    folders = parts_of(path)
    noted = {part: _Noted(folder) for part, folder in folders.items()}
    classes = noted["train"].classes
    for part, one in noted.items():
        if one.classes != classes:
            raise DataError(
                f"{folders[part] / FILE} has other categories than {folders['train'] / FILE}.",
                "Give all parts the same list of categories.",
            )
    digests = digests_of([one.files for one in noted.values()], "image")
    given: dict[Part, Boxed] = {
        part: Boxed(one, hashed, size) for (part, one), hashed in zip(noted.items(), digests, strict=True)
    }
    raw = from_samples(given, name, seed, reading)
    crowds = sum(one.crowds for one in noted.values())
    notes = (f"{crowds} annotations of crowds were left out.",) if crowds else ()
    names = tuple(classes[one] for one in sorted(classes))
    return replace(raw, mean=mean, std=std, names=names, fit="stretch", notes=notes)


class _Noted:
    """What an annotations.json says: the files of its images, and the boxes of each."""

    def __init__(self, folder: Path) -> None:
        self.file = file = folder / FILE
        if not file.is_file():
            raise DataError(f"{folder} has no {FILE}.", f"Give coco:PATH with images/ and {FILE}.")
        try:
            content = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{file} is no JSON: {first_line(error)}.", "Save it again.") from error
        images, notes, categories = (self._list(content, key) for key in ("images", "annotations", "categories"))
        self.classes = {self._number(one, "id", "a category"): str(one.get("name", one["id"])) for one in categories}
        if len(self.classes) < len(categories):
            raise DataError(f"{file} has two categories of one id.", "Give every category an id of its own.")
        if not self.classes:
            raise DataError(f"{file} names no categories.", "List them: {'id': 1, 'name': 'cat'}.")
        codes = {number: code for code, number in enumerate(sorted(self.classes))}
        places: dict[int, int] = {}
        self.files: list[str] = []
        for one in images:
            number = self._number(one, "id", "an image")
            if number in places:
                raise DataError(f"{file} has two images of the id {number}.", "Give every image an id of its own.")
            places[number] = len(self.files)
            self.files.append(self._path(folder, one.get("file_name"), number))
        if not self.files:
            raise DataError(f"{file} lists no images.", "List them: {'id': 1, 'file_name': 'a.jpg'}.")
        self.boxes: list[list[Box]] = [[] for _ in self.files]
        self.crowds = 0
        for one in notes:
            what = f"annotation {brief(one.get('id', '?'))}"
            image, category = self._number(one, "image_id", what), self._number(one, "category_id", what)
            for key, value, known in (("image_id", image, places), ("category_id", category, codes)):
                if value not in known:
                    raise DataError(
                        f"{file}: {what} has the {key} {value}, which the file does not list.",
                        "Correct it or leave it out.",
                    )
            if one.get("iscrowd"):
                self.crowds += 1
                continue
            self.boxes[places[image]].append((*self._box(one.get("bbox"), what), codes[category]))

    def _list(self, content: Any, key: str) -> list[dict[str, Any]]:
        found = content.get(key) if isinstance(content, dict) else None
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise DataError(
                f"{self.file} has no list of {key}.", "Give images, annotations and categories, as COCO notes them."
            )
        return found

    def _number(self, entry: Mapping[str, Any], key: str, what: str) -> int:
        value = entry.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise DataError(f"{self.file}: {what} has the {key} {brief(value)}.", "Give a whole number.")
        return value

    def _path(self, folder: Path, name: Any, number: int) -> str:
        """Where an image lies: inside images/, wherever a hostile name points."""
        inside = PurePosixPath(name) if isinstance(name, str) and name else None
        if inside is None or inside.is_absolute() or ".." in inside.parts or "\0" in str(inside):
            raise DataError(f"{self.file}: image {number} has the file_name {brief(name)}.", "Name a file in images/.")
        path = folder / "images" / inside
        if not path.is_file():
            raise DataError(
                f"{self.file} names {inside}, which images/ does not hold.", "Add it, or leave its entry out."
            )
        return str(path)

    def _box(self, box: Any, what: str) -> tuple[float, float, float, float]:
        plain = (
            isinstance(box, list)
            and len(box) == 4
            and all(isinstance(one, int | float) and not isinstance(one, bool) and abs(one) < LARGEST for one in box)
        )
        if not plain or box[2] <= 0 or box[3] <= 0:
            raise DataError(
                f"{self.file}: {what} has the bbox {brief(box)}.",
                "Give [left, top, width, height] in pixels, none of it empty.",
            )
        left, top, width, height = map(float, box)
        return left, top, left + width, top + height


class Boxed(Prepared):
    """Images as bytes (channels, H, W), each with {"boxes": (n, 4) xyxy in its pixels, "labels": (n,) int64}."""

    scanned = 2_000

    def __init__(self, noted: _Noted, files: Sequence[bytes], size: Size) -> None:
        self.noted, self.size = noted, size
        self.digests = [
            hashlib.sha256(one + repr(boxes).encode()).digest() for one, boxes in zip(files, noted.boxes, strict=True)
        ]
        self.workers = readers(len(files))

    def place(self, index: int) -> str:
        """The image's file."""
        return self.noted.files[index]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        file = self.noted.files[index]
        pixels, (width, height) = stretched(file, self.size)
        boxes = []
        for left, top, right, bottom, _ in self.noted.boxes[index]:
            beyond = max(-left, -top, right - width, bottom - height)
            cut = (max(left, 0.0), max(top, 0.0), min(right, width), min(bottom, height))
            if beyond > OVERHANG or cut[2] <= cut[0] or cut[3] <= cut[1]:
                shown = [round(one, 1) for one in (left, top, right, bottom)]
                raise DataError(
                    f"{file} has {width}×{height} pixels, and {self.noted.file} a box from {shown[:2]} to {shown[2:]}.",
                    "Give boxes in pixels of the file: [left, top, width, height].",
                )
            boxes.append(cut)
        scale = torch.tensor([self.size[2] / width, self.size[1] / height] * 2)
        return pixels, {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4) * scale,
            "labels": torch.tensor([one[4] for one in self.noted.boxes[index]], dtype=torch.int64),
        }
