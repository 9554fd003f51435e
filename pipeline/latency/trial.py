"""A chosen model as it would ship, timed before anything is spent on its weights."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from exporters.candidates import NotApplicable, Source, make
from foundation.errors import ExportError
from pipeline.channels.centring.centre import centre
from pipeline.channels.coupling.groups import Analysis, Removed
from pipeline.channels.removal.rewrite import shrink
from pipeline.latency import probes
from pipeline.latency.probes import RMS_OPSET, Setting
from pipeline.latency.profile import dense_file
from pipeline.models.source import ModelSource, example
from validators.feeds import Feed
from validators.gates import Measured
from validators.latency import race
from validators.runners import OrtRunner

SECONDS = 5.0
RIVALS = ("portable", "opset18", "fused")
"""Files of float32 that ship by default where one is faster beyond doubt."""
SEED = 0


@dataclass(frozen=True)
class Trial:
    """The time of the file that would ship over the dense model's, and which candidate that is."""

    ratio: Measured
    shipped: str


def tried(
    analysis: Analysis, weights: Mapping[str, Any], removed: Removed, source: ModelSource, setting: Setting
) -> Trial:
    """Cut the groups flagged in `removed` out of the analysed program with these weights, export it, and time it
    against the dense model. Raises RefusedError, ExportError.
    """
    folded = analysis.captured.with_state(weights).fold(analysis.masks(removed))
    program = shrink(folded, analysis, removed).program
    if setting.opset >= RMS_OPSET:
        program = centre(program).program
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dense, plain = folder / "dense.onnx", folder / "model.onnx"
        feed = dense_file(analysis, source, setting, dense)
        probes.export(program, source, setting, plain, feed)
        files = {"exported": plain} if setting.int8 else _rivals(program, source, plain)
        runners = {key: OrtRunner(path, threads=setting.threads, name=key) for key, path in files.items()}
        runners["dense"] = OrtRunner(dense, threads=setting.threads, name="dense")
        found = race(runners, Feed("random", feed), reference="dense", seconds=SECONDS, seed=SEED).runners
    first = next(iter(files))
    faster = [key for key in files if found[key].ratio.high < found[first].ratio.low]
    best = min(faster, key=lambda key: found[key].ratio.value, default=first)
    return Trial(found[best].ratio, best)


def _rivals(program: ExportedProgram, source: ModelSource, plain: Path) -> dict[str, Path]:
    """The candidates of the race that may ship anywhere, as far as this model has them; the first is the usual one."""
    made: dict[str, Path] = {}
    given = Source(
        onnx=plain, program=lambda: program, example=example(source), calibration=lambda: (), folder=plain.parent
    )
    for name in RIVALS:
        try:
            made[name] = make(name, given).path
        except (NotApplicable, ExportError):
            continue
    return made or {"exported": plain}
