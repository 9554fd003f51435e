"""What a choice of widths comes to, and the goal that it has to meet: counted on the graph, or measured in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from pipeline.channels.coupling.groups import Analysis, Cluster, Size
from pipeline.latency.prediction import Fit
from pipeline.latency.sizes import Numbers
from pipeline.recipe.target import Quantity
from pipeline.selection.allocation import Removed

EXACT = 1e-9
"""Shares that differ by less count as equal."""


Counts = Sequence[tuple[Cluster, Sequence[int]]]
"""Clusters, each with counts of groups that it might keep."""


class Cost(Protocol):
    """Something that a model pays for its widths, as a share of what the dense one pays."""

    @property
    def name(self) -> str:
        """In words: "latency (1 thread, batch 1)"."""

    @property
    def quantity(self) -> Quantity:
        """The recipe's word for it."""

    @property
    def goal(self) -> float:
        """The share that is to be left, above 0."""

    @property
    def asked(self) -> float:
        """The goal that this sets to what is counted, or to what a table says before it is corrected."""

    @property
    def unit(self) -> tuple[str, float]:
        """What one is told in, and how many of these the dense model pays: ("ms", 97.0)."""

    def of(self, removed: Removed) -> float:
        """What is left."""

    def along(self, removed: Removed, counts: Counts) -> list[list[float]]:
        """For each cluster of `counts`: what is left when it keeps each of these counts of groups, all else as in
        `removed`.
        """


@dataclass(frozen=True)
class Counted:
    """Multiply-accumulates or parameters of the graph; a file's size goes with the latter."""

    analysis: Analysis
    quantity: Literal["macs", "params", "size"]
    goal: float
    dense: float
    """In the unit's own terms: millions, or megabytes."""
    each: float = 1.0
    """What one that is left costs, of one of the dense model's: of a file's size, a quarter in int8."""

    @property
    def name(self) -> str:
        """In words."""
        return {"macs": "multiply-accumulates", "params": "parameters", "size": "file size"}[self.quantity]

    @property
    def asked(self) -> float:
        """The goal."""
        return self.goal

    @property
    def unit(self) -> tuple[str, float]:
        """What one is told in."""
        return {"macs": "million MACs", "params": "million parameters", "size": "MB"}[self.quantity], self.dense

    def of(self, removed: Removed) -> float:
        """What is left."""
        return self._share(self.analysis.estimate(removed, branches=True))

    def _share(self, size: Size) -> float:
        left, of = (size.macs, self.analysis.macs) if self.quantity == "macs" else (size.params, self.analysis.params)
        return self.each * left / max(of, 1)

    def along(self, removed: Removed, counts: Counts) -> list[list[float]]:
        """What is left, on a straight line through the present width and the one beside it: what one group saves
        hardly depends on the other groups of its cluster.
        """
        pairs = []
        for cluster, kept in counts:
            now = cluster.size - int(removed[cluster.name].sum())
            pairs.append((now, min((n for n in kept if n != now), key=lambda n: abs(n - now), default=now)))
        changes = [{c.name: first_gone(c, to)} for (c, _), (_, to) in zip(counts, pairs, strict=True)]
        here, *left = map(self._share, self.analysis.estimates(removed, [{}, *changes], branches=True))
        found = []
        for (_, kept), (now, beside), there in zip(counts, pairs, left, strict=True):
            each = (here - there) / (now - beside) if beside != now else 0.0
            found.append([here + each * (n - now) for n in kept])
        return found


@dataclass(frozen=True)
class Timed:
    """Latency by a table measured on the runtime. `correction`: what a whole model of this very kind took, over what
    the table said of it.
    """

    fit: Fit
    goal: float
    dense_ms: float
    threads: int
    batch: int
    correction: float = 1.0

    @property
    def quantity(self) -> Quantity:
        """Latency."""
        return "latency"

    @property
    def name(self) -> str:
        """In words."""
        return f"latency ({self.threads} {'thread' if self.threads == 1 else 'threads'}, batch {self.batch})"

    @property
    def asked(self) -> float:
        """The goal by the table alone."""
        return self.goal / self.correction

    @property
    def unit(self) -> tuple[str, float]:
        """Milliseconds."""
        return "ms", self.dense_ms

    def _kept(self, removed: Removed) -> Numbers:
        return self.fit.sizes.kept({name: int((~gone).sum()) for name, gone in removed.items()})

    def of(self, removed: Removed) -> float:
        """What is left."""
        return self.correction * self.fit.of(self._kept(removed))

    def at_any_width(self, removed: Removed) -> float:
        """What of it the session and its operators take however narrow their layers are."""
        return self.correction * self.fit.constant(self._kept(removed))

    def along(self, removed: Removed, counts: Counts) -> list[list[float]]:
        """What is left at each count."""
        numbers = [self.fit.sizes.clusters.index(cluster.name) for cluster, _ in counts]
        kept = [widths for _, widths in counts]
        left = self.fit.along(self._kept(removed), list(zip(numbers, kept, strict=True)))
        return [(self.correction * one).tolist() for one in left]


def first_gone(cluster: Cluster, kept: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Flags of a cluster of which `kept` groups stay; which of them plays no part in what it costs."""
    return np.arange(cluster.size) >= kept


def excess(costs: Sequence[Cost], removed: Removed) -> float:
    """By how much all goals together are missed, each relative to itself; 0 where all are met."""
    return missed(costs, [cost.of(removed) for cost in costs])


def missed(costs: Sequence[Cost], left: Sequence[float]) -> float:
    """`excess` where it is known what is left of each."""
    return sum(max(0.0, over(value, cost.goal)) for value, cost in zip(left, costs, strict=True))


def over(left: float, goal: float) -> float:
    """By how much of itself a goal is missed; below 0 where it is more than met."""
    found = left / goal - 1
    return 0.0 if abs(found) < EXACT else found
