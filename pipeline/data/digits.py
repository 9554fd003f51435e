"""scikit-learn's handwritten digits, part of its package: 1,797 images of 8x8 pixels."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits

from pipeline.data.assemble import Raw, cut_parts, hashes, stored
from pipeline.data.parts import Augmentation, Part, Split
from pipeline.models.source import Size

DIGITS_SIZE: Size = (3, 32, 32)
DIGITS_TEST = 360
"""Test images of `digits`; with a split of its own seed, so that no run ever trains on another run's test images."""


def read_digits() -> Raw:
    """The digits, always cut the same."""
    content = load_digits()
    pixels = torch.from_numpy(content.images).float()[:, None] / 16  # ink from 0 to 16
    labels = torch.from_numpy(content.target).long()
    given: dict[Part, Split] = {"train": stored(pixels, labels)}
    parts, digests = cut_parts(given, {"train": hashes(pixels)}, 0, "digits", DIGITS_TEST)
    (seen,), _ = next(parts["train"].stream([list(range(len(parts["train"])))]))
    names = tuple(str(name) for name in content.target_names)
    return Raw(
        "digits",
        parts,
        digests,
        names,
        (1, 8, 8),
        (float(seen.mean()),),
        (float(seen.std()),),
        Augmentation(padding="zeros"),  # paper is 0
    )
