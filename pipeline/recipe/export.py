"""The ONNX file."""

from __future__ import annotations

from pydantic import Field

from pipeline.recipe.section import Section


class ExportSection(Section):
    """Stage 5: ONNX."""

    opset: int = Field(23, ge=18, description="from 23 on, norms over removed channels become one operator")
    centre: bool = Field(True, description="store residual streams that lost channels centred, so that they do")
    seed: int = 0
