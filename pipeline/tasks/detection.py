"""Boxes around objects: how well those that a model finds match those that are there (mean average precision).

A pretrained detector's raw outputs and its loss are its own, so that the task is the user's (`own`); what is common to
all of them is the score, as COCO's reference computes it.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from foundation.errors import ConfigError, DataError
from pipeline.data.parts import Target
from pipeline.data.samples import sliced
from pipeline.models.calling import Outputs
from pipeline.tasks.pictures import PANEL, Compared, beside, rgb
from validators.runners import Array
from validators.scores import Score

OVERLAPS = np.linspace(0.5, 0.95, 10)
"""Intersection over union from which a box counts as found."""
RECALLS = np.linspace(0.0, 1.0, 101)
MOST = 100
"""Boxes of a class that an image may have; the surest count."""
RESAMPLES = 200
"""Enough for chances of one in a hundred; every draw ranks all boxes anew."""

Boxes = Callable[[Outputs], Any]
"""Outputs of a batch -> for each image a mapping of boxes (n, 4), scores (n,) and labels (n,)."""


@dataclass(frozen=True)
class Matched:
    """The boxes of one image: of those found, class, certainty and whether they match one that is there, (n, overlaps);
    of those that are there, the class.
    """

    labels: Array
    scores: Array
    right: Array
    wanted: Array


def scores(boxes: Boxes) -> tuple[Score, ...]:
    """Mean average precision over overlaps from 0.5 to 0.95, and at 0.5 alone.

    Targets are a mapping of `boxes` (x1, y1, x2, y2) and `labels` per image.
    """

    def records(outputs: Outputs, target: Target) -> list[Matched]:
        rows = len(next(iter(outputs.values())))
        return [
            matched(_arrays(one, ("boxes", "scores", "labels"), "boxes"), _wanted(target, row))
            for row, one in enumerate(_listed(boxes(outputs), rows))
        ]

    return (
        Score("mAP", records, None, pooled=average_precision, resamples=RESAMPLES),
        Score(
            "mAP at 0.5",
            records,
            None,
            pooled=lambda records, weights: average_precision(records, weights, overlaps=1),
            resamples=RESAMPLES,
        ),
    )


def drawn(boxes: Boxes, one: Compared) -> Image.Image:
    """The image three times: with the boxes that are there, that the dense model and that the shipped one find.

    As many of a model's boxes as there are, the surest; on grey where the sample is no image, its size read off the
    boxes.
    """
    there, classes = _wanted(one.target, 0)
    panels = [(there, classes)]
    for outputs in (one.dense, one.shipped):
        found, certain, labels = _arrays(_listed(boxes(outputs), 1)[0], ("boxes", "scores", "labels"), "boxes")
        surest = np.argsort(-certain, kind="stable")[: max(1, len(there))]
        panels.append((found[surest], labels[surest]))
    side = int(max((box[:, 2:].max(initial=8.0) for box, _ in panels), default=8.0)) + 1
    image = one.image if one.image is not None else torch.full((3, side, side), 0.5)
    scale = PANEL / image.shape[1]
    small = beside([rgb(image)])  # boxes are drawn on it at its final size, or their lines would be lost
    shown = []
    for places, labels in panels:
        panel = small.copy()
        draw = ImageDraw.Draw(panel)
        for box, label in zip(places, labels, strict=True):
            x1, y1, x2, y2 = (scale * box).tolist()
            hue = colorsys.hsv_to_rgb(0.618 * (label + 1) % 1, 0.75, 0.95)
            corners = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
            draw.rectangle(corners, outline=tuple(round(255 * part) for part in hue))
        shown.append(np.asarray(panel))
    return beside(shown)


def _listed(found: Any, rows: int) -> Sequence[Any]:
    if not isinstance(found, list | tuple) or len(found) != rows:
        shown = f"{len(found)} entries" if isinstance(found, list | tuple) else type(found).__name__
        raise ConfigError(
            f"boxes returned {shown} for {rows} images.", "Return a list with a mapping of boxes, scores, labels each."
        )
    return found


def _wanted(target: Target, row: int) -> tuple[Array, ...]:
    if not isinstance(target, Mapping) or not {"boxes", "labels"} <= set(target):
        raise DataError(
            "The targets are no mapping of boxes and labels.",
            "Return (image, {'boxes': (n, 4), 'labels': (n,)}) for each image.",
        )
    return _arrays(sliced(target, row), ("boxes", "labels"), "The target")


def _arrays(one: Any, keys: tuple[str, ...], what: str) -> tuple[Array, ...]:
    """The entries of one image as arrays: boxes (n, 4), all others (n,). Raises ConfigError where they do not fit."""
    if not isinstance(one, Mapping) or any(key not in one for key in keys):
        raise ConfigError(f"{what} of an image lacks one of {', '.join(keys)}.", "Give a mapping of these tensors.")
    found = [
        value.detach().cpu().double().numpy() if isinstance(value, Tensor) else np.asarray(value, np.float64)
        for value in (one[key] for key in keys)
    ]
    boxes = found[0].reshape(-1, 4) if found[0].size % 4 == 0 else found[0]
    others = [other.reshape(-1) for other in found[1:]]
    if boxes.ndim != 2 or any(len(other) != len(boxes) for other in others):
        shapes = ", ".join(f"{key} {value.shape}" for key, value in zip(keys, found, strict=True))
        raise ConfigError(
            f"{what} of an image has {shapes}.", "Give boxes (n, 4), and one entry of the others for each."
        )
    if not all(np.isfinite(value).all() for value in (boxes, *others)):
        raise ConfigError(
            f"{what} of an image holds NaN or infinity.", "Look at the outputs, and how they are decoded."
        )
    return (boxes, *others)


def matched(found: tuple[Array, ...], wanted: tuple[Array, ...]) -> Matched:
    """Give each box found, the surest first, the box of its class that it overlaps most and that none has yet.

    `found`: boxes, scores, labels; `wanted`: boxes, labels.
    """
    boxes, certain, labels = found
    there, classes = wanted
    kept: list[Array] = []
    right: list[Array] = []
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        mine = mine[np.argsort(-certain[mine], kind="stable")][:MOST]
        overlap = overlaps(boxes[mine], there[classes == label])
        kept.append(mine)
        right.append(np.stack([_taken(overlap, least) for least in OVERLAPS], 1))
    order = np.concatenate(kept) if kept else np.zeros(0, int)
    return Matched(
        labels[order], certain[order], np.concatenate(right) if right else np.zeros((0, len(OVERLAPS)), bool), classes
    )


def _taken(overlap: Array, least: float) -> Array:
    """Per row (box found, the surest first): whether a column with `least` or more is left for it, which it takes."""
    free = overlap.copy()
    made = np.zeros(len(overlap), bool)
    for row in range(len(overlap) if overlap.shape[1] else 0):
        # Of equal ones the last, as in COCO's reference.
        best = overlap.shape[1] - 1 - int(free[row, ::-1].argmax())
        if free[row, best] >= least:
            made[row] = True
            free[:, best] = -1.0
    return made


def overlaps(one: Array, other: Array) -> Array:
    """Intersection over union of boxes (n, 4) and (m, 4): (n, m)."""
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = (high - low).clip(0).prod(2)
    sizes = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (one, other)]
    union = sizes[0][:, None] + sizes[1][None] - shared
    found: Array = shared / np.where(union > 0, union, 1.0)
    return found


def average_precision(records: Array, weights: Array, overlaps: int = len(OVERLAPS)) -> float:
    """Precision at 101 recalls, mean over them, the first `overlaps`, and the classes that occur; 0 where none does.

    Boxes of all images, each counted `weights` times, are ranked together by how sure they are; the precision at a
    recall is the best at that recall or a higher one. Same as COCO's reference on the images repeated so often.
    """
    drawn = np.flatnonzero(weights)
    if not len(drawn):
        return 0.0
    some = [records[place] for place in drawn]
    labels, certain = (np.concatenate([getattr(one, name) for one in some]) for name in ("labels", "scores"))
    right = np.concatenate([one.right[:, :overlaps] for one in some])
    wanted = np.concatenate([one.wanted for one in some])
    times = np.repeat(weights[drawn], [len(one.labels) for one in some])
    there = np.repeat(weights[drawn], [len(one.wanted) for one in some])
    found = []
    for label in np.unique(wanted):
        mine = np.flatnonzero(labels == label)
        mine = mine[np.argsort(-certain[mine], kind="stable")]
        hits = np.cumsum(right[mine] * times[mine, None], 0)
        share = hits / there[wanted == label].sum()
        precision = hits / np.maximum(np.cumsum(times[mine])[:, None], 1)
        best = np.maximum.accumulate(precision[::-1], 0)[::-1]
        for column in range(overlaps):
            at = np.searchsorted(share[:, column], RECALLS, side="left")
            reached = at < len(best)
            found.append(float(best[at[reached], column].sum()) / len(RECALLS))
    return float(np.mean(found)) if found else 0.0
