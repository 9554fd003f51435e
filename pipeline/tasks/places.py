"""A class for every place of a sample: pixels of an image, tokens of a text."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foundation.errors import DataError
from pipeline.data.parts import IGNORED


def whole(target: Any, what: str) -> Tensor:
    """`target` as int64. Raises DataError where it is no tensor, or holds anything but whole numbers."""
    if not isinstance(target, Tensor):
        raise DataError(
            f"{what} differ in shape from sample to sample." if isinstance(target, list) else f"{what} are no array.",
            "Give arrays of one shape, or make batches with a collate_fn of your own.",
        )
    if target.is_floating_point() and not bool((target == target.round()).all()):
        wrong = float(target[target != target.round()][0])
        raise DataError(f"{what} hold {wrong:.4g}, which is no label.", "Give whole numbers from 0.")
    return target.long()


def is_whole(target: Any) -> bool:
    """Whether a target is an array of whole numbers, as its type tells."""
    return isinstance(target, Tensor) and not target.is_floating_point()


def in_range(target: Tensor, classes: int, what: str) -> Tensor:
    """`target`, whose labels are 0 to classes-1 or `IGNORED`. Raises DataError for any other, which it names."""
    wrong = ((target < 0) & (target != IGNORED)) | (target >= classes)
    if bool(wrong.any()):
        raise DataError(
            f"{what} hold the label {int(target[wrong][0])}; the model has logits of {classes} classes, 0 to "
            f"{classes - 1}.",
            f"Number labels from 0, and mark places that count for nothing with {IGNORED}.",
        )
    return target


def cross_entropy(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Per sample, the mean over places that count; 0 where none does. Logits (samples, classes, ...)."""
    each = F.cross_entropy(logits, target, ignore_index=IGNORED, label_smoothing=smoothing, reduction="none")
    here = (target != IGNORED).flatten(1).sum(1)
    return each.flatten(1).sum(1) / here.clamp_min(1)


def spread(value: Tensor, target: Tensor) -> bool:
    """Whether every label of `target` is a class of `value` (samples, classes, ...), or marks an ignored place."""
    classes = value.shape[1]
    marks = torch.tensor([IGNORED, 255])
    return bool(((target >= 0) & (target < classes) | torch.isin(target, marks)).all())
