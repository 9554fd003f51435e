"""Which groups are dead already, read off the weights alone, in both directions.

A group is dead when at every place where its indices are summed one side is exactly zero: nothing reads it (zero
columns), or nothing but zero comes in (zero rows and bias, zero scale and shift, carried on through every operator by
its own card). What is dead makes more dead: its rows and columns no longer count, so a row whose only weights were on
dead inputs is zero itself. The walk is repeated until nothing changes.

A group that is a constant instead of zero (rows or scale zero, shift not) is dead as well where every reader can take
the constant into its bias (see `constants`); what fed it then has one reader less. Where a reader cannot, it stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from pipeline.channels.coupling.groups import Analysis
from pipeline.channels.coupling.walk import walk
from pipeline.channels.dead.constants import MIXED, survey
from pipeline.channels.dead.refusal import Causes, refusals_of
from pipeline.channels.ledger import Refusal
from pipeline.channels.operators.trace import Contraction, Trace
from pipeline.channels.operators.values import Flags, Value
from pipeline.channels.program.capture import Captured

Slices = dict[tuple[str, int], npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class Liveness:
    """`dead`: cluster name -> one flag per group, True = can go without any change of the output; clusters with
    nothing dead are absent. `refusals`: groups that are constant but cannot go, with the node and the reason.
    """

    dead: dict[str, npt.NDArray[np.bool_]]
    refusals: tuple[Refusal, ...]


def dead_groups(analysis: Analysis, state: Mapping[str, Tensor]) -> dict[str, npt.NDArray[np.bool_]]:
    """`liveness(analysis, state).dead`."""
    return liveness(analysis, state).dead


def liveness(analysis: Analysis, state: Mapping[str, Tensor]) -> Liveness:
    """What is dead in folded weights `state`, by name (names that it lacks are taken from the capture)."""
    captured = analysis.captured.with_state(state)
    own = np.zeros(analysis.solution.reason_of.shape[0], np.bool_)
    for classes in analysis.members.values():
        own[classes] = True
    zero = np.zeros_like(own)  # dead because zero, or because nothing reads it
    while True:
        slices = zero_slices(analysis, captured.state, zero)
        settled = _settled(analysis, walk(captured, analysis.policy, slices)[0])
        found = own & _everywhere(analysis, settled) | zero
        if (found == zero).all():
            break
        zero = found
    dead, why = _with_constants(analysis, captured, own, zero, slices)
    return Liveness(
        {name: dead[classes] for name, classes in analysis.members.items() if dead[classes].any()},
        refusals_of(analysis, why),
    )


def _with_constants(
    analysis: Analysis, captured: Captured, own: Flags, zero: Flags, slices: Slices
) -> tuple[Flags, Causes]:
    """Dead classes, constants that can go into a bias included; and why other constants cannot."""
    class_of = analysis.solution.class_of
    if not _may_be_constant(analysis, slices, own & ~zero):
        return zero, {}
    contractions = analysis.trace.contractions
    found = survey(captured, analysis.trace, class_of, contractions)
    judged = [found.judge(contraction) for contraction in contractions]
    dead = zero
    while True:  # values stay as they are; what only read a constant's writer has one reader less each time
        now, _ = walk(captured, analysis.policy, zero_slices(analysis, captured.state, zero, dead))
        settled = [flags | able for flags, (able, _, _) in zip(_settled(analysis, now), judged, strict=True)]
        more = own & _everywhere(analysis, settled) | dead
        if (more == dead).all():
            break
        dead = more
    why: dict[int, tuple[fx.Node, str]] = {}
    stay = own & found.fixed_classes & ~dead
    for contraction, flags, (_, constant, reasons) in zip(contractions, settled, judged, strict=True):
        classes = class_of[contraction.atoms]
        for at in np.flatnonzero(stay[classes] & constant & ~flags):
            why.setdefault(int(classes[at]), (contraction.node, reasons[at]))
    for cls, node in found.mixed.items():
        if stay[cls]:
            why.setdefault(cls, (node, MIXED))
    return dead, why


def _may_be_constant(analysis: Analysis, slices: Slices, live: Flags) -> bool:
    """Whether a slice that writes a live group is zero: without one there is no constant to look for."""
    read = _reading(analysis)
    for slot in analysis.slots:
        flags = slices.get((slot.name, slot.dim))
        if flags is not None and (flags & live[analysis.solution.class_of[slot.atoms]] & ~read[slot.atoms]).any():
            return True
    return False


def _reading(analysis: Analysis) -> Flags:
    """Atoms of dimensions that read channels."""
    read = np.zeros(analysis.trace.count, np.bool_)
    for atoms in analysis.trace.reads:
        read[atoms] = True
    return read


def zero_slices(analysis: Analysis, state: Mapping[str, Tensor], zero: Flags, unread: Flags | None = None) -> Slices:
    """For every tensor and dimension, which slices are zero once classes of `zero` are left out.

    Classes of `unread` are left out as well where it is asked what a column reads for: they go, but are not zero.
    """
    class_of = analysis.solution.class_of
    by_name: dict[str, list[tuple[int, npt.NDArray[np.int64]]]] = {}
    for slot in analysis.slots:
        by_name.setdefault(slot.name, []).append((slot.dim, slot.atoms))
    read = _reading(analysis) if unread is not None else None
    found: Slices = {}
    for name, dims in by_name.items():
        live = _without(state[name].detach() != 0, dims, zero[class_of])
        fewer = _without(live.clone(), dims, unread[class_of]) if unread is not None else live
        for dim, atoms in dims:
            kept = fewer if read is not None and read[atoms].any() else live
            others = [d for d in range(kept.dim()) if d != dim]
            found[name, dim] = (~(kept.amax(dim=others) if others else kept)).numpy()
    return found


def _without(live: Tensor, dims: list[tuple[int, npt.NDArray[np.int64]]], gone: Flags) -> Tensor:
    for dim, atoms in dims:
        if gone[atoms].any():
            live.index_fill_(dim, torch.from_numpy(np.flatnonzero(gone[atoms])), False)
    return live


def _settled(analysis: Analysis, now: Trace) -> list[Flags]:
    """For every contraction, the indices that are zero on one side."""

    def flags(contraction: Contraction) -> Flags:
        zero = np.zeros(contraction.atoms.shape, np.bool_)
        for node, dim in contraction.sides:
            value = now.values.get(node)
            found = value.zeros[dim] if isinstance(value, Value) else None
            if found is not None:
                zero |= found
        return zero

    return [flags(contraction) for contraction in analysis.trace.contractions]


def _everywhere(analysis: Analysis, settled: list[Flags]) -> Flags:
    """Classes that are settled at every contraction."""
    dead = np.ones(analysis.solution.reason_of.shape[0], np.bool_)
    for contraction, flags in zip(analysis.trace.contractions, settled, strict=True):
        dead[analysis.solution.class_of[contraction.atoms[~flags]]] = False
    return dead
