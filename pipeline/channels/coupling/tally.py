"""The size that many choices leave, counted without a walk over the graph for each.

A node's multiplications and a parameter's elements hang on few clusters, so each is counted once for every choice
within these, and looked up from then on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from torch import fx

from pipeline.channels.operators.values import Atoms, Value
from pipeline.channels.program.macs import node_macs

if TYPE_CHECKING:
    from pipeline.channels.coupling.groups import Analysis

Flags = npt.NDArray[np.bool_]
Choice = Mapping[str, Flags]
KNOWN = 1 << 12
"""Choices that one part remembers, before it forgets them all."""


@dataclass
class Part:
    """A parameter, or a node that multiplies: `clusters` are those its size hangs on, `classes` those of each of its
    dimensions, `known` what it is by their choices, (parameters, multiply-accumulates of the whole batch).
    """

    source: str | fx.Node
    clusters: tuple[str, ...]
    atoms: tuple[Atoms, ...]
    classes: tuple[npt.NDArray[np.integer], ...]
    known: dict[tuple[bytes, ...], tuple[int, int]] = field(default_factory=dict)


class Tally:
    """Counts as `Analysis.size_without` does; None from `sizes` where only that can tell."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        owners = np.full(analysis.solution.reason_of.shape[0], -1)
        self._names = [c.name for c in analysis.clusters]
        self._sizes = {c.name: c.size for c in analysis.clusters}
        for number, name in enumerate(self._names):
            owners[analysis.members[name]] = number
        self._owners = owners
        self._classes = np.zeros(len(owners), np.bool_)
        self._slots = [(slot.name, slot.dim, slot.atoms) for slot in analysis.slots]
        self.parts = [*self._parameters(), *self._nodes()]
        self.parts = [part for part in self.parts if part.clusters]
        self._of: dict[str, list[Part]] = {name: [] for name in self._names}
        for part in self.parts:
            for name in part.clusters:
                self._of[name].append(part)
        self._last: tuple[dict[str, bytes], dict[int, tuple[int, int]]] = {}, {}
        whole = [self._count(part, {}) for part in self.parts]
        self._fixed = (
            analysis.params - sum(params for params, _ in whole),
            sum(node_macs(node, self._shape) for node in analysis.counted) - sum(macs for _, macs in whole),
        )
        # Where a computation is done once, or a dimension may be left with nothing, a part does not stand alone.
        self.exact = not analysis.trace.frozen and not any(map(self._may_be_empty, analysis.dimensions))

    def size(self, choice: Choice) -> tuple[int, int]:
        """(parameters, multiply-accumulates per sample) of `choice`: cluster -> True = goes, of a whole one all."""
        return self.beside(choice, [{}])[0]

    def beside(self, choice: Choice, changes: Sequence[Choice]) -> list[tuple[int, int]]:
        """`size` of `choice` with each of `changes` in turn."""
        tokens = {name: flags.tobytes() for name, flags in choice.items()}
        before, here = self._last  # choices that follow each other are alike
        changed = {name for name in self._names if tokens.get(name) != before.get(name)}
        parts = [part for name in changed for part in self._of[name]] if here else self.parts
        here |= {id(part): self._look_up(part, choice, tokens) for part in parts}
        self._last = tokens, here
        params, macs = self._fixed
        params, macs = params + sum(p for p, _ in here.values()), macs + sum(m for _, m in here.values())
        found = []
        for change in changes:
            new = {**choice, **change}
            marks = {**tokens, **{name: flags.tobytes() for name, flags in change.items()}}
            more = less = 0
            for part in {id(part): part for name in change for part in self._of[name]}.values():
                (a, b), (c, d) = self._look_up(part, new, marks), here[id(part)]
                more, less = more + a - c, less + b - d
            found.append((params + more, (macs + less) // self.analysis.batch))
        return found

    def _look_up(self, part: Part, choice: Choice, tokens: Mapping[str, bytes]) -> tuple[int, int]:
        key = tuple([tokens.get(name, b"") for name in part.clusters])
        found = part.known.get(key)
        if found is None:
            if len(part.known) >= KNOWN:
                part.known.clear()
            found = part.known[key] = self._count(part, {n: choice[n] for n in part.clusters if n in choice})
        return found

    def _count(self, part: Part, choice: Choice) -> tuple[int, int]:
        """What is left of a part."""
        analysis = self.analysis
        for name, flags in choice.items():
            self._classes[analysis.members[name]] = flags
        gone = [int(np.count_nonzero(self._classes[classes])) for classes in part.classes]
        for name in choice:
            self._classes[analysis.members[name]] = False
        if isinstance(part.source, str):
            shape = list(analysis.captured.state[part.source].shape)
            dims = [dim for name, dim, _ in self._slots if name == part.source]
            for dim, number in zip(dims, gone, strict=True):
                shape[dim] -= number
            return math.prod(shape), 0
        left = {id(atoms): len(atoms) - number for atoms, number in zip(part.atoms, gone, strict=True)}

        def shape_of(node: fx.Node) -> tuple[int, ...]:
            value = analysis.trace.values.get(node)
            if not isinstance(value, Value):
                return analysis.trace.shape(node)
            return tuple(n if a is None else left[id(a)] for a, n in zip(value.atoms, value.shape, strict=True))

        return 0, node_macs(part.source, shape_of)

    def _parameters(self) -> Iterable[Part]:
        for name in self.analysis.parameter_names:
            atoms = tuple(own for slot, _, own in self._slots if slot == name)
            yield self._part(name, atoms)

    def _nodes(self) -> Iterable[Part]:
        for node in self.analysis.counted:
            read: dict[int, Atoms] = {}

            def shape(source: fx.Node, read: dict[int, Atoms] = read) -> tuple[int, ...]:
                value = self.analysis.trace.values.get(source)
                if isinstance(value, Value):
                    read.update({id(atoms): atoms for atoms in value.atoms if atoms is not None})
                return self._shape(source)

            node_macs(node, shape)
            yield self._part(node, tuple(read.values()))

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        value = self.analysis.trace.values.get(node)
        return tuple(value.shape) if isinstance(value, Value) else self.analysis.trace.shape(node)

    def _part(self, source: str | fx.Node, atoms: tuple[Atoms, ...]) -> Part:
        classes = tuple(self.analysis.solution.class_of[own] for own in atoms)
        owners = {int(owner) for own in classes for owner in np.unique(self._owners[own])}
        return Part(source, tuple(self._names[owner] for owner in sorted(owners - {-1})), atoms, classes)

    def _may_be_empty(self, atoms: Atoms) -> bool:
        """Whether a choice that leaves a group of every cluster could leave nothing of a dimension."""
        classes = np.unique(self.analysis.solution.class_of[atoms])
        owners = self._owners[classes]
        if (owners < 0).any():
            return False
        counts = np.bincount(owners, minlength=len(self._names))
        return not any(counts[o] == self._sizes[self._names[o]] for o in set(owners.tolist()))
