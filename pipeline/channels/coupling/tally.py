"""The size that many choices leave, counted without a walk over the graph for each.

A node's multiplications and a parameter's elements hang on few clusters, so each is counted once for every choice
within these, and looked up from then on.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import fx

from pipeline.channels.operators.values import Atoms, Flags
from pipeline.channels.program.macs import node_macs

if TYPE_CHECKING:
    from pipeline.channels.coupling.groups import Analysis

Choice = Mapping[str, Flags]
Counts = tuple[int, int]
"""Parameters, and multiply-accumulates of the whole batch."""
KNOWN = 1 << 12
"""Choices that one part remembers, before it forgets them all."""


@dataclass(eq=False)
class Part:
    """A parameter, or a node that multiplies. `clusters`: those that its size hangs on; `classes`: by dimension, those
    of its indices; `size`: what is left once so many indices of each dimension are gone; `known`: that, by choices.
    """

    clusters: tuple[str, ...]
    classes: tuple[Atoms, ...]
    size: Callable[[Sequence[int]], Counts]
    known: dict[tuple[bytes, ...], Counts] = field(default_factory=dict)


class Tally:
    """Counts as `Analysis.size_without` does, where `exact`; elsewhere parts do not stand alone."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self._names = [c.name for c in analysis.clusters]
        self._owners = np.full(analysis.solution.reason_of.shape[0], -1)
        for number, name in enumerate(self._names):
            self._owners[analysis.members[name]] = number
        self._classes = np.zeros(len(self._owners), np.bool_)
        every = [*self._parameters(), *self._nodes()]
        self.parts = [part for part in every if part.clusters]
        self._fixed = [part.size([0] * len(part.classes)) for part in every if not part.clusters]
        self._of: dict[str, list[Part]] = {name: [] for name in self._names}
        for part in self.parts:
            for name in part.clusters:
                self._of[name].append(part)
        self._last: tuple[dict[str, bytes], dict[Part, Counts]] = {}, {}
        # Not where a computation is done once, nor where a dimension may be left with nothing.
        self.exact = not analysis.trace.frozen and not any(map(self._may_be_empty, analysis.dimensions))

    def beside(self, choice: Choice, changes: Sequence[Choice]) -> list[Counts]:
        """(parameters, multiply-accumulates per sample) of `choice` with each of `changes` in turn: cluster -> True =
        goes, of a whole one all.
        """
        tokens = {name: flags.tobytes() for name, flags in choice.items()}
        before, here = self._last  # choices that follow each other are alike
        changed = [name for name in self._names if tokens.get(name) != before.get(name)]
        parts = [part for name in changed for part in self._of[name]] if here else self.parts
        here |= {part: self._look_up(part, choice, tokens) for part in parts}
        self._last = tokens, here
        params, macs = (sum(own) for own in zip((0, 0), *self._fixed, *here.values(), strict=True))
        found = []
        for change in changes:
            new, marks = {**choice, **change}, {**tokens, **{name: own.tobytes() for name, own in change.items()}}
            more = [(0, 0)]
            for part in dict.fromkeys(part for name in change for part in self._of[name]):
                (a, b), (c, d) = self._look_up(part, new, marks), here[part]
                more.append((a - c, b - d))
            further = [sum(own) for own in zip(*more, strict=True)]
            found.append((params + further[0], (macs + further[1]) // self.analysis.batch))
        return found

    def _look_up(self, part: Part, choice: Choice, tokens: Mapping[str, bytes]) -> Counts:
        key = tuple([tokens.get(name, b"") for name in part.clusters])
        found = part.known.get(key)
        if found is None:
            if len(part.known) >= KNOWN:
                part.known.clear()
            found = part.known[key] = self._count(part, {n: choice[n] for n in part.clusters if n in choice})
        return found

    def _count(self, part: Part, choice: Choice) -> Counts:
        """What is left of a part."""
        members = self.analysis.members
        for name, flags in choice.items():
            self._classes[members[name]] = flags
        gone = [int(np.count_nonzero(self._classes[classes])) for classes in part.classes]
        for name in choice:
            self._classes[members[name]] = False
        return part.size(gone)

    def _parameters(self) -> Iterator[Part]:
        slots = defaultdict(list)
        for slot in self.analysis.slots:
            slots[slot.name].append(slot)
        for name in self.analysis.parameter_names:
            shape = self.analysis.captured.state[name].shape

            def size(gone: Sequence[int], shape: Sequence[int] = shape, name: str = name) -> Counts:
                left = list(shape)
                for slot, number in zip(slots[name], gone, strict=True):
                    left[slot.dim] -= number
                return math.prod(left), 0

            yield self._part([slot.atoms for slot in slots[name]], size)

    def _nodes(self) -> Iterator[Part]:
        trace = self.analysis.trace
        for node in self.analysis.counted:
            read: dict[int, Atoms] = {}

            def whole(source: fx.Node, read: dict[int, Atoms] = read) -> tuple[int, ...]:
                return trace.left_of(source, lambda atoms: len(read.setdefault(id(atoms), atoms)))

            node_macs(node, whole)

            def size(gone: Sequence[int], node: fx.Node = node, read: dict[int, Atoms] = read) -> Counts:
                left = {key: len(atoms) - number for (key, atoms), number in zip(read.items(), gone, strict=True)}
                return 0, node_macs(node, lambda source: trace.left_of(source, lambda atoms: left[id(atoms)]))

            yield self._part(list(read.values()), size)

    def _part(self, atoms: Sequence[Atoms], size: Callable[[Sequence[int]], Counts]) -> Part:
        classes = tuple(self.analysis.solution.class_of[own] for own in atoms)
        owners = {int(owner) for own in classes for owner in np.unique(self._owners[own])}
        return Part(tuple(self._names[owner] for owner in sorted(owners - {-1})), classes, size)

    def _may_be_empty(self, atoms: Atoms) -> bool:
        """Whether a choice that leaves a group of every cluster could leave nothing of a dimension."""
        owners = self._owners[np.unique(self.analysis.solution.class_of[atoms])]
        if (owners < 0).any():
            return False
        counts = np.bincount(owners, minlength=len(self._names))
        return not any(n == cluster.size for n, cluster in zip(counts, self.analysis.clusters, strict=True))
