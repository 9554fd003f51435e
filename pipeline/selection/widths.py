"""How wide every layer stays: the least loss, by the curves, for which all goals are met.

A multiple-choice knapsack (Kellerer, Pferschy and Pisinger 2004, chapter 11): each cluster has one of its widths, a
width loses what its curve says and saves what it does beside the widths of the others. Since that changes as they do,
it is solved again and again on the way, greedily or by an integer program.
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.channels.coupling.groups import Analysis, Cluster
from pipeline.selection.allocation import Budget, Removed, allocate, lowest, overridden, widths_allowed
from pipeline.selection.cost import Cost, Counted, missed, over
from pipeline.selection.criteria import Scores
from pipeline.selection.curves import Curve

ROUNDS = 16
"""How often what a block saves is counted anew on the way: it depends on the other widths."""
NODES = 10_000
"""Of the search tree of an integer program; at the limit the best solution so far is taken."""

REACH = 4
"""Blocks that an integer program may move a layer by at first: greedy choices are never far off."""
GAP = 1e-3
"""Of its loss, by which an integer program may miss the best one: far below what curves can tell, and three times as
fast on 200 layers.
"""
DOUBTS = 3
"""Branches tried in vain, one after another, before no more are."""
WORTH = 0.02
"""Of what a choice loses, that a branch must save: within that, curves do not tell."""

Level = Mapping[str, int]
"""Cluster -> how many blocks of it go: an index into the widths that it may have, from all of its groups down."""
Ends = Sequence[tuple[Cluster, int, int]]
"""Clusters, each with the first and the last of some of its levels."""


def choose(
    analysis: Analysis,
    clusters: Sequence[Cluster],
    scores: Mapping[str, Scores],
    curves: Mapping[str, Curve],
    budget: Budget,
    costs: Sequence[Cost] = (),
    *,
    exact: bool = False,
) -> Removed:
    """`choose_depth` where no branch may go as a whole: cluster name -> True = goes."""
    return choose_depth(analysis, clusters, scores, curves, budget, costs, exact=exact).removed


class Depth(NamedTuple):
    """What `choose_depth` chooses: cluster name -> True = goes, and the names of the branches that go as a whole; and
    by how much the goals are missed.
    """

    removed: Removed
    branches: tuple[str, ...]
    missed: float


def choose_depth(
    analysis: Analysis,
    clusters: Sequence[Cluster],
    scores: Mapping[str, Scores],
    curves: Mapping[str, Curve],
    budget: Budget,
    costs: Sequence[Cost] = (),
    branches: Mapping[str, tuple[Sequence[str], float]] | None = None,
    *,
    exact: bool = False,
) -> Depth:
    """Widths and branches with which the goals of all `costs` are met, spread by the curves. Without costs, as few
    multiply-accumulates are left as `budget` would leave layer by layer.

    Greedily, the cheapest block per saved share first; `exact` improves on that by integer programming, as long as the
    curves promise a smaller loss. Alignment and floors hold in every cluster; a cluster that `budget` overrides is cut
    as it would be layer by layer, one whose groups cost nothing as well where there are no `costs`. Where even the
    least widths do not meet the goals, these are what comes back.

    `branches`: name -> (clusters inside, divergence when it goes as a whole). One goes, and with it all groups inside,
    where the widths that are then enough elsewhere lose less by more than it costs, or where no widths are enough yet.
    The one that loses the least for what it saves beside the choice so far is tried first, alone and with those that
    were tried in vain before it. The search ends when the goals are met and `DOUBTS` of them in a row did not help;
    last, each that went is tried without again, and with one in its place that loses less.
    """
    fixed = overridden([c.name for c in clusters], budget.overrides)

    open_ = {n: b for n, b in (branches or {}).items() if costs and not set(b[0]) & fixed.keys()}

    @functools.cache  # the search comes back to sets that it had
    def solved(gone: frozenset[str]) -> tuple[float, float, Removed]:
        """By how much the goals are missed, what is lost, and the choice, once these branches are gone."""
        whole = {name: branch for name, branch in open_.items() if name in gone}
        widths = _Widths(analysis, clusters, scores, curves, budget, costs, whole)
        level = _greedy(widths)
        level = _improved(widths, level) if exact else level
        return widths.missed(widths.left(level)), widths.lost(level), widths.removed(level)

    chosen: frozenset[str] = frozenset()
    if not any(gone.any() for gone in solved(chosen)[2].values()):
        missed, _, removed = solved(chosen)
        return Depth(removed, (), missed)

    def by_price() -> list[str]:
        """The branches that are left, by what they lose for what they save beside the best choice so far."""
        beside = solved(chosen)[2]
        here, prices = sum(cost.of(beside) for cost in costs), {}
        for name, (inside, divergence) in open_.items():
            there = sum(cost.of({**beside, **{c: np.ones_like(beside[c]) for c in inside}}) for cost in costs)
            if name not in chosen and there < here:
                prices[name] = divergence / (here - there)
        return sorted(prices, key=lambda name: prices[name])

    def further() -> frozenset[str] | None:
        """More branches than are gone so far, with which the choice is better."""
        missed, lost, _ = solved(chosen)
        together = chosen
        for doubts, name in enumerate(by_price()):
            if doubts >= DOUBTS and not missed:
                break
            together |= {name}
            # Alone, or with those that were tried in vain before it: what one saves may be less than a block takes.
            for gone in (chosen | {name}, together):
                # What brings a goal nearer that is not met yet comes first; then what loses least.
                if solved(gone)[:2] < (missed, lost * (1 - WORTH)):
                    return gone
        return None

    while (more := further()) is not None:
        chosen = more
    # What went first may have to go no more, and one that loses less may do as well.
    for name in [name for name in open_ if name in chosen]:
        cheaper = [n for n, (_, lost) in open_.items() if n not in chosen and lost < open_[name][1]]
        for other in ((), *((n,) for n in sorted(cheaper, key=lambda n: open_[n][1])[:DOUBTS])):
            gone = chosen - {name} | {*other}
            if solved(gone)[:2] < solved(chosen)[:2]:
                chosen = gone
                break
    missed, _, removed = solved(chosen)
    return Depth(removed, tuple(name for name in open_ if name in chosen), missed)


def least(clusters: Sequence[Cluster], scores: Mapping[str, Scores], budget: Budget) -> Removed:
    """The narrowest choice that `budget` allows: what cannot be met with it cannot be met."""
    fixed = overridden([c.name for c in clusters], budget.overrides)
    by_layer = allocate(clusters, scores, budget)
    free = {c.name: lowest(scores[c.name], c.size - widths_allowed(c, budget)[-1]) for c in clusters}
    return free | {name: by_layer[name] for name in fixed}


class _Widths:
    """What may be chosen, what it saves and what it loses."""

    def __init__(
        self,
        analysis: Analysis,
        clusters: Sequence[Cluster],
        scores: Mapping[str, Scores],
        curves: Mapping[str, Curve],
        budget: Budget,
        costs: Sequence[Cost],
        gone: Mapping[str, tuple[Sequence[str], float]],
    ) -> None:
        self.scores = scores
        self.lost_whole = sum(divergence for _, divergence in gone.values())
        within = {name for inside, _ in gone.values() for name in inside}
        self.by_layer = allocate(clusters, scores, budget)
        fixed = overridden([c.name for c in clusters], budget.overrides)
        if costs:  # nothing else is asked for, so that nothing goes which saves nothing
            self.costs: Sequence[Cost] = costs
            self.by_layer |= {c.name: np.zeros(c.size, np.bool_) for c in clusters if c.name not in fixed}
        else:
            goal = analysis.estimate(self.by_layer).macs / max(analysis.macs, 1)
            self.costs = (Counted(analysis, "macs", max(goal, 1e-12), analysis.macs / 1e6),)
        self.by_layer |= {c.name: np.ones(c.size, np.bool_) for c in clusters if c.name in within}
        left_open = [c for c in clusters if c.name not in fixed and c.name not in within]
        self.allowed = {c.name: widths_allowed(c, budget) for c in left_open}
        self.free = [c for c in clusters if c.name in self.allowed and len(self.allowed[c.name]) > 1]
        self.last = {c.name: len(self.allowed[c.name]) - 1 for c in self.free}
        self._divergences = {
            c.name: [curves[c.name].at(self._gone(c, at)) for at in range(self.last[c.name] + 1)] for c in self.free
        }
        self._lowest: dict[tuple[str, int], npt.NDArray[np.bool_]] = {}
        start = dict.fromkeys(self.last, 0)
        self.dense = self.left(start)
        pays = self._pays(start, self.last, self.dense)
        if costs:  # beside narrow layers a table may know of a saving that it does not beside whole ones
            pays |= self._pays(self.last, start, self.left(self.last))
        self.free = [c for c in self.free if c.name in pays]

    def _pays(self, level: Level, other: Level, left: Sequence[float]) -> set[str]:
        """Clusters whose cost changes for the better with fewer groups: each alone at its `other` level beside `level`,
        of which so much is `left`.
        """
        counts = [(c, (self.allowed[c.name][other[c.name]],)) for c in self.free]
        removed, found = self.removed(level), set()
        for cost, here in zip(self.costs, left, strict=True):
            there = (one for (one,) in cost.along(removed, counts))
            for (cluster, _), value in zip(counts, there, strict=True):
                if (value < here) if other[cluster.name] > level[cluster.name] else (here < value):
                    found.add(cluster.name)
        return found

    def removed(self, level: Level) -> Removed:
        """The groups that go."""
        return self.by_layer | {c.name: self._flags(c, level[c.name]) for c in self.free}

    def _flags(self, cluster: Cluster, at: int) -> npt.NDArray[np.bool_]:
        """The lowest groups of a cluster, as many as go at a level: asked for again and again."""
        key = cluster.name, at
        if key not in self._lowest:
            self._lowest[key] = lowest(self.scores[cluster.name], self._gone(cluster, at))
        return self._lowest[key]

    def left(self, level: Level) -> list[float]:
        """Of each cost."""
        removed = self.removed(level)
        return [cost.of(removed) for cost in self.costs]

    def missed(self, left: Sequence[float]) -> float:
        """By how much all goals together are missed; 0 where they are met."""
        return missed(self.costs, left)

    def lost(self, level: Level) -> float:
        """The divergences that the curves promise, added up."""
        return self.lost_whole + sum(self._divergence(c, level[c.name]) for c in self.free)

    def regained(self, cluster: Cluster, at: int) -> float:
        """By how much the divergence falls when the block number `at`, counted from 1, comes back."""
        return self._divergence(cluster, at) - self._divergence(cluster, at - 1)

    def saved(self, level: Level, ends: Ends) -> list[list[list[float]]]:
        """Per cluster of `ends` and cost: what each block between the cluster's two levels saves beside `level`,
        relative to the goal.
        """
        counts = [(c, self.allowed[c.name][first : last + 1]) for c, first, last in ends]
        removed = self.removed(level)
        by_cost = [
            [[(a - b) / cost.goal for a, b in itertools.pairwise(left)] for left in cost.along(removed, counts)]
            for cost in self.costs
        ]
        return [list(one) for one in zip(*by_cost, strict=True)]

    def steps(self, level: Level, ends: Ends, unmet: Sequence[bool]) -> list[Steps]:
        """The blocks between each cluster's two levels: what they save together of the goals that are `unmet`."""
        made = []
        for (cluster, first, last), saved in zip(ends, self.saved(level, ends), strict=True):
            open_ = list(itertools.compress(saved, unmet))
            together = tuple(map(sum, zip(*open_, strict=True)))
            made.append(Steps(together, self.lost_by(cluster, first, last)))
        return made

    def lost_by(self, cluster: Cluster, first: int, last: int) -> tuple[float, ...]:
        """What each block from level `first` to `last` loses."""
        return tuple(self.regained(cluster, at + 1) for at in range(first, last))

    def _gone(self, cluster: Cluster, at: int) -> int:
        return cluster.size - self.allowed[cluster.name][at]

    def _divergence(self, cluster: Cluster, at: int) -> float:
        return self._divergences[cluster.name][at]


