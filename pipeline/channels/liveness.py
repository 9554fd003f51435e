"""Which groups are dead already, read off the weights alone, in both directions.

A group is dead when at every place where its indices are summed one side is exactly zero: nothing reads it (zero
columns), or nothing but zero comes in (zero rows and bias, zero scale and shift, carried on through every operator by
its own rule). What is dead makes more dead: its rows and columns no longer count, so a row whose only weights were on
dead inputs is zero itself. The walk is repeated until nothing changes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.channels.couple import walk
from pipeline.channels.decide import Analysis
from pipeline.channels.trace import Trace
from pipeline.channels.values import Flags, Value


def dead_groups(analysis: Analysis, state: Mapping[str, Tensor]) -> dict[str, npt.NDArray[np.bool_]]:
    """Cluster name -> one flag per group, True = can go without any change of the output.

    `state`: folded weights by name (names that it lacks are taken from the capture). Clusters with nothing dead
    are absent.
    """
    captured = analysis.captured.with_state(state)
    dead = np.zeros(analysis.solution.reason_of.shape[0], np.bool_)
    own = np.zeros_like(dead)
    for classes in analysis.members.values():
        own[classes] = True
    while True:
        zeros = _zero_slices(analysis, captured.state, dead)
        now, _ = walk(captured, analysis.policy, zeros)
        found = own & _dead_everywhere(analysis, now) | dead
        if (found == dead).all():
            break
        dead = found
    return {name: dead[classes] for name, classes in analysis.members.items() if dead[classes].any()}


def _zero_slices(
    analysis: Analysis, state: Mapping[str, Tensor], dead: Flags
) -> dict[tuple[str, int], npt.NDArray[np.bool_]]:
    """For every tensor and dimension, which slices are zero once dead classes are left out."""
    class_of = analysis.solution.class_of
    by_name: dict[str, list[tuple[int, Flags]]] = {}
    for slot in analysis.slots:
        by_name.setdefault(slot.name, []).append((slot.dim, dead[class_of[slot.atoms]]))
    found: dict[tuple[str, int], Flags] = {}
    for name, dims in by_name.items():
        live = state[name].detach() != 0
        for dim, gone in dims:
            if gone.any():
                live.index_fill_(dim, torch.from_numpy(np.flatnonzero(gone)), False)
        for dim, _ in dims:
            others = [d for d in range(live.dim()) if d != dim]
            found[name, dim] = (~(live.amax(dim=others) if others else live)).numpy()
    return found


def _dead_everywhere(analysis: Analysis, now: Trace) -> Flags:
    """Classes for which one side is zero at every contraction."""
    dead = np.ones(analysis.solution.reason_of.shape[0], np.bool_)
    for contraction in analysis.trace.contractions:
        zero = np.zeros(contraction.atoms.shape, np.bool_)
        for node, dim in contraction.sides:
            value = now.values.get(node)
            flags = value.zeros[dim] if isinstance(value, Value) else None
            if flags is not None:
                zero |= flags
        dead[analysis.solution.class_of[contraction.atoms[~zero]]] = False
    return dead
