"""Dead channels that stay, since their going would leave a count that kernels are slow with.

Trained weights hold channels that nobody masked and that are zero all the same: EfficientNet-lite0's have three, in
three layers. onnxruntime takes channels in blocks, and a layer of 31 is not taken in blocks of 16 at all: without the
three a model that had been pruned to 0.80 of its operations took 1.24 times as long as the dense one, with them 0.83
times (one thread, 224 by 224, AVX-512).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pipeline.channels.coupling.counts import counts
from pipeline.channels.coupling.groups import Analysis, Cluster
from pipeline.channels.dead.liveness import Liveness, Slices, zero_slices
from pipeline.channels.ledger import Refusal


def evened(
    analysis: Analysis, state: Mapping[str, Tensor], live: Liveness, align: int, *, by_chance: bool = True
) -> Liveness:
    """`live` without as many groups of each cluster as it takes to leave a multiple of `align` channels, or all of
    them; with a refusal for these. Where too few are dead, all of them go.

    `state`: the folded weights. `by_chance`: a group of which every weight is zero, on both sides, was chosen, and
    goes; nothing was chosen in a checkpoint that was pruned elsewhere, where any group may stay.
    """
    if align == 1 or not live.dead:
        return live
    dead, refusals = dict(live.dead), []
    zero = zero_slices(analysis, state, np.zeros(analysis.solution.reason_of.shape[0], np.bool_))
    for cluster in analysis.clusters:
        flags = dead.get(cluster.name)
        if flags is None or flags.all():  # inside a branch that goes as a whole
            continue
        left = cluster.size - int(flags.sum())
        stray = np.flatnonzero(flags & _weighty(cluster, zero) if by_chance else flags)
        wanted = next((n for n in counts(cluster, align) if n >= left), left)
        if not left < wanted <= left + len(stray):
            continue
        stay = stray[: wanted - left]
        dead[cluster.name] = flags & ~np.isin(np.arange(cluster.size), stay)
        dead_how = "dead by chance" if by_chance else "dead"
        reason = f"{dead_how}: {wanted} are faster than {left} where {align} channels are taken at once"
        refusals.append(Refusal(cluster.name, tuple(stay.tolist()), "width", cluster.name, reason))
    return replace(live, dead={n: f for n, f in dead.items() if f.any()}, refusals=(*live.refusals, *refusals))


def _weighty(cluster: Cluster, zero: Slices) -> npt.NDArray[np.bool_]:
    """Whether any weight of each group is not zero, given the slices that are."""
    found = np.zeros(cluster.size, np.bool_)
    for place, labels in cluster.labels.items():
        if place in zero:
            mine = labels >= 0
            np.logical_or.at(found, labels[mine], ~zero[place][mine])
    return found