def _greedy(widths: _Widths) -> dict[str, int]:
    now = {c.name: 0 for c in widths.free}
    # What is still lacking after the last round goes in further ones: every block saves less the more have gone.
    for rounds in itertools.chain(range(ROUNDS, 0, -1), itertools.repeat(1)):
        left = widths.left(now)
        missed = widths.missed(left)
        waiting = [c for c in widths.free if now[c.name] < widths.last[c.name]]
        if not missed or not waiting:
            break
        unmet = [over(value, cost.goal) > 0 for value, cost in zip(left, widths.costs, strict=True)]
        steps = widths.steps(now, [(c, now[c.name], widths.last[c.name]) for c in waiting], unmet)
        taken = cheapest(steps, missed / rounds)
        if not any(taken):  # nothing that is left saves anything
            break
        now |= {c.name: now[c.name] + n for c, n in zip(waiting, taken, strict=True)}
    if widths.missed(widths.left(now)) and not widths.missed(widths.left(widths.last)):
        now = {c.name: widths.last[c.name] for c in widths.free}  # what saves only together, no single step leads to
    # The last block may have saved more than was wanted: what fits again comes back, the dearest first.
    back = [(-widths.regained(c, now[c.name]), at) for at, c in enumerate(widths.free) if now[c.name]]
    heapq.heapify(back)
    while back:
        _, at = heapq.heappop(back)
        c = widths.free[at]
        fewer = {**now, c.name: now[c.name] - 1}
        if not widths.missed(widths.left(fewer)):  # else it never will: the more comes back, the more a block costs
            now = fewer
            if now[c.name]:
                heapq.heappush(back, (-widths.regained(c, now[c.name]), at))
    return now


