"""What any choice of widths takes, by the costs that were found for each kind of operator."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.latency.matching import Flags, Where, WithBranch
from pipeline.latency.sizes import Numbers, Sizes, Slot
from pipeline.latency.work import work

BENDING = 1.5
"""Power of the term by which a whole model takes longer than its operators say. Of a ResNet-50 at 32x32, models left
out were 6 % off without it and 3 % with it, 3.7 % with a power of 2; of a MobileNetV2 and a DeiT-tiny 5 and 7 % always.
"""

Key = tuple[Hashable, int | None]
"""Of costs: the kind of work, and the number of the operator where others of its kind do not share them."""
Sides = tuple[tuple[Slot, ...], ...]
"""Of an operator's tensors on one side: what each dimension follows."""


@dataclass(frozen=True)
class Placed:
    """Operators that are alike in what their sizes follow, and in `where` they are: their own factors on what their
    kind costs, added up.
    """

    kind: str
    inputs: Sides
    outputs: Sides
    where: Where
    branch: WithBranch
    column: int | None
    """Number of the operator, where its costs are its own."""
    factor: float

    @cached_property
    def _sized(self) -> list[int]:
        """The program's dimensions that their sizes follow."""
        return sorted(
            {s.of for side in (self.inputs, self.outputs) for shape in side for s in shape if s.of is not None}
        )

    @cached_property
    def follows(self) -> list[int]:
        """The program's dimensions that their sizes, or their being there, follow."""
        own = set() if self.branch.of is None else {self.branch.of}
        return sorted({*self._sized, *own})

    def at(self, dimensions: Numbers, whole: Flags, terms: Mapping[Key, Numbers], block: int) -> Numbers:
        """What it takes at each choice, of which these are the program's `dimensions` (choices, dimensions) and the
        clusters that are `whole` (choices, clusters): (choices, 2), its constant and what grows with its sizes. A file
        has nothing of a branch that goes as a whole, whose sizes are zero: it does not even cost its constant.
        """
        sides = self.inputs, self.outputs
        inputs, outputs = ([[s.at(dimensions) for s in shape] for shape in side] for side in sides)
        found = work(self.kind, inputs, outputs, block)
        cost = terms.get((found.key, self.column))
        took = np.zeros((len(dimensions), 2))
        if cost is None:
            return took
        constant, *growing = (c * v for c, v in zip(cost, found.terms, strict=True))
        took[:, 0], took[:, 1] = constant, sum(growing)
        there = (dimensions[:, self._sized] > 0).all(axis=1)
        made: Numbers = (there & self.where.at(whole) & self.branch.at(dimensions))[:, None] * (self.factor * took)
        return made


