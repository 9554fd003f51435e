"""Classes of tied atoms as channel groups: what can go, what is blocked, what a choice would leave."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import fx
from torch.export.graph_signature import InputKind

from foundation.errors import UserError, nearest
from pipeline.channels.coupling.couple import Slot, Solution, solve, walk
from pipeline.channels.coupling.frozen import frozen_part, still_used
from pipeline.channels.operators.table import base_name
from pipeline.channels.operators.trace import ROWS, SPACE, Policy, Trace
from pipeline.channels.operators.values import PINNED, Atoms, Flags, Value
from pipeline.channels.program.capture import Captured
from pipeline.channels.program.macs import count_macs, counted, node_macs

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

    def cluster(self, name: str) -> Cluster:
        """The cluster called `name`. Raises UserError naming the nearest ones."""
        for cluster in self.clusters:
            if cluster.name == name:
                return cluster
        raise UserError(f"There is no cluster '{name}'.", nearest(name, (c.name for c in self.clusters)))

    def gone(self, removed: Removed) -> Flags:
        """Atom -> True = goes, for `removed` (cluster name -> bool array, True = goes).

        One group of every cluster, and one index of every tensor dimension, stays whatever was asked.
        """
        classes = np.zeros(self.solution.reason_of.shape[0], np.bool_)
        for name, going in removed.items():
            cluster = self.cluster(name)
            flags = np.asarray(going, dtype=np.bool_)
            if flags.shape != (cluster.size,):
                raise UserError(
                    f"Cluster '{name}' has {cluster.size} groups, the choice names {flags.shape}.",
                    "Give one flag per group, True = goes.",
                )
            if flags.all():
                flags = flags.copy()
                flags[0] = False
            classes[self.members[name][flags]] = True
        gone: Flags = classes[self.solution.class_of]
        for atoms in self.dimensions:  # no tensor may become empty (half of a chunk, one input of a concatenation)
            if gone[atoms].all():
                classes[self.solution.class_of[atoms[0]]] = False
                gone = classes[self.solution.class_of]
        return gone

    @property
    def dimensions(self) -> Sequence[Atoms]:
        """The labelled dimensions of all tensors, each once."""
        return self.trace.notes["<dimensions>"]  # type: ignore[no-any-return]

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
        op, node, reason = _why(self.solution, classes)
        return reason if op == "-" else f"{reason} ({op} at {node})"

    def estimate(self, removed: Removed) -> Size:
        """The exact size after the removal, without removing."""
        gone = self.gone(removed)
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

        def shape(node: fx.Node) -> tuple[int, ...]:
            value = self.trace.values.get(node)
            if not isinstance(value, Value):
                return self.trace.shape(node)
            return tuple(n if a is None else kept(a) for a, n in zip(value.atoms, value.shape, strict=True))

        def kept(atoms: Atoms) -> int:
            key = id(atoms)
            if key not in counts:
                counts[key] = int(atoms.shape[0] - gone[atoms].sum())
            return counts[key]

        macs: int = sum(node_macs(n, shape) for n in self.trace.notes["<counted>"] if n not in once)
        return Size(params, macs // self.trace.notes["<batch>"])

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

    @property
    def parameter_names(self) -> Sequence[str]:
        """Each parameter tensor that evaluation uses, once (tied names counted once)."""
        return self.trace.notes["<parameters>"]  # type: ignore[no-any-return]


def analyse(captured: Captured, policy: Policy | None = None) -> Analysis:
    """Channel groups of a captured model under `policy`."""
    policy = policy or Policy()
    trace, slots = walk(captured, policy)
    solution = solve(trace)
    trace.notes["<parameters>"] = _parameters(captured)
    trace.notes["<dimensions>"] = _dimensions(trace)
    trace.notes["<counted>"] = [n for n in captured.program.graph.nodes if counted(n)]
    trace.notes["<batch>"] = _batch(captured)
    clusters, members, allowed = _clusters(trace, slots, solution, policy, captured)
    params, removable, blocked = _shares(captured, trace, slots, solution, allowed)
    return Analysis(
        clusters=clusters,
        blocked=blocked,
        params=params,
        macs=count_macs(captured.program),
        removable_share=removable / max(params, 1),
        captured=captured,
        policy=policy,
        trace=trace,
        slots=tuple(slots),
        solution=solution,
        members=members,
    )


def _parameters(captured: Captured) -> list[str]:
    program = captured.program
    seen: set[Any] = set()
    names: list[str] = []
    used = {n.name for n in program.graph.nodes if n.op == "placeholder" and n.users}
    for spec in program.graph_signature.input_specs:
        if spec.kind != InputKind.PARAMETER or spec.target is None or spec.arg.name not in used:
            continue
        name = spec.target
        tensor = program.state_dict[name]
        key = (tensor.data_ptr(), tuple(tensor.shape)) if tensor.numel() else name
        if key not in seen:
            seen.add(key)
            names.append(name)
    return names


def _batch(captured: Captured) -> int:
    first = next((x for x in captured.example if hasattr(x, "shape") and len(x.shape)), None)
    return int(first.shape[0]) if first is not None else 1


def _dimensions(trace: Trace) -> list[Atoms]:
    found: dict[int, Atoms] = {}
    for value in trace.values.values():
        for v in value if isinstance(value, tuple) else (value,):
            if isinstance(v, Value):
                for a in v.atoms:
                    if a is not None and a.size and a[0] != PINNED:
                        found[id(a)] = a
    return list(found.values())


def _clusters(
    trace: Trace, slots: list[Slot], solution: Solution, policy: Policy, captured: Captured
) -> tuple[tuple[Cluster, ...], dict[str, Atoms], Flags]:
    """Clusters, the classes of their groups, and for every class whether the policy lets it go."""
    total = solution.reason_of.shape[0]
    allowed = solution.reason_of < 0
    in_state = np.zeros(total, np.bool_)
    masked = [s for s in slots if s.masked]
    if not masked:
        return (), {}, np.zeros(total, np.bool_)
    classes = [solution.class_of[s.atoms] for s in masked]
    for found in classes:
        in_state[found] = True
    allowed &= in_state
    place = np.zeros(total, np.int64)
    once = [_once(found[allowed[found]], place) for found in classes]
    pair_class = np.concatenate(once)
    pair_slot = np.repeat(np.arange(len(masked)), [c.shape[0] for c in once])
    # Classes with the same set of slots have the same sum of random 64-bit numbers (fixed seed).
    token = np.random.default_rng(0).integers(1, 2**63 - 1, len(masked), dtype=np.int64)
    signature = np.zeros(total, np.int64)
    np.add.at(signature, pair_class, token[pair_slot])
    in_pairs = np.zeros(total, np.bool_)
    in_pairs[pair_class] = True
    used = np.flatnonzero(in_pairs)
    keys, first_of, cluster_of = np.unique(signature[used], return_index=True, return_inverse=True)
    number = np.full(total, -1, np.int64)
    number[used] = cluster_of.reshape(-1)
    shown = np.zeros(total, np.bool_)  # one class of each cluster: its slots are those of them all
    shown[used[first_of]] = True
    of_shown = shown[pair_class]
    cluster_slots: list[list[int]] = [[] for _ in keys]
    for k, s in zip(number[pair_class[of_shown]].tolist(), pair_slot[of_shown].tolist(), strict=True):
        cluster_slots[k].append(s)
    read = np.zeros(trace.count, np.bool_)
    for atoms in trace.reads:
        read[atoms] = True
    kinds = _kinds(trace, solution)
    rank = {s.name: captured.state[s.name].dim() for s in masked}
    order = sorted(range(len(keys)), key=lambda k: _lead(cluster_slots[k], masked, read, rank))
    clusters: list[Cluster] = []
    members: dict[str, Atoms] = {}
    names: dict[str, int] = {}
    group = np.full(total, -1, np.int64)
    for k in order:
        lead = _lead(cluster_slots[k], masked, read, rank)[1]
        mine = classes[lead]
        mine = mine[number[mine] == k]
        _, first = np.unique(mine, return_index=True)
        ordered = mine[np.sort(first)]
        here = [masked[s] for s in cluster_slots[k]]
        kind = _kind(kinds, ordered, here, rank)
        if not _allows(policy, kind):
            allowed[ordered] = False
            continue
        if len(ordered) < 2:  # one group always stays
            allowed[ordered] = False
            continue
        group[ordered] = np.arange(len(ordered))
        owner = masked[lead].name.rpartition(".")[0] or masked[lead].name
        names[owner] = names.get(owner, 0) + 1
        name = owner if names[owner] == 1 else f"{owner}@{names[owner]}"
        labels = {}
        for s in cluster_slots[k]:
            found = classes[s]
            labels[masked[s].name, masked[s].dim] = np.where(number[found] == k, group[found], -1)
        reads = {(s.name, s.dim) for s in here if _reads(s, read, rank)}
        members[name] = ordered
        clusters.append(
            Cluster(
                name=name,
                kind=kind,
                size=len(ordered),
                unit=len(mine) // len(ordered),
                labels=labels,
                producers=tuple(key for key in labels if key not in reads),
                readers=tuple(key for key in labels if key in reads),
            )
        )
    return tuple(clusters), members, allowed


def _once(classes: Atoms, place: Atoms) -> Atoms:
    """Each of `classes` once, without sorting; `place` is a scratch array that any class can index."""
    order = np.arange(classes.shape[0])
    place[classes] = order
    kept: Atoms = classes[place[classes] == order]
    return kept


def _reads(slot: Slot, read: Flags, rank: Mapping[str, int]) -> bool:
    return bool(read[slot.atoms].any()) or (slot.dim == 1 and rank[slot.name] >= 2 and slot.name.endswith("weight"))


def _lead(found: Sequence[int], slots: Sequence[Slot], read: Flags, rank: Mapping[str, int]) -> tuple[int, int]:
    """The slot that names a cluster: the first matrix that writes it, else the first that writes it, else the first."""
    writers = [s for s in found if not _reads(slots[s], read, rank)]
    matrices = [s for s in writers if rank[slots[s].name] >= 2]
    rows = [s for s in matrices if slots[s].dim == 0]
    best = (rows or matrices or writers or list(found))[0]
    return best, best


def _kinds(trace: Trace, solution: Solution) -> dict[str, Flags]:
    found = {r: np.zeros(solution.reason_of.shape[0], np.bool_) for r in ("head", "position", "residual")}
    for role, atoms in trace.roles:
        found[role][solution.class_of[atoms]] = True
    return found


def _kind(kinds: Mapping[str, Flags], classes: Atoms, slots: Sequence[Slot], rank: Mapping[str, int]) -> Kind:
    if kinds["residual"][classes].any():
        return "residual"
    if kinds["head"][classes].any():
        return "head"
    if kinds["position"][classes].any():
        return "head_position"
    if all(rank[s.name] <= 2 for s in slots):
        return "neuron"
    return "channel"


def _allows(policy: Policy, kind: Kind) -> bool:
    return {
        "channel": policy.channels,
        "neuron": policy.neurons,
        "head": policy.heads,
        "head_position": policy.head_positions,
        "residual": policy.residual,
    }[kind]


def _shares(
    captured: Captured, trace: Trace, slots: list[Slot], solution: Solution, allowed: Flags
) -> tuple[int, int, tuple[Blocked, ...]]:
    """Total and removable parameter elements, and what blocks the others."""
    by_name: dict[str, list[Slot]] = {}
    for slot in slots:
        by_name.setdefault(slot.name, []).append(slot)
    params = removable = 0
    blocked: dict[tuple[str, str, str], int] = {}
    for name in trace.notes["<parameters>"]:
        tensor = captured.state[name]
        stay = list(tensor.shape)
        reasons: list[tuple[str, str, str]] = []
        for slot in by_name.get(name, ()):
            classes = solution.class_of[slot.atoms]
            fixed = ~allowed[classes]
            stay[slot.dim] = int(fixed.sum())
            if fixed.any():
                reasons.append(_why(solution, classes[fixed]))
        kept = math.prod(stay)
        params += tensor.numel()
        removable += tensor.numel() - kept
        if kept:
            # An element stays where all its dimensions are fixed: the least common of their reasons tells most.
            key = min(
                reasons,
                key=lambda r: (r[2] == ROWS, r[2] == SPACE, r[0] == "output"),
                default=("-", "-", "a single number"),
            )
            blocked[key] = blocked.get(key, 0) + kept
    return (
        params,
        removable,
        tuple(
            Blocked(op, node, reason, count)
            for (op, node, reason), count in sorted(blocked.items(), key=lambda i: -i[1])
        ),
    )


def _why(solution: Solution, classes: Atoms) -> tuple[str, str, str]:
    reasons = solution.reason_of[classes]
    known = reasons[reasons >= 0]
    if not known.size or not solution.pins:
        return "-", "-", "the recipe keeps this kind of group, or it is the only one of its kind"
    pin = solution.pins[int(np.bincount(known).argmax())]
    op = "output" if pin.node.op == "output" else base_name(pin.node.target)
    return op, pin.node.name, pin.reason