def _improved(widths: _Widths, level: dict[str, int]) -> dict[str, int]:
    """`level`, or one that loses less and meets the goals as well.

    What a block saves depends on the other widths, so that the integer program holds near a level only: it may move
    each cluster by as many blocks as `reach` says, half as many whenever that did not help, until it gains no more than
    `GAP`.
    """
    best, lost = level, widths.lost(level)
    if not widths.free or widths.missed(widths.left(best)) or not widths.missed(widths.dense):
        return best
    reach = min(REACH, max(widths.last.values(), default=0))
    margin = np.zeros(len(widths.costs))
    for _ in range(ROUNDS):
        if not reach:
            break
        ends = [(c, max(0, best[c.name] - reach), min(widths.last[c.name], best[c.name] + reach)) for c in widths.free]
        saved = widths.saved(best, ends)
        steps = [
            Steps(tuple(one[0]), widths.lost_by(*end), tuple(map(tuple, one[1:])))
            for end, one in zip(ends, saved, strict=True)
        ]
        left = widths.left(best)
        wanted = []
        for number, cost in enumerate(widths.costs):
            now = sum(sum(one[number][: best[c.name] - first]) for (c, first, _), one in zip(ends, saved, strict=True))
            wanted.append(now + left[number] / cost.goal - 1 + float(margin[number]))
        taken = exactly(steps, wanted[0], wanted[1:])
        new = {c.name: first + n for (c, first, _), n in zip(ends, taken, strict=True)}
        missing = np.array([over(v, cost.goal) for v, cost in zip(widths.left(new), widths.costs, strict=True)])
        if (missing > 0).any():  # as much more has to be saved as the straight line was wrong by
            margin = margin + np.maximum(missing, 0)
            reach //= 2
            continue
        before, less = lost, widths.lost(new)
        if less < lost:
            best, lost = new, less
        if not less < before * (1 - GAP):
            if not margin.any():  # no smaller gains are told, and a smaller reach holds no choice that this one did not
                break
            reach //= 2
        margin = np.zeros(len(widths.costs))
    return best


