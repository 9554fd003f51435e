"""Latency of a model on onnxruntime against the dense one, so that methods can be held against each other at equal
measured latency instead of equal MACs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.export import ExportedProgram

from benchmarks.compare.problems import Problem
from exporters.export import to_onnx
from pipeline.channels.coupling.groups import Analysis, Cluster
from pipeline.latency import device, profile
from pipeline.latency.fitting import Fit
from pipeline.latency.probes import Setting
from pipeline.measurements import Measurements
from pipeline.models.find import load
from pipeline.progress import TerminalProgress

ROUNDS = 25
OPSET = 23
NEAR = 0.02
"""Of the wanted latency: what counts as the same."""


class Clock:
    """One thread, batch 1, float32: a model's time over the dense one's, both in turns, the median of the rounds."""

    def __init__(self, dense: nn.Module, problem: Problem) -> None:
        self.example = (problem.x[:2],)
        self.feed = {"input": problem.x[:1].numpy()}
        self._folder = tempfile.TemporaryDirectory()
        self.dense = device.session(self._file(dense), 1)

    def _file(self, model: nn.Module | ExportedProgram) -> Path:
        path = Path(self._folder.name) / "model.onnx"
        to_onnx(model, path, example=self.example, opset=OPSET, metadata={})
        return path

    def of(self, model: nn.Module | ExportedProgram) -> float:
        """The share of the dense model's time."""
        session = device.session(self._file(model), 1)
        for _ in range(device.WARM):
            device.once(session, self.feed)
        found = []
        for _ in range(ROUNDS):
            reference = device.turn(self.dense, self.feed)
            found.append(device.turn(session, self.feed) / reference)
        return float(np.median(found))


def table(dense: nn.Module, problem: Problem, analysis: Analysis, clusters: Sequence[Cluster], align: int) -> Fit:
    """What our latency table says of any choice of widths."""
    source = load(dense, input_size=tuple(problem.x.shape[1:]), seed=0)
    setting = Setting(1, 1, False, OPSET, align)
    return profile.measure(analysis, source, setting, clusters, Measurements(), TerminalProgress()).fit(analysis)


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
