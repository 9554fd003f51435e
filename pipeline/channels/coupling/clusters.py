"""Clusters: classes that occur in the same dimensions of the same tensors, which one would call a layer's width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.channels.coupling.groups import Cluster, Kind
from pipeline.channels.coupling.solve import Solution, classes_by_role
from pipeline.channels.coupling.walk import Slot
from pipeline.channels.operators.trace import Policy, Role, Trace
from pipeline.channels.operators.values import Atoms, Flags
from pipeline.channels.program.capture import Captured


@dataclass(frozen=True)
class Formed:
    """The clusters; cluster name -> class of each of its groups; class -> whether it is a group of any."""

    clusters: tuple[Cluster, ...]
    members: Mapping[str, Atoms]
    removable: Flags


def form(trace: Trace, slots: Sequence[Slot], solution: Solution, captured: Captured) -> Formed:
    """The clusters that `trace.policy` allows to go, in the order of the parameters that lead them."""
    total = solution.reason_of.shape[0]
    removable = np.zeros(total, np.bool_)
    masked = [s for s in slots if s.masked]
    if not masked:
        return Formed((), {}, removable)
    classes = [solution.class_of[s.atoms] for s in masked]
    for found in classes:
        removable[found] = True
    removable &= solution.reason_of < 0
    number, slots_of = _same_slots(classes, removable)
    tensors = _Tensors.of(masked, trace, captured)
    roles = classes_by_role(trace, solution.class_of, total)
    leads = [tensors.lead(found) for found in slots_of]
    clusters: list[Cluster] = []
    members: dict[str, Atoms] = {}
    names: dict[str, int] = {}
    group = np.full(total, -1, np.int64)  # class -> its number within its cluster
    for k in sorted(range(len(slots_of)), key=leads.__getitem__):
        lead = leads[k]
        mine = classes[lead][number[classes[lead]] == k]
        _, first = np.unique(mine, return_index=True)
        groups = mine[np.sort(first)]  # in the order in which the leading tensor holds them
        kind = _kind(roles, groups, [tensors.rank[s] for s in slots_of[k]])
        if not _allows(trace.policy, kind) or len(groups) < 2:  # one group always stays
            removable[groups] = False
            continue
        group[groups] = np.arange(len(groups))
        owner = masked[lead].name.rpartition(".")[0] or masked[lead].name
        names[owner] = names.get(owner, 0) + 1
        name = owner if names[owner] == 1 else f"{owner}@{names[owner]}"
        keys = {s: (masked[s].name, masked[s].dim) for s in slots_of[k]}
        reads = {keys[s] for s in slots_of[k] if tensors.reads[s]}
        labels = {key: np.where(number[classes[s]] == k, group[classes[s]], -1) for s, key in keys.items()}
        members[name] = groups
        clusters.append(
            Cluster(
                name=name,
                kind=kind,
                size=len(groups),
                unit=len(mine) // len(groups),
                labels=labels,
                producers=tuple(key for key in labels if key not in reads),
                readers=tuple(key for key in labels if key in reads),
            )
        )
    return Formed(tuple(clusters), members, removable)


def _same_slots(classes: Sequence[Atoms], free: Flags) -> tuple[Atoms, list[list[int]]]:
    """(class -> number of its cluster, −1 where it is not `free`; the slots of each cluster).

    `classes`: for every slot, the classes of its indices.
    """
    total = free.shape[0]
    scratch = np.zeros(total, np.int64)
    once = [_once(found[free[found]], scratch) for found in classes]
    # All pairs (class, slot that holds it), as two columns.
    pair_class = np.concatenate(once)
    pair_slot = np.repeat(np.arange(len(classes)), [c.shape[0] for c in once])
    # Classes with the same set of slots have the same sum of random 64-bit numbers, one per slot (fixed seed).
    token = np.random.default_rng(0).integers(1, 2**63 - 1, len(classes), dtype=np.int64)
    signature = np.zeros(total, np.int64)
    np.add.at(signature, pair_class, token[pair_slot])
    occurs = np.zeros(total, np.bool_)
    occurs[pair_class] = True
    used = np.flatnonzero(occurs)
    signatures, first_of, cluster_of = np.unique(signature[used], return_index=True, return_inverse=True)
    number = np.full(total, -1, np.int64)
    number[used] = cluster_of.reshape(-1)
    # The slots of one class of a cluster are those of them all.
    shown = np.zeros(total, np.bool_)
    shown[used[first_of]] = True
    of_shown = shown[pair_class]
    slots_of: list[list[int]] = [[] for _ in signatures]
    for k, s in zip(number[pair_class[of_shown]].tolist(), pair_slot[of_shown].tolist(), strict=True):
        slots_of[k].append(s)
    return number, slots_of


def _once(classes: Atoms, place: Atoms) -> Atoms:
    """Each of `classes` once, without sorting; `place` is a scratch array that any class can index."""
    order = np.arange(classes.shape[0])
    place[classes] = order
    kept: Atoms = classes[place[classes] == order]
    return kept


@dataclass(frozen=True)
class _Tensors:
    """The slots that masks write into. Of each: whether it reads channels (columns), and its tensor's rank."""

    slots: Sequence[Slot]
    reads: Sequence[bool]
    rank: Sequence[int]

    @staticmethod
    def of(slots: Sequence[Slot], trace: Trace, captured: Captured) -> _Tensors:
        """A slot reads if a card said so, or if it is the second dimension of a matrix."""
        read = np.zeros(trace.count, np.bool_)
        for atoms in trace.reads:
            read[atoms] = True
        rank = [captured.state[s.name].dim() for s in slots]
        reads = [
            bool(read[s.atoms].any()) or (s.dim == 1 and n >= 2 and s.name.endswith("weight"))
            for s, n in zip(slots, rank, strict=True)
        ]
        return _Tensors(slots, reads, rank)

    def lead(self, found: Sequence[int]) -> int:
        """Which of these slots names their cluster: the rows of the first matrix that writes it, else the first
        matrix that writes it, else the first that writes it, else the first.
        """
        writers = [s for s in found if not self.reads[s]]
        matrices = [s for s in writers if self.rank[s] >= 2]
        rows = [s for s in matrices if self.slots[s].dim == 0]
        return (rows or matrices or writers or list(found))[0]


def _kind(roles: Mapping[Role, Flags], classes: Atoms, ranks: Sequence[int]) -> Kind:
    """What a cluster is, by the roles of its classes and the ranks of its tensors."""
    if roles["residual"][classes].any():
        return "residual"
    if roles["head"][classes].any():
        return "head"
    if roles["position"][classes].any():
        return "head_position"
    return "neuron" if all(rank <= 2 for rank in ranks) else "channel"


def _allows(policy: Policy, kind: Kind) -> bool:
    return {
        "channel": policy.channels,
        "neuron": policy.neurons,
        "head": policy.heads,
        "head_position": policy.head_positions,
        "residual": policy.residual,
    }[kind]
