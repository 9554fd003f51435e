"""The models that are measured: a few choices of widths, each cut and exported as a release is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from exporters.export import to_onnx
from exporters.quantize import quantize
from pipeline.channels.centring.centre import RMS_OPSET, centre
from pipeline.channels.coupling.counts import counts
from pipeline.channels.coupling.groups import Analysis, Cluster
from pipeline.channels.removal.rewrite import shrink
from pipeline.models.source import ModelSource, example

Removed = dict[str, npt.NDArray[np.bool_]]

PROBES = 14
"""Measured beside the dense model; with half of them the worst predictions are twice as far off."""
LEAST = 0.1
"""Of a width."""


@dataclass(frozen=True)
class Setting:
    """What a latency is of: the session's threads, the batch, the file's opset and whether it is in int8, and the
    number that counts of channels are multiples of.
    """

    threads: int
    batch: int
    int8: bool
    opset: int
    align: int


def drawn(clusters: Sequence[Cluster], align: int, count: int, seed: int) -> list[Removed]:
    """`count` choices from nearly everything kept to a sixth, each cluster about as much as the others; the first
    keeps all.
    """
    rng = np.random.default_rng(seed)
    made: list[Removed] = [{c.name: np.zeros(c.size, np.bool_) for c in clusters}]
    for level in rng.permutation(np.linspace(0.15, 1.0, max(0, count - 1))):
        choice: Removed = {}
        for cluster in clusters:
            wanted = cluster.size * float(np.clip(level + rng.normal(0, 0.18), LEAST, 1))
            gone = np.zeros(cluster.size, np.bool_)
            gone[min(counts(cluster, align), key=lambda n: abs(n - wanted)) :] = True
            choice[cluster.name] = gone
        made.append(choice)
    return made


def write(
    analysis: Analysis, removed: Removed, source: ModelSource, setting: Setting, path: Path, feed: Mapping[str, Any]
) -> None:
    """The model without the groups flagged in `removed`, as an ONNX file; its weights are the capture's, masked.

    Raises RefusedError, ExportError.
    """
    captured = analysis.captured
    if any(flags.any() for flags in removed.values()):
        program = shrink(captured.fold(analysis.masks(removed)), analysis, removed).program
    else:
        program = captured.program
    if setting.opset >= RMS_OPSET:
        program = centre(program).program
    export(program, source, setting, path, feed)


def export(program: Any, source: ModelSource, setting: Setting, path: Path, feed: Mapping[str, Any]) -> None:
    """A program as the file whose latency counts; int8 ranges are found on `feed` alone, they decide no time."""
    plain = path.with_suffix(".float.onnx") if setting.int8 else path
    to_onnx(
        program,
        plain,
        example=example(source),
        opset=setting.opset,
        metadata={},
        input_names=[one.name for one in source.inputs],
        output_names=source.outputs,
        free=source.free,
    )
    if setting.int8:
        quantize(plain, path, batches=[dict(feed)])
        plain.unlink()
