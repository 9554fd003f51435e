"""How many groups of a cluster a kernel likes: those whose channels are a multiple of what it takes at once."""

from __future__ import annotations

import math

from pipeline.channels.coupling.groups import Cluster


def step_of(cluster: Cluster, align: int) -> int:
    """How many groups hold a multiple of `align` channels: a group of several (a head, a group of a grouped
    convolution) is aligned by the channels that it holds.
    """
    return align // math.gcd(align, cluster.unit)


def counts(cluster: Cluster, align: int) -> list[int]:
    """The counts of groups that are measured, and chosen among: those whose channels are a multiple of `align`, of a
    cluster no wider than that a multiple of its quarter, and all of them, from the least up.
    """
    step = step_of(cluster, align)
    if cluster.size <= step:
        step = max(1, step // 4)
    return [*range(step, cluster.size, step), cluster.size]