@dataclass(frozen=True)
class Fit:
    """Predicts a model's time of the dense model's. `error`: of the log of a ratio, a standard deviation, from the mean
    error of models left out of the fit one after another, which `checked` lists as (predicted, measured). `scale`: of
    the terms that are `grown` from what the operators take together, with this `knee`.
    """

    sizes: Sizes
    placed: tuple[Placed, ...]
    terms: Mapping[Key, Numbers]
    block: int
    scale: tuple[float, float, float, float]
    knee: float | None = None
    error: float = 0.0
    checked: tuple[tuple[float, float], ...] = field(default=(), repr=False)

    def ratio(self, kept: Numbers) -> Numbers:
        """(choices, clusters) groups kept -> (choices,) time of the dense model's."""
        return self.scaled(self.total(kept))

    def of(self, kept: Numbers) -> float:
        """(clusters,) groups kept -> time of the dense model's: `ratio` of one choice. An operator that is asked again
        for the sizes that it had is not worked out again: a choice is mostly one of many that differ in a layer.
        """
        return float(self.scaled(self._each(kept).sum(axis=0, keepdims=True))[0])

    def constant(self, kept: Numbers) -> float:
        """(clusters,) groups kept -> what of the model's time, of the dense model's, does not go with sizes: that of
        the session itself and of running each of its operators at all.
        """
        return self.scale[0] + self.scale[1] * float(self._each(kept)[:, 0].sum())

    def along(self, kept: Numbers, counts: Sequence[tuple[int, Sequence[int]]]) -> list[Numbers]:
        """(clusters,) groups kept -> for each (number of a cluster, counts of groups) the time of the dense model's
        when that cluster keeps so many, and all else is as in `kept`: `ratio` of these, for which an operator is worked
        out for the clusters alone that it follows.
        """
        of = np.repeat([number for number, _ in counts], [len(each) for _, each in counts]).astype(int)
        values = np.array([n for _, each in counts for n in each], float)
        dimensions = self.sizes.at(kept[None]) + (values - kept[of])[:, None] * self.sizes.each.T[of]
        whole = np.repeat((kept == self.sizes.whole)[None], len(of), axis=0)
        whole[np.arange(len(of)), of] = values == self.sizes.whole[of]
        here = self._each(kept)
        total = np.tile(here.sum(axis=0), (len(of), 1))
        for one, clusters, now in zip(self.placed, self._clusters, here, strict=True):
            at = np.flatnonzero(clusters[of])
            if at.size:
                total[at] += one.at(dimensions[at], whole[at], self.terms, self.block) - now
        return np.split(self.scaled(total), np.cumsum([len(each) for _, each in counts]))[: len(counts)]

    def scaled(self, total: Numbers) -> Numbers:
        """(choices, 2) what the operators take together, as from `total` -> (choices,) time of the dense model's."""
        made: Numbers = grown(total, self.knee) @ np.array(self.scale)
        return made

    def total(self, kept: Numbers) -> Numbers:
        """(choices, clusters) groups kept -> (choices, 2) what the operators of each choice take together: their
        constants, and what grows with their sizes.
        """
        dimensions, whole = self.sizes.at(kept), kept == self.sizes.whole
        nothing = np.zeros((len(kept), 2))
        return sum((one.at(dimensions, whole, self.terms, self.block) for one in self.placed), nothing)

    def _each(self, kept: Numbers) -> Numbers:
        """(clusters,) groups kept of one choice -> (operators, 2) what each takes: its constant, and what grows."""
        dimensions, whole = self.sizes.at(kept[None]), (kept == self.sizes.whole)[None]
        sizes, flags = dimensions[0].tolist(), whole[0].tolist()
        found = np.empty((len(self.placed), 2))
        for number, one in enumerate(self.placed):
            key = number, one.where.of is None or flags[one.where.of], *[sizes[d] for d in one.follows]
            took = self._known.get(key)
            if took is None:
                took = self._known[key] = one.at(dimensions, whole, self.terms, self.block)[0]
            found[number] = took
        return found

    @cached_property
    def _known(self) -> dict[tuple[Any, ...], Numbers]:
        """(number of an operator, whether the cluster that decides on it is whole, sizes that it follows) -> (2,)."""
        return {}

    @cached_property
    def _clusters(self) -> list[Flags]:
        """Of each operator: which clusters what it takes depends on."""
        made = []
        for one in self.placed:
            depends = (self.sizes.each[one.follows] != 0).any(axis=0)
            if one.where.of is not None:
                depends[one.where.of] = True
            made.append(depends)
        return made


def grown(total: Numbers, knee: float | None) -> Numbers:
    """Terms that a whole model's time is a sum of, (choices, 4), given what its operators take together, (choices, 2):
    the session's own time, the operators' constants, what grows with their sizes, and more the larger the model is,
    whose tensors push each other out of the caches. Operators do not say well how their time divides into constants and
    the rest: what writing down costs looks like a constant, and where a small model fits into the caches, what grows
    takes less.

    With a `knee` the last sets in between two sizes: a model of so much still finds its weights in the caches, one of
    twice as much reads all of them from memory again. With an infinite one it never does.
    """
    constant, growing = total.T
    both = constant + growing
    more = both**BENDING if knee is None else growing * np.clip(both / knee - 1, 0, 1)
    return np.stack([np.ones_like(both), constant, growing, more], axis=1)
