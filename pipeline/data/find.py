"""Data sets by name, by file or as objects: three parts that never overlap, checked once, normalised, reproducible.

digits                     scikit-learn's handwritten digits, part of its package: 1,797 images of 8x8 pixels
imagefolder:PATH           one folder of images per class; train/ and test/ or val/ above them if there are
npz:PATH                   named arrays: x and y, or inputs by name and a target; x_train, x_test, ... are parts
csv:PATH                   a table, its last column the target
jsonl:PATH                 texts, pairs of texts, words with labels; the tokenizer of the model's folder
audiofolder:PATH           one folder of .wav recordings per class
segmentation:PATH          images/ and masks/ of class numbers
coco:PATH                  images/ and annotations.json with boxes
path/to/file.py:callable   own code that returns data sets or loaders; the same can be given as objects
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from foundation.errors import DataError, nearest
from pipeline.data.assemble import finish
from pipeline.data.parts import Data
from pipeline.data.samples import Reading
from pipeline.models.inspection import accepted
from pipeline.models.source import DEFAULT_SIZE, Size
from pipeline.seeding import seeded

KINDS = ("imagefolder", "npz", "csv", "jsonl", "audiofolder", "segmentation", "coco")
"""Words that stand before a path."""


def load(spec: object, *, input_size: Size | None = None, seed: int = 0, reading: Reading | None = None) -> Data:
    """Find a data set, check it, and cut it into train, calibration and test.

    `input_size` (channels, height, width): images are resized to it; None keeps the data's own. `seed` decides the cut
    where the data has none of its own (`digits` is always cut the same). `reading` says which entries of a sample of
    own code mean what. Raises DataError if there is no such data set,
    or it is empty, has a single class, holds NaN, has labels outside 0..classes-1, or samples of unequal shape.
    """
    if isinstance(spec, Data):
        return spec
    reading = reading or Reading()
    if not isinstance(spec, str):
        from pipeline.data.objects import from_objects

        return finish(from_objects(spec, f"object:{type(spec).__name__}", seed, reading), input_size)
    kind, colon, rest = spec.partition(":")
    if spec == "digits":
        from pipeline.data.digits import DIGITS_SIZE, read_digits

        return finish(read_digits(), input_size or DIGITS_SIZE)
    path = Path(os.path.expanduser(rest))  # noqa: PTH111  # leaves ~nobody as it is, where Path raises
    size = input_size or DEFAULT_SIZE
    if kind == "imagefolder" and colon:
        from pipeline.data.imagefolder import from_folder

        return finish(from_folder(path, size, seed, reading), input_size)
    if kind == "npz" and colon:
        from pipeline.data.npz import from_npz

        return finish(from_npz(path, seed, reading), input_size)
    if kind == "csv" and colon:
        from pipeline.data.table import from_csv

        return finish(from_csv(path, seed, reading), input_size)
    if kind == "jsonl" and colon:
        from pipeline.data.texts import from_jsonl

        return finish(from_jsonl(path, seed, reading), input_size)
    if kind == "audiofolder" and colon:
        from pipeline.data.audiofolder import from_audiofolder

        return finish(from_audiofolder(path, seed, reading), input_size)
    if kind == "segmentation" and colon:
        from pipeline.data.segmentation import from_segmentation

        return finish(from_segmentation(path, size, seed, reading), None)
    if kind == "coco" and colon:
        from pipeline.data.coco import from_coco

        return finish(from_coco(path, size, seed, reading), None)
    if colon and not _misspelt(kind):
        from pipeline.data.objects import from_objects
        from pipeline.models.from_code import load_callable, user_code

        call, _ = load_callable(spec, DataError)
        with user_code(spec, DataError), seeded(seed):
            content = call(**accepted(call, input_size=input_size, seed=seed))
        return finish(from_objects(content, spec, seed, reading), input_size)
    raise DataError(
        f"There is no data set {spec!r}.",
        nearest(kind, ("digits", *KINDS))
        or f"Give digits, {', '.join(f'{one}:PATH' for one in KINDS)} or file.py:callable.",
    )


def _misspelt(kind: str) -> bool:
    """Whether what stands before the colon is no module, but close to a kind of data set."""
    return kind.isidentifier() and bool(nearest(kind, KINDS)) and importlib.util.find_spec(kind) is None