@dataclass(frozen=True)
class Price:
    """What a cluster's width costs: `gone` groups for `divergence` (nats, as its curve has it).

    `last`: of the last block of groups that went, `next`: of the block that would go next, both in nats per `unit` that
    it saves; None where there is none.
    """

    cluster: str
    gone: int
    divergence: float
    last: float | None
    next: float | None
    unit: str = "million MACs"


def prices(
    analysis: Analysis,
    clusters: Sequence[Cluster],
    curves: Mapping[str, Curve],
    budget: Budget,
    removed: Removed,
    cost: Cost | None = None,
) -> list[Price]:
    """What each cluster's part of a choice costs, each beside the others as chosen: by `cost`, else by
    multiply-accumulates.
    """
    cost = cost or Counted(analysis, "macs", 1.0, analysis.macs / 1e6)
    (unit, dense), made = cost.unit, []
    for cluster in clusters:
        allowed, curve = widths_allowed(cluster, budget), curves[cluster.name]
        gone = int(removed[cluster.name].sum())
        now = cluster.size - gone

        def price(
            to: int | None, cluster: Cluster = cluster, curve: Curve = curve, gone: int = gone, now: int = now
        ) -> float | None:
            if to is None:
                return None
            ((here, there),) = cost.along(removed, [(cluster, (now, cluster.size - to))])
            saved = abs(here - there) * dense
            return abs(curve.at(to) - curve.at(gone)) / saved if saved else None

        more = [cluster.size - width for width in allowed if cluster.size - width > gone]
        fewer = [cluster.size - width for width in allowed if cluster.size - width < gone]
        last, following = price(fewer[-1] if fewer else None), price(more[0] if more else None)
        made.append(Price(cluster.name, gone, curve.at(gone), last, following, unit))
    return made


