"""What each layer's width is worth, measured: the divergence of the outputs from the dense ones as groups go.

For every cluster the network is run with the lowest eighth, quarter, half, ... of its groups masked; the divergence of
Kullback and Leibler to the dense outputs on unlabelled samples, made convex, is the cluster's curve. Widths then follow
greedily: the block that costs the least divergence per multiply-accumulate saved goes next. Forward passes only.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from foundation.editor import writes
from foundation.files import memory_of
from pipeline.channels.coupling.groups import Analysis, Cluster
from pipeline.channels.program.capture import Captured
from pipeline.channels.program.execute import feeds_of, last_uses
from pipeline.progress import Progress
from pipeline.recovery.sampling import chunked
from pipeline.selection.activations import ReaderInput
from pipeline.selection.allocation import Budget, Removed, allocate, lowest, overridden, widths_allowed
from pipeline.selection.criteria import Scores
from pipeline.selection.refit import refitted

SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 9 / 10)
"""Of a cluster's groups, where its curve is measured."""
WORST = 1e3
"""Nats; what an output that is not finite counts as."""
ROUNDS = 16
"""How often what a block saves is counted anew on the way: it depends on the other widths."""
NODES = 10_000
"""Of the search tree of an integer program; at the limit the best solution so far is taken."""


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


@dataclass(frozen=True)
class Measured:
    """The `curves` of all clusters, `sizes` groups large, and how they came about: at which `shares`, on how many
    `samples`, with a `refit` of the readers or without, in `seconds`.
    """

    curves: Mapping[str, Curve]
    sizes: Mapping[str, int]
    shares: tuple[float, ...]
    samples: int
    refit: bool
    seconds: float


