"""Every dimension of a program as a linear function of how many groups each cluster keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.channels.coupling.groups import Analysis

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sizes:
    """The different dimensions of a program. `whole[c]`: groups of cluster c; `base[d]`: dimension d of the dense
    program; `each[d, c]`: how many of its indices go with a group of cluster c.
    """

    clusters: tuple[str, ...]
    whole: Numbers
    base: Numbers
    each: Numbers

    def kept(self, counts: Mapping[str, int]) -> Numbers:
        """One row (clusters,): how many groups stay, all of those that `counts` does not name."""
        return np.array([counts.get(name, n) for name, n in zip(self.clusters, self.whole, strict=True)], float)

    def at(self, kept: Numbers) -> Numbers:
        """(choices, clusters) groups that stay -> (choices, dimensions) indices that are left."""
        return self.base - (self.whole - kept) @ self.each.T


def sizes_of(analysis: Analysis) -> Sizes:
    """The dimensions of an analysed program that can change, each different one once."""
    clusters = tuple(c.name for c in analysis.clusters)
    whole = np.array([c.size for c in analysis.clusters], float)
    owner = np.full(analysis.solution.reason_of.shape[0], len(clusters))
    for number, name in enumerate(clusters):
        owner[analysis.members[name]] = number
    rows: dict[tuple[float, ...], None] = {}
    for atoms in analysis.dimensions:
        counts = np.bincount(owner[analysis.solution.class_of[atoms]], minlength=len(clusters) + 1)
        if counts[:-1].any():
            each = counts[:-1] / np.maximum(whole, 1)
            rows[float(atoms.shape[0]), *each.tolist()] = None
    table = np.array(list(rows), float).reshape(len(rows), len(clusters) + 1)
    return Sizes(clusters, whole, table[:, 0], table[:, 1:])


@dataclass(frozen=True)
class Slot:
    """One dimension of one operator's tensor: `factor` times the program's dimension number `of`, rounded up to a
    multiple of `step` as the runtime's blocked layouts do, where it is a multiple of `unit`, else as it is; `of` None:
    always `factor`.
    """

    of: int | None
    factor: float
    step: int = 1
    unit: int = 1

    def at(self, dimensions: Numbers) -> Any:
        """(choices, dimensions) -> (choices,), or one number."""
        if self.of is None:
            return self.factor
        value = self.factor * dimensions[:, self.of]
        return value if self.step == 1 else _rounded(value, self.step, self.unit)


def _rounded(values: Numbers, step: int, unit: int) -> Numbers:
    made: Numbers = np.where(values % unit == 0, np.ceil(values / step) * step, values)
    return made


STEPS = (4, 8, 16, 32)
UNITS = (1, 4)
"""A tensor of channels that are no multiple of 4 stays in the plain layout: of ShuffleNet's layers on AVX-512 those of
45, 58 and 222 channels did, and those of 24, 28 and 60 became 32, 32 and 64.
"""
MOSTLY = 0.6
"""Share of the models whose sizes a rounded dimension has to say, to be the one."""


def slot(seen: Sequence[int], dimensions: Numbers) -> Slot:
    """What a size follows that was `seen` in each measured model, whose program had `dimensions` (models, sizes).

    Exactly, where one of them says it, times a number or rounded up to a block, in most of the models: in some, an
    operator may be taken for its neighbour. Else the one that comes nearest.
    """
    values = np.asarray(seen, float)
    if (values == values[0]).all() or not dimensions.shape[1]:
        return Slot(None, float(values[0]))
    ratio = values[:, None] / np.maximum(dimensions, 1e-9)
    exact = np.flatnonzero(np.abs(ratio / ratio[0] - 1).max(axis=0) < 1e-9)
    if exact.size:
        best = exact[np.argmin(np.abs(np.log(ratio[0, exact])))]
        return Slot(int(best), float(ratio[0, best]))
    found: list[tuple[float, Slot]] = []
    for unit in UNITS:
        for step in STEPS:
            same = (_rounded(dimensions, step, unit) == values[:, None]).mean(axis=0)
            found.append((float(same.max()), Slot(int(same.argmax()), 1.0, step, unit)))
    share, likely = max(found, key=lambda one: one[0])  # the first of equals
    if share >= MOSTLY:
        return likely
    factor = (values[:, None] * dimensions).sum(axis=0) / (dimensions**2).sum(axis=0)
    best = int(np.argmin(((factor * dimensions - values[:, None]) ** 2).sum(axis=0)))
    return Slot(best, float(factor[best]))
