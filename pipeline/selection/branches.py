"""What is lost where a residual branch goes as a whole."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from foundation.errors import first_line
from pipeline.channels.coupling.groups import Analysis
from pipeline.channels.dead.removable import ArrayMasks, Branch
from pipeline.data.parts import evenly
from pipeline.progress import Progress
from pipeline.recovery import closed_form
from pipeline.selection import curves
from pipeline.selection.criteria import Evidence
from pipeline.selection.curves import Apart

FITTED_ON = 256
"""Samples, at the most, that the rest is fitted to where a branch is gone."""
SECONDS = 30.0
"""For fitting what is left of each branch; those for which there is no time count as the others do, in the middle."""


def lost(
    analysis: Analysis,
    branches: Sequence[Branch],
    seen: Evidence,
    apart: Apart | None,
    progress: Progress,
    *,
    refit: bool,
) -> dict[str, float]:
    """Name of a branch's addition -> the divergence (nats) of the outputs on `seen.samples` when the branch is gone.

    With `refit`, what lies behind it is fitted in closed form first, to samples that do not judge it: a curve is
    measured after a fit as well, and without one a branch loses 1.4 to 14 times as much (a BERT of four layers).
    """
    if seen.samples is None:
        return {}
    sets = {one.node: one.masks(analysis.captured.state) for one in branches}
    found = curves.masked(analysis, sets, seen.samples, seen.weights, apart)
    if not refit or seen.others is None:
        return found
    began, parts = time.perf_counter(), []
    waiting = sorted(branches, key=lambda one: found[one.node])  # those that lose little are asked for first
    with progress.bar("branches", len(waiting)) as bar:
        for done, one in enumerate(waiting):
            if done and (time.perf_counter() - began) * (done + 1) / done > SECONDS:  # the next takes as long as these
                break
            try:
                after = _fitted(analysis, sets[one.node], seen, apart)
            except ValueError as error:  # too few samples, or a graph that cannot be run node by node
                progress.say(f"  branches are weighed without a fit: {first_line(error)}")
                return found
            parts.append(min(1.0, after / max(found[one.node], 1e-12)))
            bar(done + 1, one.name)
    parts += [float(np.median(parts))] * (len(waiting) - len(parts))
    return {one.node: found[one.node] * part for one, part in zip(waiting, parts, strict=True)}


def lost_with(analysis: Analysis, masks: ArrayMasks, seen: Evidence, apart: Apart | None, *, refit: bool) -> float:
    """The divergence (nats) of the outputs on `seen.samples` with these masks on; with `refit`, once the rest was
    fitted to other samples.
    """
    assert seen.samples is not None
    plain = curves.masked(analysis, {"": masks}, seen.samples, seen.weights, apart)[""]
    if not refit or seen.others is None:
        return plain
    try:
        return min(plain, _fitted(analysis, masks, seen, apart))
    except ValueError:  # which `lost` has told
        return plain


def _fitted(analysis: Analysis, masks: ArrayMasks, seen: Evidence, apart: Apart | None) -> float:
    """The divergence of the outputs with these masks on, once the rest was fitted. Raises ValueError for a graph that
    cannot be run node by node, or too few samples.
    """
    assert seen.samples is not None and seen.others is not None
    captured = analysis.captured.with_state(seen.weights)
    inputs = [one[evenly(len(one), FITTED_ON)] for one in seen.others]
    made = closed_form.recover(captured, {name: torch.from_numpy(mask) for name, mask in masks.items()}, inputs)
    changed = {n: v for n, v in made.state.items() if not torch.equal(v, captured.state[n])}
    return curves.masked(analysis, {"": masks}, seen.samples, seen.weights, apart, changed)[""]
