"""From scores to a choice: how many groups of each layer go, and which."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np
import numpy.typing as npt

from foundation.errors import ConfigError, nearest
from pipeline.channels.coupling.counts import counts, step_of
from pipeline.channels.coupling.groups import Cluster
from pipeline.selection.criteria import Scores, relative

Removed = dict[str, npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class Budget:
    """What to remove.

    ratio: share of groups that goes, in [0, 1). scope: inside every layer, or over the whole model by relative score.
    align: kept channels of a layer are a multiple of this, wherever the layer is that wide. floor: share of a layer's
    groups that always stays. overrides: layer glob -> ratio, the last match wins; those layers are cut per layer.
    """

    ratio: float
    scope: Literal["layer", "global"] = "layer"
    align: int = 1
    floor: float = 0.0
    overrides: Mapping[str, float] = field(default_factory=dict)


def allocate(clusters: Sequence[Cluster], scores: Mapping[str, Scores], budget: Budget) -> Removed:
    """Cluster name -> bool array of shape (cluster.size,), True = goes: the lowest scores of each cluster.

    Every cluster keeps at least one group. Raises ConfigError when an override matches no layer.
    """
    fixed = overridden([c.name for c in clusters], budget.overrides)
    free = [c for c in clusters if c.name not in fixed]
    wanted = {c.name: c.size * (1.0 - fixed.get(c.name, budget.ratio)) for c in clusters}
    if budget.scope == "global" and free:
        wanted |= _global_counts(free, scores, budget.ratio)
    return {c.name: lowest(scores[c.name], c.size - _kept(c, wanted[c.name], budget)) for c in clusters}


def aligned_count(wanted: float, size: int, step: int) -> int:
    """The multiple of `step` nearest to `wanted` (up when halfway), at least `step` and at most `size`.

    A layer that `step` does not fit into, or whose count would not shrink by it, keeps the plainly rounded count.
    """
    if step <= 1 or size <= step:
        return min(size, max(1, math.floor(wanted + 0.5)))
    return min(size, max(step, step * math.floor(wanted / step + 0.5)))


def widths_allowed(cluster: Cluster, budget: Budget) -> list[int]:
    """The counts of groups that may stay, from all of them down: aligned as `allocate` does, never below the floor. Of
    a layer no wider than the alignment, multiples of a quarter of that.
    """
    least = max(1, math.ceil(cluster.size * budget.floor))
    return [n for n in reversed(counts(cluster, budget.align)) if n >= least]


def _kept(cluster: Cluster, wanted: float, budget: Budget) -> int:
    if wanted >= cluster.size:
        return cluster.size
    least = max(1, math.ceil(cluster.size * budget.floor))
    return max(least, aligned_count(wanted, cluster.size, step_of(cluster, budget.align)))


def _global_counts(free: Sequence[Cluster], scores: Mapping[str, Scores], ratio: float) -> dict[str, float]:
    """How many groups of each cluster are above the model-wide threshold of relative score."""
    every = np.concatenate([relative(scores[c.name]) for c in free])
    cut = round(len(every) * ratio)
    threshold = np.partition(every, cut)[cut] if cut < len(every) else math.inf
    return {c.name: float((relative(scores[c.name]) >= threshold).sum()) for c in free}


def lowest(scores: Scores, count: int) -> npt.NDArray[np.bool_]:
    """True for the `count` lowest scores; among equals the first."""
    removed = np.zeros(len(scores), dtype=bool)
    removed[np.argsort(scores, kind="stable")[:count]] = True
    return removed


def overridden(names: Sequence[str], overrides: Mapping[str, float]) -> dict[str, float]:
    """Name of a layer -> the ratio that the last matching glob gives it. Raises ConfigError where one matches none."""
    for glob in overrides:
        if not any(fnmatchcase(name, glob) for name in names):
            hint = nearest(glob, names) or f"Layers are named like {', '.join(names[:3])}; see `leanort plan MODEL`."
            raise ConfigError(f"prune.overrides: no layer matches {glob!r}.", hint)
    chosen: dict[str, float] = {}
    for glob, ratio in overrides.items():
        chosen |= {name: ratio for name in names if fnmatchcase(name, glob)}
    return chosen
