"""Test samples as small pictures, for a person who wants to see what a model got wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from pipeline.data.parts import Data

SIDE = 64
"""Pixels of the longer side; smaller samples are enlarged without smoothing, so that each of their pixels shows."""


def pictured(data: Data, samples: Sequence[int], batch: int = 64) -> dict[int, Image.Image]:
    """Test sample -> picture, as the model saw it before normalisation; none for samples that are no images."""
    wanted = set(samples)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean or (0.0,), data.std or (1.0,)))
    found: dict[int, Image.Image] = {}
    if not wanted or data.input_size is None or data.input_size[0] not in (1, 3):
        return found
    first = 0
    for (images,), _ in data.batches("test", batch):
        for row in wanted & set(range(first, first + len(images))):
            found[row] = _picture((images[row - first] * std + mean).numpy())
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