def measure(
    analysis: Analysis,
    clusters: Sequence[Cluster],
    scores: Mapping[str, Scores],
    samples: Sequence[Tensor],
    state: Mapping[str, Tensor],
    *,
    readers: Mapping[str, tuple[ReaderInput, ...]] | None = None,
    seconds: float | None = None,
    apart: Apart | None = None,
    progress: Progress | None = None,
) -> Measured:
    """The curve of each of `clusters`, whose groups go in the order of their `scores`, on `samples`.

    `samples`: a tensor for each input. `apart` says how far other outputs are from the dense ones; None: by the
    divergence of class shares in the first. `state`: the weights that count as dense. `readers`: with them, whatever
    reads a cluster is fitted anew each time before the outputs are compared. Each masked network runs only from the
    first node on that it changes; memory is that of one forward pass of all samples, and of one more set of weights.
    `seconds`: a budget, None for none. A first run of the dense network is timed, and says how many of `PLANS` fit:
    fewer shares, then fewer samples; the last one is taken whatever it costs. Deterministic for the same shares and
    samples.
    """
    began = time.perf_counter()
    captured = analysis.captured.with_state(state)
    trials = _trials(analysis, captured, clusters)
    shares: tuple[float, ...] = SHARES
    if seconds is not None:
        shares, count = _fitting(captured, clusters, samples, trials, seconds)
        samples = [one[:: len(one) // count][:count] for one in samples]
    counts = {c.name: _points(c.size, shares) for c in clusters}
    tried = [
        _Trial(first, cluster, n) for first, cluster in sorted(trials, key=lambda t: t[0]) for n in counts[cluster.name]
    ]

    def changed(trial: _Trial) -> Captured:
        gone = lowest(scores[trial.cluster.name], trial.count)
        refit = refitted(trial.cluster, gone, captured.state, readers) if readers is not None else {}
        return captured.with_state(refit).fold(analysis.masks({trial.cluster.name: gone}))

    total: dict[tuple[str, int], float] = {}
    chunks = _chunks(captured, samples)
    with (progress or Progress()).bar("curves", len(chunks) * len(tried)) as bar:
        for number, chunk in enumerate(chunks):
            for done, (trial, found) in enumerate(
                _divergences(captured, chunk, tried, changed, apart or class_shares), 1
            ):
                key = trial.cluster.name, trial.count
                total[key] = total.get(key, 0.0) + found / len(chunks)
                bar(number * len(tried) + done, trial.cluster.name)
    made = {name: convex(at, [total[name, n] for n in at]) for name, at in counts.items()}
    return Measured(
        curves=made,
        sizes={c.name: c.size for c in clusters},
        shares=shares,
        samples=sum(len(chunk[0]) for chunk in chunks),
        refit=readers is not None,
        seconds=time.perf_counter() - began,
    )


PLANS = ((SHARES, 1), ((1 / 4, 1 / 2, 9 / 10), 1), ((1 / 4, 1 / 2, 9 / 10), 2), ((1 / 2,), 2), ((1 / 2,), 8))
"""Where curves are measured, and on which part of the samples (one in so many): what is tried in a given time."""


def _fitting(
    captured: Captured,
    clusters: Sequence[Cluster],
    samples: Sequence[Tensor],
    trials: Sequence[tuple[int, Cluster]],
    seconds: float,
) -> tuple[tuple[float, ...], int]:
    """The shares, and how many samples: the first of `PLANS` that a run of the dense network says will fit."""
    began = time.perf_counter()
    chunks = _chunks(captured, samples)
    spent = [0.0]
    _, values, dies = _start(captured, chunks[0])
    _finish(list(captured.program.graph.nodes), 0, values, dies, spent)
    # What is left to run from each node on, for all samples.
    left = [len(chunks) * (spent[-1] - at) for at in spent]
    each = {cluster.name: left[min(first, len(left) - 1)] for first, cluster in trials}
    for shares, divisor in PLANS:
        wanted = sum(len(_points(c.size, shares)) * each[c.name] for c in clusters) / divisor
        if wanted <= seconds - (time.perf_counter() - began):
            break
    return shares, max(1, len(samples[0]) // divisor)


def _chunks(captured: Captured, samples: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """All samples at once where the batch is free, else in batches of the program's own size."""
    if captured.dynamic_batch:
        # A batch of one is a case of its own to torch.export.
        return [tuple(torch.cat([one, one]) if len(one) == 1 else one for one in samples)]
    return chunked(captured, samples)


@dataclass(frozen=True)
class Point:
    """One row of a table of curves: `removed` of a cluster's groups `of` so many, for `divergence` nats."""

    cluster: str
    removed: int
    of: int
    divergence: float


def points(measured: Measured) -> list[Point]:
    """The corners of all curves."""
    return [
        Point(name, removed, measured.sizes[name], divergence)
        for name, curve in measured.curves.items()
        for removed, divergence in zip(curve.removed, curve.divergence, strict=True)
    ]


def _points(size: int, shares: Sequence[float] = SHARES) -> list[int]:
    return sorted({n for n in (math.floor(size * share + 0.5) for share in shares) if 0 < n < size})


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


@dataclass(frozen=True)
class _Trial:
    """The lowest `count` groups of a cluster go; the graph's node number `first` is the first that this changes."""

    first: int
    cluster: Cluster
    count: int


def _trials(analysis: Analysis, captured: Captured, clusters: Sequence[Cluster]) -> list[tuple[int, Cluster]]:
    """(the first node that changes when groups of a cluster go, cluster)."""
    nodes = list(captured.program.graph.nodes)
    users: dict[Hashable, int] = {}
    named = captured.targets
    places = {node: at for at, node in enumerate(nodes)}
    for node in nodes:
        target = named.get(node.name) if node.op == "placeholder" else None
        if target is not None and target in captured.state and node.users:
            key = memory_of(target, captured.state[target])  # tied tensors change together
            users[key] = min(users.get(key, len(nodes)), *(places[user] for user in node.users), len(nodes))
    made = []
    for cluster in clusters:
        touched = analysis.masks({cluster.name: np.ones(cluster.size, dtype=bool)})
        first = (users.get(memory_of(name, captured.state[name]), len(nodes)) for name in touched)
        made.append((min(first, default=len(nodes)), cluster))
    return made


def _start(
    captured: Captured, samples: Sequence[Tensor]
) -> tuple[dict[str, fx.Node], dict[fx.Node, Any], dict[fx.Node, list[fx.Node]]]:
    """Placeholders by name, the values they begin with, and which nodes' values each node is the last to need."""
    graph = captured.program.graph
    holders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    feeds = feeds_of(captured.program, tuple(samples), captured.state)
    values: dict[fx.Node, Any] = {
        node: value.clone() if isinstance(value := feeds[node.name], Tensor) and _written(node) else value
        for node in holders.values()
    }
    return holders, values, last_uses(graph)


def _divergences(
    captured: Captured,
    samples: Sequence[Tensor],
    tried: Sequence[_Trial],
    changed: Callable[[_Trial], Captured],
    apart: Apart,
) -> Iterator[tuple[_Trial, float]]:
    """The divergence of each trial; they come in the order of the first node that they change."""
    nodes = list(captured.program.graph.nodes)
    named = captured.targets
    holders, values, dies = _start(captured, samples)
    dense = apart(_finish(nodes, 0, dict(values), dies))
    at = 0
    for trial in tried:
        if trial.first >= len(nodes):
            yield trial, 0.0  # nothing reads it
            continue
        at = _advance(nodes, at, trial.first, values, dies)
        state = changed(trial).state
        other = {
            holders[arg]: state[target]
            for arg, target in named.items()
            if target in state and state[target] is not captured.state[target]
        }
        found = dense(_finish(nodes, at, {**values, **other}, dies))
        yield trial, min(found, WORST) if math.isfinite(found) else WORST


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
    nodes: Sequence[fx.Node],
    start: int,
    values: dict[fx.Node, Any],
    dies: Mapping[fx.Node, list[fx.Node]],
    spent: list[float] | None = None,
) -> tuple[Tensor, ...]:
    """The outputs, run from `start` on; what was there before is not written to. `spent` takes the seconds since
    the beginning after each node.
    """
    began = time.perf_counter()
    shared = set(values)
    with torch.no_grad():
        for node in nodes[start:]:
            if node.op == "output":
                returned: Any = node.args[0]
                return tuple(values[one] for one in returned)
            target = node.args[0] if node.op == "call_function" and node.args and writes(node) else None
            if target in shared and isinstance(target, fx.Node):
                values[target] = values[target].clone()
                shared.discard(target)
            _run(node, values)
            for dead in dies.get(node, ()):
                values.pop(dead, None)
            if spent is not None:
                spent.append(time.perf_counter() - began)
    raise ValueError("the graph has no output")


def _run(node: fx.Node, values: dict[fx.Node, Any]) -> None:
    if node.op == "call_function":
        call: Any = node.target
        args = fx.node.map_arg(node.args, values.__getitem__)
        values[node] = call(*args, **fx.node.map_arg(node.kwargs, values.__getitem__))


Apart = Callable[[Sequence[Tensor]], Callable[[Sequence[Tensor]], float]]
"""Dense outputs -> how far other outputs are from them, mean over samples."""


def class_shares(dense: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], float]:
    """Kullback and Leibler's divergence in nats of the first output, taken as logits."""
    wanted = _log_shares(dense[0])
    return lambda other: float((wanted.exp() * (wanted - _log_shares(other[0]))).sum(-1).mean())


def _log_shares(output: Tensor) -> Tensor:
    """Log softmax over the classes, (samples and places, classes): the last of three dimensions, else the second."""
    value = output.double()
    if value.dim() < 2:
        value = value.reshape(1, -1)
    return value.movedim(1 if value.dim() != 3 else 2, -1).flatten(0, -2).log_softmax(-1)


# ── choosing ─────────────────────────────────────────────────────────────────────────────────────────────────────────

Level = Mapping[str, int]
"""Cluster -> how many blocks of it go: an index into the widths that it may have, from all of its groups down."""


def choose(
    analysis: Analysis,
    clusters: Sequence[Cluster],
    scores: Mapping[str, Scores],
    curves: Mapping[str, Curve],
    budget: Budget,
    *,
    exact: bool = False,
) -> Removed:
    """Cluster name -> True = goes: as few multiply-accumulates as `budget` would leave layer by layer, spread by the
    curves.

    Greedily, the cheapest block per multiply-accumulate first; `exact` improves on that by integer programming, as long
    as the curves promise a smaller loss for no more multiply-accumulates. Alignment and floors hold in every cluster; a
    cluster that `budget` overrides, or whose groups cost nothing, is cut as it would be layer by layer.
    """
    widths = _Widths(analysis, clusters, scores, curves, budget)
    level = _greedy(widths)
    return widths.removed(_improved(widths, level) if exact else level)


class _Widths:
    """What may be chosen, what it saves and what it loses."""

    def __init__(
        self,
        analysis: Analysis,
        clusters: Sequence[Cluster],
        scores: Mapping[str, Scores],
        curves: Mapping[str, Curve],
        budget: Budget,
    ) -> None:
        self.analysis, self.scores, self.curves = analysis, scores, curves
        self.by_layer = allocate(clusters, scores, budget)
        self.goal = analysis.estimate(self.by_layer).macs
        fixed = overridden([c.name for c in clusters], budget.overrides)
        self.allowed = {c.name: widths_allowed(c, budget) for c in clusters if c.name not in fixed}
        self.free = [c for c in clusters if c.name in self.allowed and len(self.allowed[c.name]) > 1]
        self.last = {c.name: len(self.allowed[c.name]) - 1 for c in self.free}
        start = dict.fromkeys(self.last, 0)
        self.whole = self.macs(start)
        self.free = [c for c in self.free if self.macs({**start, c.name: self.last[c.name]}) < self.whole]

    def removed(self, level: Level) -> Removed:
        """The groups that go."""
        gone = {c.name: lowest(self.scores[c.name], self._gone(c, level[c.name])) for c in self.free}
        return self.by_layer | gone

    def macs(self, level: Level) -> int:
        """What is left."""
        return self.analysis.estimate(self.removed(level)).macs

    def lost(self, level: Level) -> float:
        """The divergences that the curves promise, added up."""
        return sum(self._divergence(c, level[c.name]) for c in self.free)

    def regained(self, cluster: Cluster, at: int) -> float:
        """By how much the divergence falls when the block number `at`, counted from 1, comes back."""
        return self._divergence(cluster, at) - self._divergence(cluster, at - 1)

    def steps(self, cluster: Cluster, level: Level, macs: int, first: int, last: int) -> Steps:
        """The blocks from level `first` to `last`; each group saves what it does beside `level`, which has `macs`."""
        at, width = level[cluster.name], self.allowed[cluster.name]
        beside = at + 1 if at < self.last[cluster.name] else at - 1
        each = abs(macs - self.macs({**level, cluster.name: beside})) / abs(width[at] - width[beside])
        blocks = range(first, last)
        return Steps(
            saved=tuple(each * (width[n] - width[n + 1]) for n in blocks),
            lost=tuple(self.regained(cluster, n + 1) for n in blocks),
        )

    def _gone(self, cluster: Cluster, at: int) -> int:
        return cluster.size - self.allowed[cluster.name][at]

    def _divergence(self, cluster: Cluster, at: int) -> float:
        return self.curves[cluster.name].at(self._gone(cluster, at))


def _greedy(widths: _Widths) -> dict[str, int]:
    now = {c.name: 0 for c in widths.free}
    # What is still lacking after the last round goes in further ones: every block saves less the more have gone.
    for left in itertools.chain(range(ROUNDS, 0, -1), itertools.repeat(1)):
        macs = widths.macs(now)
        waiting = [c for c in widths.free if now[c.name] < widths.last[c.name]]
        if macs <= widths.goal or not waiting:
            break
        steps = [widths.steps(c, now, macs, now[c.name], widths.last[c.name]) for c in waiting]
        taken = cheapest(steps, (macs - widths.goal) / left)
        now |= {c.name: now[c.name] + n for c, n in zip(waiting, taken, strict=True)}
    # The last block may have saved more than was wanted: what fits again comes back, the dearest first.
    back = [(-widths.regained(c, now[c.name]), at) for at, c in enumerate(widths.free) if now[c.name]]
    heapq.heapify(back)
    while back and widths.goal < widths.whole:
        _, at = heapq.heappop(back)
        c = widths.free[at]
        fewer = {**now, c.name: now[c.name] - 1}
        if widths.macs(fewer) <= widths.goal:  # else it never will: the more comes back, the more a block costs
            now = fewer
            if now[c.name]:
                heapq.heappush(back, (-widths.regained(c, now[c.name]), at))
    return now


def _improved(widths: _Widths, level: dict[str, int]) -> dict[str, int]:
    """`level`, or one that loses less and leaves no more multiply-accumulates than the goal.

    What a block saves depends on the other widths, so that the integer program holds near a level only: it may move
    each cluster by as many blocks as `reach` says, half as many whenever that did not help.
    """
    best, lost = level, widths.lost(level)
    reach = max(widths.last.values(), default=0)
    margin = 0.0
    for _ in range(ROUNDS):
        if not reach or widths.goal >= widths.whole:
            break
        macs = widths.macs(best)
        ends = {
            c.name: (max(0, best[c.name] - reach), min(widths.last[c.name], best[c.name] + reach)) for c in widths.free
        }
        steps = [widths.steps(c, best, macs, *ends[c.name]) for c in widths.free]
        saved_now = sum(
            sum(own.saved[: best[c.name] - ends[c.name][0]]) for c, own in zip(widths.free, steps, strict=True)
        )
        taken = exactly(steps, saved_now + macs - widths.goal + margin)
        new = {c.name: ends[c.name][0] + n for c, n in zip(widths.free, taken, strict=True)}
        over = widths.macs(new) - widths.goal
        if over <= 0 and widths.lost(new) < lost * (1 - 1e-9):
            best, lost, margin = new, widths.lost(new), 0.0
        else:  # as much more has to be saved as the straight line was wrong by
            margin = margin + over if over > 0 else 0.0
            reach //= 2
    return best


@dataclass(frozen=True)
class Price:
    """What a cluster's width costs: `gone` groups for `divergence` (nats, as its curve has it).

    `last`: of the last block of groups that went, `next`: of the block that would go next, both in nats per million
    multiply-accumulates that it saves; None where there is none.
    """

    cluster: str
    gone: int
    divergence: float
    last: float | None
    next: float | None


def prices(
    analysis: Analysis,
    clusters: Sequence[Cluster],
    scores: Mapping[str, Scores],
    curves: Mapping[str, Curve],
    budget: Budget,
    removed: Removed,
) -> list[Price]:
    """What each cluster's part of a choice costs, each beside the others as chosen."""
    macs, made = analysis.estimate(removed).macs, []
    for cluster in clusters:
        allowed, curve = widths_allowed(cluster, budget), curves[cluster.name]
        gone = int(removed[cluster.name].sum())

        def price(to: int | None, cluster: Cluster = cluster, curve: Curve = curve, gone: int = gone) -> float | None:
            if to is None:
                return None
            other = {**removed, cluster.name: lowest(scores[cluster.name], to)}
            saved = abs(analysis.estimate(other).macs - macs) / 1e6
            return abs(curve.at(to) - curve.at(gone)) / saved if saved else None

        more = [cluster.size - width for width in allowed if cluster.size - width > gone]
        fewer = [cluster.size - width for width in allowed if cluster.size - width < gone]
        last, following = price(fewer[-1] if fewer else None), price(more[0] if more else None)
        made.append(Price(cluster.name, gone, curve.at(gone), last, following))
    return made


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


def exactly(steps: Sequence[Steps], wanted: float) -> list[int]:
    """How many steps of each to take so that `wanted` is saved and as little as possible is lost, by scipy's `milp`.

    A step is taken only after those before it. Where all steps together save less, all are taken.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, vstack

    saved = np.array([value for own in steps for value in own.saved])
    lost = np.array([value for own in steps for value in own.lost])
    if wanted <= 0 or saved.sum() <= wanted:
        return [len(own.saved) if wanted > 0 else 0 for own in steps]
    ends = np.cumsum([len(own.saved) for own in steps])
    after = np.array([at for at in range(1, len(saved)) if at not in set(ends.tolist())], dtype=int)
    rows = np.arange(len(after))
    order = csr_array(
        (np.repeat([1.0, -1.0], len(after)), (np.tile(rows, 2), np.concatenate([after - 1, after]))),
        shape=(len(after), len(saved)),
    )
    scale = wanted, max(float(lost.max()), 1e-30)
    found = milp(
        lost / scale[1],
        constraints=LinearConstraint(
            vstack([csr_array(saved[None] / scale[0]), order]), np.concatenate([[1 - 1e-12], np.zeros(len(after))])
        ),
        integrality=np.ones(len(saved)),
        bounds=Bounds(0, 1),
        options={"node_limit": NODES},
    )
    if found.x is None:
        return cheapest(steps, wanted)
    return [int(part.round().sum()) for part in np.split(found.x, ends[:-1])]


def _price(own: Steps, at: int) -> float:
    return own.lost[at] / own.saved[at] if own.saved[at] > 0 else math.inf
