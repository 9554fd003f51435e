"""The ONNX file."""

from __future__ import annotations

from pydantic import Field

from pipeline.recipe.section import Section, Seed


class ExportSection(Section):
    """Stage 5: ONNX."""

    opset: int = Field(23, ge=18, le=1000, description="from 23 on, norms over removed channels become one operator")
    centre: bool = Field(True, description="store residual streams that lost channels centred, so that they do")
    seed: Seed = 0
