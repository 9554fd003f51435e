"""A class for every pixel of an image."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from foundation.errors import DataError, ModelError
from pipeline.data.parts import IGNORED, Target
from pipeline.models.calling import Outputs
from pipeline.tasks.per_class import counted, mean_iou, right_places
from pipeline.tasks.pictures import Compared, Pixels, beside, rgb
from pipeline.tasks.places import cross_entropy, in_range, spread, whole
from pipeline.tasks.task import Task, softened
from validators.scores import Score, ratio

BORDER = 255
"""Label of pixels that count for nothing in data sets whose masks are bytes, unless it is a class."""


def task(name: str, main: str) -> Task:
    """Classes of pixels by the logits (samples, classes, h, w) in the output `main`: cross-entropy; mean intersection
    over union of the classes that occur, share of pixels that are right.

    Targets are label maps, (samples, height, width); logits of another size are resized to them. A single channel is
    the logit of class 1 against class 0.
    """

    def pair(outputs: Outputs, target: Target) -> tuple[Tensor, Tensor]:
        labels = whole(target, "The label maps")
        if labels.dim() == 4 and labels.shape[1] == 1:
            labels = labels[:, 0]
        logits = outputs[main].float()
        if labels.dim() != 3 or logits.dim() != 4 or len(labels) != len(logits):
            raise ModelError(
                f"The model gives {main} of shape {tuple(logits.shape)}, the targets are {tuple(labels.shape)}.",
                "Label maps are (samples, height, width), logits (samples, classes, height, width).",
            )
        logits = two_classes(logits)
        classes = logits.shape[1]
        if outputs[main].shape[1] == 1 and bool((labels == BORDER).any()) and not bool((labels == 1).any()):
            raise DataError("The masks hold 0 and 255.", "Give 1 for pixels of the object; 255 counts for nothing.")
        if classes <= BORDER:
            labels = torch.where(labels == BORDER, IGNORED, labels)
        return upsampled(logits, labels), in_range(labels, classes, "The label maps")

    def losses(outputs: Outputs, target: Target, smoothing: float) -> Tensor:
        return cross_entropy(*pair(outputs, target), smoothing)

    def divergence(student: Outputs, teacher: Outputs, temperature: float) -> Tensor:
        return softened(two_classes(student[main]), two_classes(teacher[main]), temperature)

    def by_class(outputs: Outputs, target: Target) -> Tensor:
        logits, labels = pair(outputs, target)
        return counted(logits.argmax(1), labels, logits.shape[1])

    def pixels(outputs: Outputs, target: Target) -> Tensor:
        logits, labels = pair(outputs, target)
        return right_places(logits.argmax(1), labels)

    def drawn(one: Compared) -> Image.Image:
        maps = [pair(outputs, one.target) for outputs in (one.dense, one.shipped)]
        labels = maps[0][1]
        panels = [coloured(labels), *(coloured(logits.argmax(1)) for logits, _ in maps)]
        if one.image is not None:
            image = F.interpolate(one.image[None], labels.shape[1:], mode="bilinear", align_corners=False)[0]
            panels.insert(0, rgb(image))
        return beside(panels)

    scores = (Score("mean IoU", by_class, mean_iou), Score("pixel accuracy", pixels, ratio))
    return Task(name, scores, losses, divergence, (main,), batch=8, drawn=drawn, panels="image, truth, dense, shipped")


def coloured(labels: Tensor) -> Pixels:
    """A label map (1, height, width) as (height, width, 3) bytes: class 0 black, ignored places white, the others by
    hues that lie far apart.
    """
    hues = [colorsys.hsv_to_rgb(0.618 * number % 1, 0.75, 0.95) for number in range(int(labels.max().clamp_min(0)))]
    table = np.array([(0, 0, 0), *hues, (1, 1, 1)])  # the last one is that of negative numbers
    shown: Pixels = (255 * table[labels[0].clamp_min(-1).numpy()]).astype(np.uint8)
    return shown


def two_classes(logits: Tensor) -> Tensor:
    """Logits of one channel as those of two classes: softmax of (0, x) is the sigmoid of x."""
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.dim() == 4 and logits.shape[1] == 1 else logits


def upsampled(logits: Tensor, labels: Tensor) -> Tensor:
    """`logits` at the size of the label maps, as torchvision's references train and judge."""
    if logits.shape[2:] == labels.shape[1:]:
        return logits
    return F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)


def fits(value: Tensor, target: Any) -> bool:
    """Whether `value` can be logits for the label maps `target`."""
    if not isinstance(target, Tensor) or target.is_floating_point() or not value.is_floating_point():
        return False
    maps = target[:, 0] if target.dim() == 4 and target.shape[1] == 1 else target
    return maps.dim() == 3 and value.dim() == 4 and len(value) == len(maps) and spread(two_classes(value), maps)
