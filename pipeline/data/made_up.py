"""No data: inputs made up from what the model takes, so that all that needs none can be done: shrink, export, proof."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch

from pipeline.data.parts import PARTS, UNKNOWN, Batch, Data, Fed, Part, Split
from pipeline.models.calling import flattened
from pipeline.models.source import ModelSource

SAMPLES: dict[Part, int] = {"train": 64, "calibration": 64, "test": 64}
NONE = "none"
"""How the recipe asks for it."""


def made_up(source: ModelSource, seed: int) -> Data:
    """Standard normal floats, uniform ids: 64 samples in each part, without labels."""
    offsets = {part: 1_000 * number for number, part in enumerate(PARTS)}

    def split(part: Part) -> Split:
        def stream(chunks: Sequence[list[int]]) -> Iterator[Batch]:
            for chunk in chunks:
                rows = [_sample(source, seed + offsets[part] + number) for number in chunk]
                yield tuple(torch.cat(column) for column in zip(*rows, strict=True)), None

        return Split(SAMPLES[part], stream, torch.full((SAMPLES[part],), UNKNOWN))

    train, calibration, test = (split(part) for part in PARTS)
    digest = hashlib.sha256(repr((source.inputs, seed)).encode()).hexdigest()
    return Data(
        "no data",
        train,
        calibration,
        test,
        source.inputs,
        digest,
        labelled=False,
        fed=Fed(len(source.inputs), (), flattened(tuple(range(len(source.inputs))), {})[2]),
        notes=("no data was given: inputs are made up, and nothing was learnt of how good the model is",),
        made_up=True,
    )


def _sample(source: ModelSource, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(one.sample(1, generator) for one in source.inputs)
