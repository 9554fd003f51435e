"""What each layer's width is worth, measured: the divergence of the outputs from the dense ones as groups go.

For every cluster the network is run with the lowest eighth, quarter, half, ... of its groups masked; the divergence of
Kullback and Leibler to the dense outputs on unlabelled samples, made convex, is the cluster's curve. Widths then follow
greedily: the block that costs the least divergence per multiply-accumulate saved goes next. Forward passes only.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from foundation.editor import writes
from pipeline.channels.coupling.groups import Analysis, Cluster
from pipeline.channels.program.capture import Captured
from pipeline.channels.program.execute import feeds_of, last_uses
from pipeline.selection.allocation import Budget, Removed, allocate, lowest, overridden, widths_allowed
from pipeline.selection.criteria import Scores

SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 9 / 10)
"""Of a cluster's groups, where its curve is measured."""
WORST = 1e3
"""Nats; what an output that is not finite counts as."""
ROUNDS = 16
"""How often what a block saves is counted anew on the way: it depends on the other widths."""


@dataclass(frozen=True)
class Curve:
    """Divergence (nats, mean over samples) after the lowest `removed` groups went: convex, and 0 at 0."""

    removed: tuple[int, ...]
    divergence: tuple[float, ...]

    def at(self, removed: float) -> float:
        """Between the points on a line, beyond the last one on that of the last two."""
        x, y = self.removed, self.divergence
        if removed <= x[-1] or len(x) == 1:
            return float(np.interp(removed, x, y))
        return y[-1] + (removed - x[-1]) * (y[-1] - y[-2]) / (x[-1] - x[-2])


# ── measuring ────────────────────────────────────────────────────────────────────────────────────────────────────────


