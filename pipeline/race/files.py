"""Which of the race's files stay."""

from __future__ import annotations

from pathlib import Path

import zstandard

from exporters.candidates import CANDIDATES
from pipeline.artifacts.race import Candidate


def kept(row: Candidate, winner: Candidate, out: Path, *, compress: bool) -> Candidate:
    """The row with its compressed size; it keeps its file only where that ships or a bundle may want it."""
    path = out / row.file
    if not row.file or not path.is_file():
        return row.model_copy(update={"file": ""})
    packed = len(zstandard.ZstdCompressor(level=3).compress(path.read_bytes())) if compress else None
    stays = row.name == winner.name or (row.outcome == "passed" and CANDIDATES[row.name].bundled)
    return row.model_copy(update={"file": row.file if stays else "", "zstd_bytes": packed})


def sweep(out: Path, names: set[str]) -> None:
    """Remove what candidates left in `out`, but for the files called `names` and what belongs to them."""
    stems = {name.rpartition(".")[0] for name in names if name}
    for path in [*out.glob("model.*"), *out.glob(".*.onnx*")]:
        own = path.name in names or path.name.removesuffix(".data") in names
        config = path.name.removesuffix(".required_operators.config")
        if not own and not (config != path.name and config in stems):
            path.unlink()