@dataclass(frozen=True)
class Steps:
    """What a cluster can give up, block after block: `saved` of each, and what is `lost` by it. `further`: what it
    saves of further costs.
    """

    saved: tuple[float, ...]
    lost: tuple[float, ...]
    further: tuple[tuple[float, ...], ...] = ()


def cheapest(steps: Sequence[Steps], wanted: float) -> list[int]:
    """How many steps of each to take so that `wanted` is saved: always those that lose the least per unit saved.

    Steps go together where a later one is cheaper (a width that saves nothing until the next one does), so that no
    later bunch is cheaper than an earlier one: optimal among all choices that save as much as this one does. Ties go to
    the first; where all steps together save less, all that save anything are taken.
    """
    bunches = [_bunched(own) for own in steps]
    taken = [0] * len(steps)
    at = [0] * len(steps)
    waiting = [(bunch[0][2], number) for number, bunch in enumerate(bunches) if bunch]
    heapq.heapify(waiting)
    saved = 0.0
    while saved < wanted and waiting:
        _, number = heapq.heappop(waiting)
        count, gain, _ = bunches[number][at[number]]
        saved += gain
        taken[number] += count
        at[number] += 1
        if at[number] < len(bunches[number]):
            heapq.heappush(waiting, (bunches[number][at[number]][2], number))
    return taken


def _bunched(own: Steps) -> list[tuple[int, float, float]]:
    """(steps, saved, lost per saved) of each bunch, dearer and dearer: the lower convex hull of what is saved and lost
    by any number of steps.
    """
    made: list[tuple[int, float, float]] = []  # steps, saved, lost
    waiting = (0, 0.0, 0.0)
    for saved, lost in zip(own.saved, own.lost, strict=True):
        waiting = (waiting[0] + 1, waiting[1] + saved, waiting[2] + lost)
        if waiting[1] <= 0:
            continue
        made.append(waiting)
        waiting = (0, 0.0, 0.0)
        while len(made) > 1 and made[-1][2] * made[-2][1] < made[-2][2] * made[-1][1]:
            later, earlier = made.pop(), made.pop()
            made.append((earlier[0] + later[0], earlier[1] + later[1], earlier[2] + later[2]))
    return [(count, saved, lost / saved) for count, saved, lost in made]


def exactly(steps: Sequence[Steps], wanted: float, further: Sequence[float] = ()) -> list[int]:
    """How many steps of each to take so that `wanted` is saved, and of further costs what `further` says, and as little
    as possible is lost, by scipy's `milp`.

    One variable for each number of steps of each, of which one is 1. Where all steps together save less, all are taken.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    def taken(values: Iterable[Sequence[float]]) -> npt.NDArray[np.float64]:
        """What no step, the first, the first two, ... of each come to, one after another."""
        return np.concatenate([np.cumsum([0.0, *own]) for own in values])

    rows = [taken(own.saved for own in steps)]
    rows += [taken(own.further[n] for own in steps) for n in range(len(further))]
    lost = taken(own.lost for own in steps)
    ends = np.cumsum([len(own.saved) + 1 for own in steps])
    needs = [(row, need) for row, need in zip(rows, (wanted, *further), strict=True) if need > 0]
    if not needs:
        return [0 for _ in steps]
    if any(row[ends - 1].sum() <= need for row, need in needs):
        return [len(own.saved) for own in steps]
    owner = np.repeat(np.arange(len(steps)), np.diff(ends, prepend=0))
    each = csr_array((np.ones(len(lost)), (owner, np.arange(len(lost)))))
    ones = np.ones(len(steps))
    found = milp(
        lost / max(float(lost.max()), 1e-30),
        constraints=[
            LinearConstraint(each, ones, ones),
            LinearConstraint(np.stack([row / need for row, need in needs]), 1 - 1e-12),
        ],
        integrality=np.ones(len(lost)),
        bounds=Bounds(0, 1),
        options={"node_limit": NODES, "mip_rel_gap": GAP},
    )
    if found.x is None:
        return cheapest(steps, wanted) if not further else [len(own.saved) for own in steps]
    return [int(part.argmax()) for part in np.split(found.x, ends[:-1])]