def measure(
    analysis: Analysis,
    clusters: Sequence[Cluster],
    scores: Mapping[str, Scores],
    samples: Tensor,
    state: Mapping[str, Tensor],
) -> dict[str, Curve]:
    """The curve of each of `clusters`, whose groups go in the order of their `scores`, on `samples`.

    `state`: the weights that count as dense. All samples are run at once, and each masked network only from the first
    node on that it changes, so that memory is that of one forward pass. Deterministic.
    """
    captured = analysis.captured.with_state(state)
    size = len(samples) if captured.dynamic_batch else len(captured.example[0])
    if captured.dynamic_batch and size == 1:
        samples, size = torch.cat([samples, samples]), 2  # a batch of one is a case of its own to torch.export
    samples = samples if len(samples) >= size else samples.repeat(-(-size // len(samples)), *[1] * (samples.dim() - 1))
    points = {c.name: _points(c.size) for c in clusters}
    tried = [
        (name, n, analysis.masks({name: lowest(scores[name], n)})) for name, counts in points.items() for n in counts
    ]
    chunks = [samples[at : at + size] for at in range(0, len(samples) - size + 1, size)]
    total: dict[tuple[str, int], float] = {}
    for chunk in chunks:
        for (name, n), found in _divergences(captured, chunk, tried):
            total[name, n] = total.get((name, n), 0.0) + found / len(chunks)
    return {name: convex(counts, [total[name, n] for n in counts]) for name, counts in points.items()}


def _points(size: int) -> list[int]:
    return sorted({n for n in (math.floor(size * share + 0.5) for share in SHARES) if 0 < n < size})


def convex(removed: Sequence[int], divergence: Sequence[float]) -> Curve:
    """The lower convex hull of (0, 0) and the points, which rise in `removed`."""
    hull: list[tuple[int, float]] = [(0, 0.0)]
    for point in zip(removed, (max(0.0, d) for d in divergence), strict=True):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return Curve(tuple(x for x, _ in hull), tuple(y for _, y in hull))


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _divergences(
    captured: Captured, samples: Tensor, tried: Sequence[tuple[str, int, Mapping[str, npt.NDArray[np.bool_]]]]
) -> Iterator[tuple[tuple[str, int], float]]:
    """((cluster, groups), divergence) of each trial, in the order of the first node that it changes."""
    graph = captured.program.graph
    nodes = list(graph.nodes)
    place = {node: at for at, node in enumerate(nodes)}
    named = {s.target: s.arg.name for s in captured.program.graph_signature.input_specs if s.target is not None}
    holders = {node.name: node for node in nodes if node.op == "placeholder"}
    dies = last_uses(graph)
    trials = []
    for name, count, masks in tried:
        folded = captured.fold(masks)
        changed = {
            holders[arg]: folded.state[target]
            for target, arg in named.items()
            if target in folded.state and folded.state[target] is not captured.state[target]
        }
        first = min((place[user] for node in changed for user in node.users), default=len(nodes))
        trials.append((first, (name, count), changed))
    trials.sort(key=lambda trial: trial[0])
    feeds = feeds_of(captured.program, (samples,), captured.state)
    values: dict[fx.Node, Any] = {
        node: value.clone() if isinstance(value := feeds[node.name], Tensor) and _written(node) else value
        for node in holders.values()
    }
    dense = _log_shares(_finish(nodes, 0, dict(values), dies))
    at = 0
    for first, key, changed in trials:
        if first >= len(nodes):
            yield key, 0.0  # nothing reads it
            continue
        at = _advance(nodes, at, first, values, dies)
        yield key, _divergence(dense, _log_shares(_finish(nodes, at, {**values, **changed}, dies)))


def _written(node: fx.Node) -> bool:
    return any(writes(user) for user in node.users)


def _advance(
    nodes: Sequence[fx.Node], start: int, stop: int, values: dict[fx.Node, Any], dies: Mapping[fx.Node, list[fx.Node]]
) -> int:
    """Run the nodes from `start` up to `stop`, changing `values`; weights stay, they may be read by a trial."""
    with torch.no_grad():
        for node in nodes[start:stop]:
            _run(node, values)
            for dead in dies.get(node, ()):
                if dead.op != "placeholder":
                    values.pop(dead, None)
    return stop


def _finish(
    nodes: Sequence[fx.Node], start: int, values: dict[fx.Node, Any], dies: Mapping[fx.Node, list[fx.Node]]
) -> Tensor:
    """The first output, run from `start` on; what was there before is not written to."""
    shared = set(values)
    with torch.no_grad():
        for node in nodes[start:]:
            if node.op == "output":
                returned: Any = node.args[0]
                found: Tensor = values[returned[0]]
                return found
            target = node.args[0] if node.op == "call_function" and node.args and writes(node) else None
            if target in shared and isinstance(target, fx.Node):
                values[target] = values[target].clone()
                shared.discard(target)
            _run(node, values)
            for dead in dies.get(node, ()):
                values.pop(dead, None)
    raise ValueError("the graph has no output")


def _run(node: fx.Node, values: dict[fx.Node, Any]) -> None:
    if node.op == "call_function":
        call: Any = node.target
        args = fx.node.map_arg(node.args, values.__getitem__)
        values[node] = call(*args, **fx.node.map_arg(node.kwargs, values.__getitem__))


def _log_shares(output: Tensor) -> Tensor:
    """Log softmax over the classes, (samples and places, classes): the last of three dimensions, else the second."""
    value = output.double()
    if value.dim() < 2:
        value = value.reshape(1, -1)
    return value.movedim(1 if value.dim() != 3 else 2, -1).flatten(0, -2).log_softmax(-1)


def _divergence(dense: Tensor, other: Tensor) -> float:
    found = float((dense.exp() * (dense - other)).sum(-1).mean())
    return min(found, WORST) if math.isfinite(found) else WORST


# ── choosing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def choose(
    analysis: Analysis,
    clusters: Sequence[Cluster],
    scores: Mapping[str, Scores],
    curves: Mapping[str, Curve],
    budget: Budget,
) -> Removed:
    """Cluster name -> True = goes: as few multiply-accumulates as `budget` would leave layer by layer, spread by the
    curves.

    Alignment and floors hold in every cluster; a cluster that `budget` overrides, or whose groups cost nothing, is cut
    as it would be layer by layer.
    """
    by_layer = allocate(clusters, scores, budget)
    goal = analysis.estimate(by_layer).macs
    fixed = overridden([c.name for c in clusters], budget.overrides)
    allowed = {c.name: widths_allowed(c, budget) for c in clusters if c.name not in fixed}

    def macs(level: Mapping[str, int]) -> int:
        return analysis.estimate(removed(level)).macs

    def removed(level: Mapping[str, int]) -> Removed:
        chosen = {c.name: lowest(scores[c.name], c.size - allowed[c.name][level[c.name]]) for c in free}
        return by_layer | chosen

    free = [c for c in clusters if c.name in allowed and len(allowed[c.name]) > 1]
    least = {c.name: len(allowed[c.name]) - 1 for c in free}
    start = dict.fromkeys(least, 0)
    whole = macs(start)
    free = [c for c in free if macs({**start, c.name: least[c.name]}) < whole]
    now = {c.name: 0 for c in free}
    for left in range(ROUNDS, 0, -1):
        left_macs = macs(now)
        if left_macs <= goal:
            break
        open_ = [c for c in free if now[c.name] < least[c.name]]
        steps = []
        for c in open_:
            width = allowed[c.name]
            at = now[c.name]
            saved = left_macs - macs({**now, c.name: at + 1})
            each = saved / (width[at] - width[at + 1])
            gone = [c.size - w for w in width[at:]]
            steps.append(
                Steps(
                    saved=tuple(each * (b - a) for a, b in itertools.pairwise(gone)),
                    lost=tuple(curves[c.name].at(b) - curves[c.name].at(a) for a, b in itertools.pairwise(gone)),
                )
            )
        taken = cheapest(steps, (left_macs - goal) / left)
        now |= {c.name: now[c.name] + n for c, n in zip(open_, taken, strict=True)}
    # The last block may have saved more than was wanted: what fits again comes back, the dearest first.
    waiting = [(-_regained(c, curves, allowed, now), at) for at, c in enumerate(free) if now[c.name]]
    heapq.heapify(waiting)
    while waiting and goal < whole:
        _, at = heapq.heappop(waiting)
        c = free[at]
        back = {**now, c.name: now[c.name] - 1}
        if macs(back) <= goal:  # else it never will: the more comes back, the more a block costs
            now = back
            if now[c.name]:
                heapq.heappush(waiting, (-_regained(c, curves, allowed, now), at))
    return removed(now)


def _regained(
    cluster: Cluster, curves: Mapping[str, Curve], allowed: Mapping[str, Sequence[int]], now: Mapping[str, int]
) -> float:
    """By how much the divergence falls when the last block comes back."""
    at, widths = now[cluster.name], allowed[cluster.name]
    curve = curves[cluster.name]
    return curve.at(cluster.size - widths[at]) - curve.at(cluster.size - widths[at - 1])


@dataclass(frozen=True)
class Steps:
    """What a cluster can give up, block after block: `saved` of each, and what is `lost` by it (never falling per
    unit saved).
    """

    saved: tuple[float, ...]
    lost: tuple[float, ...]


def cheapest(steps: Sequence[Steps], wanted: float) -> list[int]:
    """How many steps of each to take so that `wanted` is saved: always the one that loses the least per unit saved.

    Optimal among all choices that save as much as this one does, since no later step is cheaper than an earlier one.
    Ties go to the first; where all steps together save less, all are taken.
    """
    taken = [0] * len(steps)
    waiting = [(_price(own, 0), at) for at, own in enumerate(steps) if own.saved]
    heapq.heapify(waiting)
    saved = 0.0
    while saved < wanted and waiting:
        _, at = heapq.heappop(waiting)
        saved += steps[at].saved[taken[at]]
        taken[at] += 1
        if taken[at] < len(steps[at].saved):
            heapq.heappush(waiting, (_price(steps[at], taken[at]), at))
    return taken


def _price(own: Steps, at: int) -> float:
    return own.lost[at] / own.saved[at] if own.saved[at] > 0 else math.inf
