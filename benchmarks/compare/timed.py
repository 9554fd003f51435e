"""Latency of a model on onnxruntime against the dense one, so that methods can be held against each other at equal
measured latency instead of equal MACs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from benchmarks.compare.problems import Problem, Score, outputs, scored
from exporters.export import to_onnx
from exporters.quantize import quantize
from pipeline.channels.coupling.groups import Analysis
from pipeline.latency import device, profile, trial
from pipeline.latency.prediction import Fit
from pipeline.latency.probes import Setting
from pipeline.measurements import Measurements
from pipeline.models.find import load
from pipeline.progress import TerminalProgress
from pipeline.selection.choose import choosable, choosable_branches

OPSET = 23
NEAR = 0.02
"""Of the wanted latency: what counts as the same."""
SECONDS = 4.0
"""Of a race."""
RANGES = 128
"""Calibration samples that the ranges of int8 are found on."""


class Clock:
    """One thread, batch 1, float32 or `int8`: a model's time over the dense one's in the same format, in a race as the
    gate runs it.
    """

    def __init__(self, dense: nn.Module, problem: Problem, *, int8: bool = False) -> None:
        self.problem, self.int8 = problem, int8
        self.feed = {"input": problem.x[:1].numpy()}
        self._folder = tempfile.TemporaryDirectory()
        self.dense = self.file(dense).rename(Path(self._folder.name) / "dense.onnx")

    def file(self, model: nn.Module | ExportedProgram | Path) -> Path:
        """What ships: the model, or the file of float32 that it is already, in int8 where that is asked for."""
        made = Path(self._folder.name) / "model.onnx"
        if isinstance(model, Path):
            made = model
        else:
            to_onnx(model, made, example=(self.problem.x[:2],), opset=OPSET, metadata={})
        if self.int8:
            seen, _ = self.problem.part("calibration")
            batches = [{"input": one.numpy()} for one in seen[:RANGES].split(32)]
            quantize(made, made.with_suffix(".int8.onnx"), batches=batches)
            return made.with_suffix(".int8.onnx")
        return made

    def of(self, model: nn.Module | ExportedProgram | Path) -> float:
        """The share of the dense model's time."""
        share, _ = trial.timed(self.file(model), self.dense, self.feed, 1, SECONDS, trial.SEED)
        return share.value

    def answers(self, model: nn.Module | ExportedProgram | Path) -> Callable[[Tensor], Tensor]:
        """The file that is timed, as a function of a batch."""
        return answers(self.file(model))


def scoring(dense: nn.Module, problem: Problem, clock: Clock | None) -> Callable[[Any], Score]:
    """What a model is worth beside the dense one; with a `clock`, the file that it times."""
    x, y = problem.part("test")
    wanted = outputs(dense, x)
    return lambda model: scored(outputs(clock.answers(model) if clock else model, x), wanted, y)


def answers(path: Path) -> Callable[[Tensor], Tensor]:
    """The file as a function of a batch, on one thread."""
    session = device.session(path, 1)
    return lambda batch: torch.from_numpy(session.run(None, {"input": batch.numpy()})[0])


def table(
    dense: nn.Module, problem: Problem, analysis: Analysis, maskable: frozenset[str], align: int, *, int8: bool
) -> Fit:
    """What our latency table says of any choice of widths."""
    source = load(dense, input_size=tuple(problem.x.shape[1:]), seed=0)
    setting = Setting(1, 1, int8, OPSET, align)
    clusters, branches = choosable(analysis, maskable), choosable_branches(analysis, maskable)
    made = profile.measure(analysis, source, setting, clusters, Measurements(), TerminalProgress(), branches)
    return made.fit(analysis)


def hit(make: Callable[[float], Any], took: Callable[[Any], float], wanted: float, tries: int = 4) -> tuple[Any, float]:
    """What `make` gives for a share that it is asked for, asked again until what it `took` is near `wanted`; and that.

    The largest share that is asked for is 1, the least a tenth of what is wanted.
    """
    asked, best = wanted, None
    for _ in range(tries):
        made = make(asked)
        found = took(made)
        if best is None or abs(found / wanted - 1) < abs(best[1] / wanted - 1):
            best = made, found
        if abs(found / wanted - 1) <= NEAR:
            break
        asked = float(np.clip(asked * wanted / found, wanted / 10, 1.0))
    assert best is not None
    return best
