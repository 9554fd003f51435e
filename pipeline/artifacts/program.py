"""Artifacts that hold the smaller program: shrunk, exported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pipeline.artifacts import archive
from pipeline.artifacts.base import Artifact, WidthChange

if TYPE_CHECKING:
    from torch.export import ExportedProgram


class Shrunk(Artifact):
    """The physically smaller program, proven equal to the folded model."""

    STAGE: ClassVar[str] = "4-shrink"
    PROGRAM: ClassVar[str] = "shrunk.pt2"
    LEDGER: ClassVar[str] = "ledger.json"

    removed: bool
    statement: str
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    max_abs_diff: float
    max_abs_diff_float64: float | None
    output_scale: float
    tolerance: float
    widths: tuple[WidthChange, ...]
    kept_back: tuple[str, ...]
    original_class: bool | None = None
    """Whether the model's own class, with smaller layers, computes the program; None in versions older than that."""
    module: str = ""
    """What was measured of that, or why not; in words."""

    def program(self) -> ExportedProgram:
        """The shrunk program, batch-dynamic. Raises StoreError where its file is not one that was written here."""
        return archive.read(self.folder / self.PROGRAM)


class Exported(Artifact):
    """The shrunk model as ONNX."""

    STAGE: ClassVar[str] = "5-export"

    opset: int
    onnx_bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    external_data: bool
    nodes: int
    centred_norms: int

    @property
    def onnx(self) -> Path:
        """The file; external data, if any, lies beside it."""
        return self.folder / "model.onnx"
