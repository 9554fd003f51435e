"""What each layer's width is worth, measured: the divergence of the outputs from the dense ones as groups go.

For every cluster the network is run with the lowest sixteenth, eighth, quarter, ... of its groups masked, and what
reads them fitted anew; the divergence of Kullback and Leibler to the dense outputs on unlabelled samples, made convex,
is the cluster's curve. Widths follow from the curves in `widths`. Forward passes only.
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

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
from pipeline.selection.allocation import lowest
from pipeline.selection.criteria import Scores
from pipeline.selection.refit import Refits, flops

SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 9 / 10)
"""Of a cluster's groups, where its curve is measured."""
FAINT = 1e-7
"""Nats, where all that was tried went: what outputs in float32 do not tell from nothing."""
WORST = 1e3
"""Nats; what an output that is not finite counts as."""


@dataclass(frozen=True)
class Curve:
    """Divergence (nats, mean over samples) after the lowest `removed` groups went: convex, and 0 at 0."""

    removed: tuple[int, ...]
    divergence: tuple[float, ...]

    def at(self, removed: float) -> float:
        """Between two points, and beyond the last two, the power of `removed` that meets both; up to the first, that of
        the first two. On straight lines every width between two points would cost alike, and choices would end on the
        points: the groups that go first are the ones that cost the least.
        """
        if removed <= 0 or len(self.removed) == 1:
            return 0.0
        x, y = self._logarithms
        at = math.log(removed)
        end = min(max(bisect_left(x, at), 1), len(x) - 1)
        power = (y[end] - y[end - 1]) / (x[end] - x[end - 1]) if end else 1.0
        return math.exp(y[end] + power * (at - x[end]))

    @functools.cached_property
    def _logarithms(self) -> tuple[list[float], list[float]]:
        """Of the points behind the first: widths ask for thousands of places of the same curve."""
        counts = np.array(self.removed[1:], float)
        faint = FAINT * counts / counts[-1]
        return np.log(counts).tolist(), np.log(np.maximum(self.divergence[1:], faint)).tolist()


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
    reads a cluster is fitted anew each time before the outputs are compared; on samples that they were observed on, the
    last layers look as if they could do with less than they can. Each masked network runs only from the
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
        shares, count = _fitting(captured, clusters, samples, trials, seconds, readers)
        samples = [one[:: len(one) // count][:count] for one in samples]
    counts = {c.name: _points(c.size, shares) for c in clusters}
    tried = [
        _Trial(first, cluster, n) for first, cluster in sorted(trials, key=lambda t: t[0]) for n in counts[cluster.name]
    ]

    @functools.lru_cache(maxsize=1)  # the trials of a cluster follow each other
    def refits(name: str) -> Refits:
        cluster = next(c for c in clusters if c.name == name)
        return Refits(cluster, scores[name], captured.state, readers or {})

    def changed(trial: _Trial) -> Captured:
        gone = lowest(scores[trial.cluster.name], trial.count)
        refit = refits(trial.cluster.name).without(trial.count) if readers is not None else {}
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


def to_json(measured: Measured) -> dict[str, Any]:
    """Plain values, which `from_json` reads back to the same."""
    return {**asdict(measured), "curves": {name: asdict(curve) for name, curve in measured.curves.items()}}


def from_json(value: Mapping[str, Any]) -> Measured:
    """What `to_json` gave."""
    curves = {
        name: Curve(tuple(curve["removed"]), tuple(curve["divergence"])) for name, curve in value["curves"].items()
    }
    return Measured(
        curves=curves,
        sizes=dict(value["sizes"]),
        shares=tuple(value["shares"]),
        samples=int(value["samples"]),
        refit=bool(value["refit"]),
        seconds=float(value["seconds"]),
    )


def digest(tensors: Sequence[Tensor]) -> str:
    """Of values in order, whatever their names."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        found.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


FEW = 1 / 4, 1 / 2, 9 / 10
PLANS = ((SHARES, 1), ((1 / 8, 1 / 4, 1 / 2, 3 / 4, 9 / 10), 1), (FEW, 1), (FEW, 2), ((1 / 2,), 2), ((1 / 2,), 8))
"""Where curves are measured, and on which part of the samples (one in so many): what is tried in a given time."""


def _fitting(
    captured: Captured,
    clusters: Sequence[Cluster],
    samples: Sequence[Tensor],
    trials: Sequence[tuple[int, Cluster]],
    seconds: float,
    readers: Mapping[str, tuple[ReaderInput, ...]] | None,
) -> tuple[tuple[float, ...], int]:
    """The shares, and how many samples: the first of `PLANS` that a run of the dense network says will fit, and of a
    factor as `Refits` computes it.
    """
    began = time.perf_counter()
    chunks = _chunks(captured, samples)
    spent = [0.0]
    _, values, dies = _start(captured, chunks[0])
    _finish(list(captured.program.graph.nodes), 0, values, dies, spent)
    # What is left to run from each node on, for all samples.
    left = [len(chunks) * (spent[-1] - at) for at in spent]
    each = {cluster.name: left[min(first, len(left) - 1)] for first, cluster in trials}
    second = _flops_in_a_second() if readers else 1.0
    for shares, divisor in PLANS:
        wanted = sum(len(_points(c.size, shares)) * each[c.name] for c in clusters) / divisor
        # Where the batch is fixed, every chunk has its own round of them.
        rounds = len(chunks) / divisor if len(chunks) > 1 else 1
        wanted += sum(
            rounds * flops(c, _points(c.size, shares), captured.state, readers or {}) / second for c in clusters
        )
        if wanted <= seconds - (time.perf_counter() - began):
            break
    return shares, max(1, len(samples[0]) // divisor)


def _flops_in_a_second(size: int = 768) -> float:
    """Of a Cholesky factor; the first one that a process computes takes longer."""
    took = []
    for _ in range(2):
        began = time.perf_counter()
        torch.linalg.cholesky(torch.eye(size, dtype=torch.float64))
        took.append(time.perf_counter() - began)
    return size**3 / 3 / max(min(took), 1e-9)


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


@dataclass(frozen=True)
class _Masked:
    """Whole tensors are masked; `first` as in `_Trial`."""

    first: int
    name: str
    masks: Mapping[str, np.ndarray[Any, Any]]


_Tried = TypeVar("_Tried", _Trial, _Masked)


def masked(
    analysis: Analysis,
    masks: Mapping[str, Mapping[str, np.ndarray[Any, Any]]],
    samples: Sequence[Tensor],
    state: Mapping[str, Tensor],
    apart: Apart | None = None,
    fitted: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """The divergence (nats) of the outputs on `samples` when masks (tensor -> False = goes) are on, each set of them
    by its name, one after another; with the weights `fitted` beside them, where there are any.
    """
    captured = analysis.captured.with_state(state)
    first = _first_changed(captured)
    more = fitted or {}
    tried = sorted(
        (_Masked(min(map(first, [*one, *more]), default=0), name, one) for name, one in masks.items()),
        key=lambda t: t.first,
    )
    total: dict[str, float] = dict.fromkeys(masks, 0.0)
    chunks = _chunks(captured, samples)
    for chunk in chunks:
        for trial, found in _divergences(
            captured, chunk, tried, lambda trial: captured.with_state(more).fold(trial.masks), apart or class_shares
        ):
            total[trial.name] += found / len(chunks)
    return total


def _trials(analysis: Analysis, captured: Captured, clusters: Sequence[Cluster]) -> list[tuple[int, Cluster]]:
    """(the first node that changes when groups of a cluster go, cluster)."""
    first, last = _first_changed(captured), len(list(captured.program.graph.nodes))
    made = []
    for cluster in clusters:
        touched = analysis.masks({cluster.name: np.ones(cluster.size, dtype=bool)})
        made.append((min(map(first, touched), default=last), cluster))
    return made


def _first_changed(captured: Captured) -> Callable[[str], int]:
    """Name of a tensor -> number of the first node that reads it, under whatever name; behind the last where none."""
    nodes = list(captured.program.graph.nodes)
    users: dict[Hashable, int] = {}
    named = captured.targets
    places = {node: at for at, node in enumerate(nodes)}
    for node in nodes:
        target = named.get(node.name) if node.op == "placeholder" else None
        if target is not None and target in captured.state and node.users:
            key = memory_of(target, captured.state[target])  # tied tensors change together
            users[key] = min(users.get(key, len(nodes)), *(places[user] for user in node.users), len(nodes))
    return lambda name: users.get(memory_of(name, captured.state[name]), len(nodes))


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
    tried: Sequence[_Tried],
    changed: Callable[[_Tried], Captured],
    apart: Apart,
) -> Iterator[tuple[_Tried, float]]:
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
    value = output.detach().double()
    if value.dim() < 2:
        value = value.reshape(1, -1)
    return value.movedim(1 if value.dim() != 3 else 2, -1).flatten(0, -2).log_softmax(-1)
