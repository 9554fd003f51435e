"""The models that are measured: a few choices of widths, each cut and exported as a release is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.export import ExportedProgram

from exporters.export import to_onnx
from exporters.quantize import quantize
from foundation.errors import ExportError, RefusedError, first_line
from pipeline.channels.centring.centre import RMS_OPSET, centre
from pipeline.channels.coupling.analyse import analyse
from pipeline.channels.coupling.counts import counts
from pipeline.channels.coupling.groups import Analysis, Cluster
from pipeline.channels.dead.branches import without_zero_branches
from pipeline.channels.dead.liveness import liveness
from pipeline.channels.dead.removable import Branch
from pipeline.channels.dead.stray import evened
from pipeline.channels.removal.rewrite import shrink
from pipeline.models.source import ModelSource, example
from pipeline.progress import Progress

Removed = dict[str, npt.NDArray[np.bool_]]

PROBES = 14
"""Measured beside the dense model; with half of them the worst predictions are twice as far off."""
LEAST = 0.1
"""Of a width."""
SEED = 0


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


def choices(clusters: Sequence[Cluster], branches: Sequence[Branch], align: int) -> list[Removed]:
    """The choices that are measured: the dense model, `PROBES` others of it, and last, where there are `branches`, the
    one without these and all else whole, which shows what goes with a branch beside its layers.
    """
    made = drawn(clusters, align, PROBES + 1, SEED)
    inside = {name for branch in branches for name in branch.inside}
    if inside:
        made.append({c.name: np.full(c.size, c.name in inside) for c in clusters})
    return made


def write(
    analysis: Analysis,
    removed: Removed,
    branches: Sequence[Branch],
    source: ModelSource,
    setting: Setting,
    path: Path,
    feed: Mapping[str, Any],
    progress: Progress,
) -> bool:
    """The model without the groups flagged in `removed` as an ONNX file, and without `branches` where all that is
    inside them is flagged; its weights are the capture's, masked. Returns whether there is such a model: the one
    without branches may be none, which is said, for the table does without it.

    Raises RefusedError, ExportError of any other.
    """
    try:
        export(_program(analysis, removed, branches, setting), source, setting, path, feed)
    except (RefusedError, ExportError) as error:
        if not _is_bare(removed, branches):
            raise
        progress.say(f"  latency table: not known what goes with a branch ({first_line(error)})")
        return False
    return True


def _program(analysis: Analysis, removed: Removed, branches: Sequence[Branch], setting: Setting) -> ExportedProgram:
    captured = analysis.captured
    masks = dict(analysis.masks(removed))
    if _is_bare(removed, branches):
        for branch in branches:
            masks |= branch.masks(captured.state)
        return cut(analysis, visible(analysis), masks, setting)
    if any(flags.any() for flags in removed.values()):
        return centred(shrink(captured.fold(masks), analysis, removed).program, setting)
    return centred(captured.program, setting)


def _is_bare(removed: Removed, branches: Sequence[Branch]) -> bool:
    """Whether a choice is the one without branches: all that is inside them is flagged."""
    return bool(branches) and all(removed[name].all() for one in branches for name in one.inside)


def visible(analysis: Analysis) -> dict[str, Tensor]:
    """The capture's parameters, ones for those that are zero as a whole: training starts from a zero in the last norm
    of a branch, say, which would then be taken for one that is gone.
    """
    state = {name: analysis.captured.state[name] for name in analysis.parameter_names}
    return {name: value if value.any() else torch.ones_like(value) for name, value in state.items()}


def cut(analysis: Analysis, weights: Mapping[str, Any], masks: Mapping[str, Any], setting: Setting) -> ExportedProgram:
    """The program with these weights, without what `masks` (name -> True = kept) leave dead. Raises RefusedError."""
    folded, branches = without_zero_branches(analysis.captured.with_state(weights).fold(masks), analysis.policy)
    left = analyse(folded, analysis.policy) if branches else analysis
    live = evened(left, folded.state, liveness(left, folded.state), setting.align)
    return centred(shrink(folded, left, live.dead).program, setting)


def centred(program: ExportedProgram, setting: Setting) -> ExportedProgram:
    """The program as it is exported at the setting's opset."""
    return centre(program).program if setting.opset >= RMS_OPSET else program


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
