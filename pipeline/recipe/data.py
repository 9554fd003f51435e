"""Which data trains, calibrates and judges."""

from __future__ import annotations

from pydantic import Field

from pipeline.recipe.section import Section


class DataSection(Section):
    """Which data trains, calibrates and judges."""

    source: str = Field("digits", description="digits, imagefolder:PATH, npz:PATH or path/to/file.py:callable")
    input_size: tuple[int, int, int] | None = Field(None, description="C, H, W; the data's own size when left out")
