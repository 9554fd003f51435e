"""Test samples as small pictures, for a person who wants to see what a model got wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.data.parts import Data, Inputs, Target, picked
from pipeline.models.calling import Outputs

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

SIDE = 64
"""Pixels of the longer side; smaller samples are enlarged without smoothing, so that each of their pixels shows."""


PANEL, GAP = 96, 2
"""Height of a panel and the room between two, in pixels."""


@dataclass(frozen=True)
class Compared:
    """One test sample, and what two models make of it, as batches of one.

    `image`: (channels, height, width), 0 to 1, of one or three channels; None where the sample is no such image.
    """

    image: Tensor | None
    target: Target
    dense: Outputs
    shipped: Outputs


Drawn = Callable[[Compared], Image.Image]


def compared(
    data: Data,
    samples: Sequence[int],
    dense: Callable[..., Outputs],
    shipped: Callable[..., Outputs],
    drawn: Drawn,
) -> dict[int, Image.Image]:
    """Test sample -> what two models make of it, as a task draws it."""
    if not samples:
        return {}
    some = replace(data, test=picked(data.test, torch.tensor(samples)))
    found: dict[int, Image.Image] = {}
    for sample, (inputs, target) in zip(samples, some.batches("test", 1), strict=True):
        found[sample] = drawn(Compared(_image(data, inputs), target, dense(*inputs), shipped(*inputs)))
    return found


def _image(data: Data, inputs: Inputs) -> Tensor | None:
    """The first input of a batch of one as an image; what own transforms have scaled is spread over 0 to 1."""
    first = inputs[0][0]
    if first.dim() != 3 or first.shape[0] not in (1, 3) or not first.is_floating_point():
        return None
    first = _unnormalised(data, first)
    low, high = (float(value) for value in first.aminmax())
    return first if low >= 0 and high <= 1 else (first - low) / max(high - low, 1e-12)


def _unnormalised(data: Data, image: Tensor) -> Tensor:
    """An image (channels, height, width) as it was before `Data.batches` normalised it."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean or (0.0,), data.std or (1.0,)))
    return image * std + mean


def rgb(image: Tensor) -> Pixels:
    """(1 or 3, height, width), 0 to 1 -> (height, width, 3) bytes."""
    shown = (255 * image.nan_to_num().clamp(0, 1)).round().byte().expand(3, -1, -1)
    return shown.permute(1, 2, 0).numpy()


def beside(panels: Sequence[Pixels]) -> Image.Image:
    """Panels of one size, (height, width, 3) bytes, in a row, each `PANEL` pixels high."""
    height, width = panels[0].shape[:2]
    size = (max(1, round(PANEL * width / height)), PANEL)
    row = Image.new("RGB", (len(panels) * (size[0] + GAP) - GAP, PANEL), "white")
    resampling = Image.Resampling.NEAREST if height <= PANEL else Image.Resampling.BOX
    for place, panel in enumerate(panels):
        row.paste(Image.fromarray(panel).resize(size, resampling), (place * (size[0] + GAP), 0))
    return row


def pictured(data: Data, samples: Sequence[int], batch: int = 64) -> dict[int, Image.Image]:
    """Test sample -> picture, as the model saw it before normalisation; none for samples that are no images."""
    wanted = set(samples)
    found: dict[int, Image.Image] = {}
    if not wanted or data.input_size is None or data.input_size[0] not in (1, 3):
        return found
    first = 0
    for (images,), _ in data.batches("test", batch):
        for row in wanted & set(range(first, first + len(images))):
            found[row] = _picture(_unnormalised(data, images[row - first]).numpy())
        first += len(images)
        if first > max(wanted):
            break
    return {sample: found[sample] for sample in samples if sample in found}


def _picture(pixels: np.ndarray[tuple[int, int, int], np.dtype[np.float32]]) -> Image.Image:
    """(C, H, W), 0 to 1 -> a picture whose longer side is SIDE."""
    shown = np.clip(np.nan_to_num(pixels), 0, 1).transpose(1, 2, 0)
    made = Image.fromarray((255 * shown).round().astype(np.uint8).squeeze())
    scale = SIDE / max(made.size)
    size = (max(1, round(scale * made.width)), max(1, round(scale * made.height)))
    return made.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX)
