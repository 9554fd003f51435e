"""Answers counted by class: right, wrongly given, missed. What F1 and intersection over union are made of."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from validators.runners import Array


def counted(answers: Tensor, target: Tensor, classes: int) -> Tensor:
    """Per sample and class: right answers, wrong ones, missed ones; (samples, 3 * classes) float64.

    `answers`, `target`: class numbers, (samples, ...) int64; places where the target is negative count for nothing.
    """
    rows = len(target)
    answers, target = answers.reshape(rows, -1), target.reshape(rows, -1)
    here = target >= 0
    first = (torch.arange(rows) * classes)[:, None]

    def count(numbers: Tensor, where: Tensor) -> Tensor:
        return torch.bincount((first + numbers)[where], minlength=rows * classes).reshape(rows, classes)

    right = count(target, here & (answers == target))
    return torch.cat([right, count(answers, here) - right, count(target, here) - right], 1).double()


def right_places(answers: Tensor, target: Tensor) -> Tensor:
    """Per sample: places answered rightly, places that count; (samples, 2) float64."""
    rows = len(target)
    here = (target >= 0).reshape(rows, -1)
    right = (answers == target).reshape(rows, -1) & here
    return torch.stack([right.sum(1), here.sum(1)], 1).double()


def _parts(sums: Array) -> tuple[Array, Array, Array]:
    right, wrong, missed = np.split(sums, 3, axis=-1)
    return right, wrong, missed


def macro_f1(sums: Array) -> Array:
    """F1 of every class, mean over those that occur or were answered."""
    right, wrong, missed = _parts(sums)
    return _mean(2 * right, 2 * right + wrong + missed)


def micro_f1(sums: Array) -> Array:
    """F1 of all classes counted together."""
    right, wrong, missed = (one.sum(-1, keepdims=True) for one in _parts(sums))
    return _mean(2 * right, 2 * right + wrong + missed)


def mean_iou(sums: Array) -> Array:
    """Intersection over union of every class, mean over those that occur or were answered."""
    right, wrong, missed = _parts(sums)
    return _mean(right, right + wrong + missed)


def _mean(share: Array, of: Array) -> Array:
    """Mean of share/of over the classes where `of` is not 0; 0 where none is."""
    there = of > 0
    found: Array = (share / np.where(there, of, 1)).sum(-1) / np.maximum(there.sum(-1), 1)
    return found
