"""Channel groups of a model: what can go, what is blocked, what a choice would leave."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import fx

from foundation.errors import UserError, nearest
from pipeline.channels.coupling.frozen import frozen_part, still_used
from pipeline.channels.coupling.solve import Solution
from pipeline.channels.coupling.tally import Tally
from pipeline.channels.coupling.walk import Slot
from pipeline.channels.operators.trace import Policy, Trace
from pipeline.channels.operators.values import Atoms, Flags, Value
from pipeline.channels.program.capture import Captured
from pipeline.channels.program.macs import node_macs

Kind = Literal["channel", "neuron", "head", "head_position", "residual"]
Removed = Mapping[str, npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class Cluster:
    """A layer's width: groups that tie the same set of parameter dimensions.

    `name`: the leading producer's module ("layer3.1.conv2"), unique within the analysis. `size`: number of groups, the
    units that go or stay. `unit`: indices that one group holds in its leading producer (a head: its size; a
    channel: 1).
    `labels[(parameter, dim)]`: for every index of that dimension its group 0..size−1, or −1 = not of this cluster.
    `producers` write the channel (rows, biases, norm scale and shift), `readers` read it (columns).
    """

    name: str
    kind: Kind
    size: int
    unit: int
    labels: Mapping[tuple[str, int], npt.NDArray[np.int64]]
    producers: tuple[tuple[str, int], ...]
    readers: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Blocked:
    """Parameters that have to stay: because of `node` (an `op`), for `reason`."""

    op: str
    node: str
    reason: str
    params: int


@dataclass(frozen=True)
class Size:
    """Parameters, and multiply-accumulates per sample."""

    params: int
    macs: int


@dataclass(frozen=True)
class Analysis:
    """What can go from a captured model, and what ties it. `params`: total; `macs`: per sample.

    `removable_share`: the part of all parameter elements that lie in at least one removable slice, 0..1.
    """

    clusters: tuple[Cluster, ...]
    blocked: tuple[Blocked, ...]
    params: int
    macs: int
    removable_share: float
    captured: Captured
    policy: Policy
    trace: Trace
    slots: tuple[Slot, ...]
    solution: Solution
    members: Mapping[str, Atoms]  # cluster name -> class of each group
    parameter_names: tuple[str, ...]  # each parameter tensor that evaluation uses, once (tied names counted once)
    dimensions: tuple[Atoms, ...]  # the labelled dimensions of all tensors, each once
    counted: tuple[fx.Node, ...]  # the nodes whose multiplications are counted
    batch: int  # of the example

    def cluster(self, name: str) -> Cluster:
        """The cluster called `name`. Raises UserError naming the nearest ones."""
        if name not in self._by_name:
            raise UserError(f"There is no cluster '{name}'.", nearest(name, self._by_name))
        return self._by_name[name]

    @functools.cached_property
    def _by_name(self) -> dict[str, Cluster]:
        return {c.name: c for c in self.clusters}

    def gone(self, removed: Removed) -> Flags:
        """Atom -> True = goes, for `removed` (cluster name -> bool array, True = goes).

        One group of every cluster, and one index of every tensor dimension, stays whatever was asked.
        """
        classes = np.zeros(self.solution.reason_of.shape[0], np.bool_)
        for name, flags in self._stays(removed, branches=False).items():
            classes[self.members[name][flags]] = True
        gone: Flags = classes[self.solution.class_of]
        for atoms in self.dimensions:  # no tensor may become empty (half of a chunk, one input of a concatenation)
            if gone[atoms].all():
                classes[self.solution.class_of[atoms[0]]] = False
                gone = classes[self.solution.class_of]
        return gone

    def masks(self, removed: Removed) -> dict[str, npt.NDArray[np.bool_]]:
        """Parameter name -> bool array of its shape, False in every slice of a removed group, producers and
        readers both.

        Names of tensors that lose nothing are absent. A buffer that adds to the stream (a fixed position
        table) is masked like a parameter; running statistics are not.
        """
        gone = self.gone(removed)
        kept: dict[str, list[npt.NDArray[np.bool_]]] = {}
        for slot in self.slots:
            going = gone[slot.atoms]
            if slot.masked and going.any():
                rank = self.captured.state[slot.name].dim()
                kept.setdefault(slot.name, []).append((~going).reshape(-1, *[1] * (rank - 1 - slot.dim)))
        masks: dict[str, npt.NDArray[np.bool_]] = {}
        for name, flags in kept.items():
            mask = functools.reduce(np.logical_and, flags)
            shape = tuple(self.captured.state[name].shape)
            masks[name] = mask if mask.shape == shape else np.array(np.broadcast_to(mask, shape))
        return masks

    @property
    def removable_macs_share(self) -> float:
        """The part of all multiply-accumulates that are gone once every group is that may go, 0..1."""
        classes = np.zeros(self.solution.reason_of.shape[0], np.bool_)
        for members in self.members.values():
            classes[members] = True
        return 1.0 - self.size_without(classes[self.solution.class_of]).macs / max(self.macs, 1)

    def why_kept(self, classes: Atoms) -> str:
        """Why indices of these classes have to stay: the most frequent reason, with its operator and node."""
        op, node, reason = self.solution.why(classes)
        return reason if op == "-" else f"{reason} ({op} at {node})"

    def estimate(self, removed: Removed, *, branches: bool = False) -> Size:
        """The exact size after the removal, without removing.

        With `branches`, a cluster of which every group goes lies inside a branch that goes as a whole, and nothing is
        left of it; else one of its groups stays, as everywhere.
        """
        return self.estimates(removed, [{}], branches=branches)[0]

    def estimates(self, removed: Removed, changes: Sequence[Removed], *, branches: bool = False) -> list[Size]:
        """`estimate` of `removed` with each of `changes` in turn."""
        if self._tally.exact:
            choice, *others = (self._stays(one, branches) for one in (removed, *changes))
            return [Size(params, macs) for params, macs in self._tally.beside(choice, others)]
        return [self._estimate({**removed, **change}, branches) for change in changes]

    @functools.cached_property
    def _tally(self) -> Tally:
        return Tally(self)

    def _stays(self, removed: Removed, branches: bool) -> dict[str, Flags]:
        """`removed` with one group of every cluster left but, with `branches`, of those that go as a whole."""
        made: dict[str, Flags] = {}
        for name, going in removed.items():
            size, flags = self.cluster(name).size, np.asarray(going, dtype=np.bool_)
            if flags.shape != (size,):
                raise UserError(
                    f"Cluster '{name}' has {size} groups, the choice names {flags.shape}.",
                    "Give one flag per group, True = goes.",
                )
            if flags.all() and not branches:
                flags = flags.copy()
                flags[0] = False
            made[name] = flags
        return made

    def _estimate(self, removed: Removed, branches: bool) -> Size:
        gone = self.gone(removed)
        for name, flags in removed.items() if branches else ():
            if len(flags) and np.asarray(flags).all():
                gone = gone | np.isin(self.solution.class_of, self.members[name])
        return self.size_without(gone)

    def size_without(self, gone: Flags) -> Size:
        """Parameters and multiply-accumulates per sample once the atoms flagged in `gone` are away."""
        left: dict[str, list[int]] = {}
        for slot in self.slots:
            going = int(gone[slot.atoms].sum())
            if going:
                left.setdefault(slot.name, list(self.captured.state[slot.name].shape))[slot.dim] -= going
        params = sum(math.prod(left.get(n, self.captured.state[n].shape)) for n in self.parameter_names)
        difference, once = self._frozen_difference(gone, left)
        params += difference
        counts: dict[int, int] = {}

        def kept(atoms: Atoms) -> int:
            key = id(atoms)
            if key not in counts:
                counts[key] = int(atoms.shape[0] - gone[atoms].sum())
            return counts[key]

        def shape(node: fx.Node) -> tuple[int, ...]:
            return self.trace.left_of(node, kept)

        macs: int = sum(node_macs(n, shape) for n in self.counted if n not in once)
        return Size(params, macs // self.batch)

    def _frozen_difference(self, gone: Flags, left: Mapping[str, Sequence[int]]) -> tuple[int, set[fx.Node]]:
        """(parameters that a computation done once puts in, its results, less those that nothing else uses, its
        operands; the nodes that are not run any more).
        """
        program = self.captured.program

        def kept(value: Any) -> list[int]:
            return [
                n - int(gone[a].sum()) if a is not None else n for a, n in zip(value.atoms, value.shape, strict=True)
            ]

        def touched(value: Any) -> bool:
            parts = value if isinstance(value, tuple) else (value,)
            return any(isinstance(v, Value) and kept(v) != list(v.shape) for v in parts)

        _, edge = frozen_part(program.graph, self.trace, touched)
        if not edge:
            return 0, set()
        run = still_used(program.graph, edge)
        used = {n.name for n in run if n.op == "placeholder"}
        names = {s.target for s in program.graph_signature.input_specs if s.arg.name in used}
        lost = [n for n in self.parameter_names if n not in names]
        put_in = sum(math.prod(kept(self.trace.values[n])) for n in edge)
        difference = put_in - sum(math.prod(left.get(n, self.captured.state[n].shape)) for n in lost)
        return difference, {n for n in program.graph.nodes if n not in run or n in edge}
