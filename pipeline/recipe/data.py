"""Which data trains, calibrates and judges."""

from __future__ import annotations

import math
from pathlib import Path

from pydantic import Field, field_validator

from pipeline.recipe.section import Pixels, Section


class DataSection(Section):
    """Which data trains, calibrates and judges."""

    source: str = Field(
        "digits",
        description="digits, KIND:PATH (imagefolder, npz, csv, jsonl, audiofolder, segmentation, coco), "
        "path/to/file.py:callable, or none",
    )
    input_size: tuple[Pixels, Pixels, Pixels] | None = Field(
        None, description="C, H, W; the data's own size when left out"
    )

    classes: int | None = Field(
        None, ge=2, le=1_000_000, description="outputs of the model where the data has no labels; the model's own else"
    )

    inputs: tuple[str, ...] | None = Field(
        None, min_length=1, description="entries of a sample that the model is fed; all but the target when left out"
    )
    target: str | None = Field(None, description="entry of a sample that is the target; labels, label, ... else")
    dims: dict[str, tuple[str | int, ...]] = Field(
        default_factory=dict,
        description="input -> its dimensions, the batch first: a name may have any size, a number is fixed",
    )
    tokenizer: Path | None = Field(
        None, description="tokenizer.json of texts, or the folder that it lies in; that of an `hf:` folder else"
    )
    max_tokens: int | None = Field(
        None, ge=8, le=1 << 20, description="tokens that a text is cut at; as many as the model bears when left out"
    )
    sample_rate: int = Field(
        16_000, ge=100, le=1_000_000, description="samples per second that recordings are brought to"
    )
    seconds: float = Field(1.0, gt=0, le=3600, description="length of recordings: longer ones are cut")
    sizes: dict[str, tuple[Pixels, ...]] = Field(
        default_factory=dict,
        description="free dimension -> sizes that it is proven and raced at, the usual one first; the data's own else",
    )

    @field_validator("input_size")
    @classmethod
    def _fits(cls, value: tuple[int, int, int] | None) -> tuple[int, int, int] | None:
        if value is not None and math.prod(value) > LARGEST:
            raise ValueError(f"one sample may hold at most {LARGEST:,} numbers")
        return value


LARGEST = 1 << 28
"""Numbers in one sample: a gigabyte of float32."""
