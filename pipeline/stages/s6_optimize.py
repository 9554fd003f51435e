"""Optimise the ONNX graph offline with onnxruntime: a portable file always, a host-tuned one tagged with its ISA."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime

from exporters import optimize
from exporters.to_ort import Level
from pipeline.artifacts import Candidate, Exported, Optimized
from pipeline.config import OptimizeSection
from pipeline.progress import Progress

# EXTENDED loads as fast as the raw file and runs anywhere; ALL bakes in the block layout of this host's vector unit.
_FILES: dict[str, tuple[str, Level]] = {
    "portable": ("model.portable.onnx", "extended"),
    "host": ("model.host.onnx", "all"),
}


def run(cfg: OptimizeSection, out: Path, exported: Exported, progress: Progress) -> Optimized:
    """Write both files and the operator histograms. Raises ExportError where onnxruntime refuses the model."""
    candidates: list[Candidate] = []
    with progress.bar("optimising", len(_FILES)) as move:
        for number, (name, level) in enumerate(_FILES.values(), start=1):
            made = optimize(exported.onnx, out / name, level=level, threads=1)
            move(
                number, f"{level}: {sum(made.operators_before.values())} -> {sum(made.operators_after.values())} nodes"
            )
            candidates.append(
                Candidate(
                    file=name,
                    level=made.level,
                    portable=made.portable,
                    isa="" if made.portable else made.isa,
                    onnx_bytes=made.summary.bytes,
                    operators_before=made.operators_before,
                    operators_after=made.operators_after,
                )
            )
    histogram = {c.file: {"before": c.operators_before, "after": c.operators_after} for c in candidates}
    (out / "operators.json").write_text(json.dumps(histogram, indent=2) + "\n", encoding="utf-8")
    return Optimized(
        folder=out, onnxruntime=onnxruntime.__version__, ships=_FILES[cfg.ship][0], candidates=tuple(candidates)
    )
