"""From what is seen of a model to masks, by the recipe's method: whole groups, or single weights."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from exporters.host import vector_block
from foundation.files import sha256
from pipeline.channels.coupling.analyse import analyse
from pipeline.channels.coupling.groups import Analysis, Cluster
from pipeline.channels.dead.removable import ArrayMasks, Branch, removable
from pipeline.measurements import Measurements
from pipeline.models.graph import graph_of
from pipeline.models.source import ModelSource
from pipeline.progress import Progress
from pipeline.recipe.prune import PruneSection
from pipeline.recipe.target import OFF_TARGET
from pipeline.recovery import closed_form
from pipeline.selection import branches, criteria, curves, refit, weights, widths
from pipeline.selection.allocation import Budget, Removed, allocate, lowest, overridden
from pipeline.selection.cost import EXACT, Cost, Counted, excess
from pipeline.selection.criteria import Evidence, Observation, Ranked, Scores
from pipeline.selection.curves import Apart, Measured
from pipeline.selection.kinds import policy_of
from pipeline.selection.widths import Depth, Price
from pipeline.tasks.task import Task
from pipeline.training import masks
from pipeline.training.masks import Masks

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Weighed:
    """What a choice of groups was made from: how each cluster's groups rank, and, where curves decided on the widths,
    these and what each width costs.
    """

    removed: Removed
    ranked: Mapping[str, Ranked]
    measured: Measured | None = None
    prices: Sequence[Price] = ()
    branches: tuple[Branch, ...] = ()
    """Whole branches that go, all groups inside them with them."""
    dearer: float = 1.0
    """How many times as dear as by itself each branch was reckoned."""


@dataclass(frozen=True)
class Row:
    """One group of a table of scores: its `rank` among the groups of its cluster, 1 the lowest score, and by which
    `criterion`, with the `reason` where that is not the recipe's.
    """

    cluster: str
    group: int
    score: float
    rank: int
    gone: bool
    criterion: str
    reason: str


def rows(weighed: Weighed) -> list[Row]:
    """Every group that was ranked."""
    made = []
    for name, one in weighed.ranked.items():
        rank = np.empty(len(one.scores), dtype=int)
        rank[np.argsort(one.scores, kind="stable")] = np.arange(1, len(one.scores) + 1)
        made += [
            Row(name, group, float(score), int(rank[group]), bool(weighed.removed[name][group]), one.by, one.reason)
            for group, score in enumerate(np.maximum(one.scores, 0.0))
        ]
    return made


def chosen_by(cfg: PruneSection) -> str:
    """What a recipe takes away, in words that end a sentence: "the groups with the lowest L2 norms"."""
    words: dict[str, str] = {
        "structured": f"the groups with {criteria.find(cfg.criterion).words}",
        "unstructured": "the weights of the smallest magnitude",
        "2:4": "the two smallest of every four weights",
        "given": "what is zero in the checkpoint",
        "none": "nothing",
    }
    return words[cfg.method]


def observed(cfg: PruneSection) -> frozenset[Observation]:
    """What a recipe's choice looks at besides the weights."""
    by_scope: set[Observation] = {"samples"} if _by_curves(cfg) else set()
    if _by_curves(cfg) and cfg.refit:
        by_scope.add("grams")
    by_criterion = criteria.find(cfg.criterion).observes if cfg.method == "structured" else frozenset()
    return by_criterion | by_scope


def measured(
    analysis: Analysis,
    seen: Evidence,
    cfg: PruneSection,
    maskable: frozenset[str],
    apart: Apart | None = None,
    progress: Progress | None = None,
    kept: Measurements | None = None,
) -> Measured | None:
    """The curves of all clusters that may be cut, by the recipe's criterion; None where its scope asks for none. As
    they were `kept` where the same was measured before.
    """
    if not _by_curves(cfg) or seen.samples is None:
        return None
    clusters = choosable(analysis, maskable)
    scores = {c.name: criteria.rank(cfg.criterion, c, seen).scores for c in clusters}

    def measure() -> Measured:
        return curves.measure(
            analysis,
            clusters,
            scores,
            seen.samples or (),
            seen.weights,
            readers=seen.readers if cfg.refit else None,
            seconds=cfg.seconds,
            apart=apart,
            progress=progress,
        )

    if kept is None or kept.folder is None:
        return measure()
    key = {
        "tensors": curves.digest([*seen.samples, *seen.weights.values()]),
        # Roughly: sums of another number of threads differ in their last digits, and the curves hardly hang on these.
        "scores": [f"{float(np.mean(one)):.1e}" for one in scores.values()],
        "seen": [f"{float(read.square.mean()):.1e}" for one in seen.readers.values() for read in one if cfg.refit],
        "names": [*seen.weights, *scores],
        "how": [cfg.criterion, cfg.refit, cfg.seconds, apart is None],
        "code": [sha256(Path(curves.__file__)), sha256(Path(refit.__file__))],
    }
    return curves.from_json(kept.kept("curves", key, lambda: curves.to_json(measure())))


DEARER = (2.0, 4.0, 1e9)
"""How many times what each branch loses by itself is reckoned with, too; the last leaves all that need not go. Of a
BERT of four layers at 0.15 of its time by the table, twice led to 0.51 nats from dense, once and four times to 0.66 and
0.59; on a second seed, at other latencies and on a ResNet-50 it changed next to nothing.
"""
SECONDS = 80.0
"""For trying what these lead to. Fewer branches are tried first, and those that there is no time for do not go."""
AGAIN = 0.05
"""Of a goal: one that lies nearer to that of a choice before takes over how dear branches were best. Else they come and
go from one aim to the next, and what one took says little of the other.
"""


@dataclass(frozen=True)
class Offered:
    """Residual branches that may go as a whole: the divergence from the dense outputs (nats) when each does `alone`,
    and when a whole choice is `tried`, widths and branches (parameter name -> False = goes). `dearer`: how many times
    as dear as alone they are reckoned, in turns.
    """

    alone: Mapping[Branch, float] = field(default_factory=dict)
    tried: Callable[[ArrayMasks], float] = lambda masks: 0.0
    dearer: Sequence[float] = (1.0, *DEARER)


def choose_groups(
    analysis: Analysis,
    seen: Evidence,
    cfg: PruneSection,
    ratio: float,
    maskable: frozenset[str],
    worth: Measured | None = None,
    costs: Sequence[Cost] = (),
    branches: Offered | None = None,
) -> Weighed:
    """Which groups go at `ratio`, by cluster: those with the lowest scores of the recipe's criterion; and why these.

    `worth`: curves as `measured` gives them, by which the widths follow then. `costs`: with them, as few go as meet
    their goals, whatever `ratio` is; `branches` are those that may go as a whole then. A cluster with a parameter
    outside `maskable` stays whole, and is not ranked.
    """
    clusters = choosable(analysis, maskable)
    ranked = {c.name: criteria.rank(cfg.criterion, c, seen) for c in clusters}
    scores = {name: one.scores for name, one in ranked.items()}
    whole = {c.name: np.zeros(c.size, dtype=bool) for c in analysis.clusters}
    budget = budget_of(cfg, ratio, _way(cfg, ratio))  # overrides grow with the ratio
    if worth is None and not costs:
        return Weighed(whole | allocate(clusters, scores, budget), ranked)
    budgets = finer(cfg, budget, costs)
    if worth is None:
        by_ratio = ((one, whole | _by_ratio(clusters, scores, one, whole, costs)) for one in budgets)
        return Weighed(_nearest(costs, by_ratio, lambda made: made[1])[1], ranked)
    offered = branches or Offered()
    known = {branch.node: branch for branch in offered.alone}

    def tried(depth: Depth) -> float:
        return offered.tried(
            _masks(analysis, whole | depth.removed, [known[name] for name in depth.branches], maskable)
        )

    def by_curves() -> Iterator[tuple[Budget, Depth, float]]:
        dearer = offered.dearer
        for one in budgets:

            def solved(times: float, budget: Budget = one) -> Depth:
                prices = {branch.node: (branch.inside, times * loss) for branch, loss in offered.alone.items()}
                exact = cfg.allocation == "exact"
                return widths.choose_depth(analysis, clusters, scores, worth.curves, budget, costs, prices, exact=exact)

            found, best = _deep(solved, tried, dearer)
            dearer = (best,)  # what branches are worth hardly depends on how fine the widths are
            yield one, found, best

    budget, found, dearer = _nearest(costs, by_curves(), lambda made: whole | made[1].removed)
    chosen = whole | found.removed
    prices = widths.prices(analysis, clusters, worth.curves, budget, chosen, costs[0] if costs else None)
    return Weighed(chosen, ranked, worth, prices, tuple(known[name] for name in found.branches), dearer)


def _nearest(costs: Sequence[Cost], choices: Iterable[_Made], removed: Callable[[_Made], Removed]) -> _Made:
    """The first of `choices` that meets every goal and nearly uses up the tightest one; where each cuts too much, or a
    narrow layer lets no more go, the one that comes nearest, of equals the first.
    """
    made: list[tuple[tuple[float, float], _Made]] = []
    for choice in choices:
        chosen = removed(choice)
        unused = min((1 - cost.of(chosen) / cost.goal for cost in costs), default=0.0)
        made.append(((excess(costs, chosen), unused), choice))
        if made[-1][0] <= (0.0, OFF_TARGET):
            break
    return min(made, key=lambda one: one[0])[1]


def partway(final: Weighed, ranked: Mapping[str, Ranked], share: float) -> Weighed:
    """`share` of the way to the choice `final`, [0, 1): so much of each cluster's groups that go, by how they are
    `ranked` now; whole branches go at the end. So a later round takes more, and nothing comes back.
    """
    removed = {
        name: lowest(ranked[name].scores, int(share * gone.sum())) if name in ranked else np.zeros_like(gone)
        for name, gone in final.removed.items()
    }
    return replace(final, removed=removed, ranked=ranked, branches=())


def _way(cfg: PruneSection, ratio: float) -> float:
    """How far a schedule that is at `ratio` has come, 1 at its end."""
    share = ratio / cfg.ratio if cfg.ratio else 0.0
    return share if share < 1 - EXACT else 1.0


def _deep(
    solved: Callable[[float], Depth], tried: Callable[[Depth], float], dearer: Sequence[float] = (1.0, *DEARER)
) -> tuple[Depth, float]:
    """Of what `dearer` and dearer branches lead to (`solved`: how many times as dear -> choice), what loses least when
    it is `tried` as a whole (choice -> nats); and which led there.

    What branches and widths lose apart does not add up. Of a BERT of four layers that keeps 0.15 of its operations,
    four branches gone promised 0.13 nats and none 0.22 to 0.32, and 84.3 and 86.5 % were right with them (two seeds),
    89.4 and 91.1 without. Of a ResNet-50, without eight that cost next to nothing alone, 80.7 instead of 92.3.
    """
    first = solved(dearer[0])
    if not first.branches:
        return first, dearer[0]
    found = {first.branches: (first, dearer[0])}
    for times in dearer[1:]:
        one = solved(times)
        found.setdefault(one.branches, (one, times))
    near = min(one.missed for one, _ in found.values())
    waiting = sorted(
        (pair for pair in found.values() if pair[0].missed == near), key=lambda pair: len(pair[0].branches)
    )
    if len(waiting) == 1:
        return waiting[0]
    nats: list[float] = []
    began = time.perf_counter()
    for one, _ in waiting:
        if nats and (time.perf_counter() - began) * (len(nats) + 1) / len(nats) > SECONDS:
            break
        nats.append(tried(one))
    return waiting[int(np.argmin(nats))]


def budget_of(cfg: PruneSection, ratio: float, share: float = 1.0) -> Budget:
    """What a recipe lets go at `ratio`, `share` of the way there."""
    return Budget(
        ratio=ratio,
        scope="global" if cfg.scope == "global" else "layer",
        align=alignment(cfg),
        floor=cfg.floor,
        overrides={glob: share * final for glob, final in cfg.overrides.items()},
    )


def alignment(cfg: PruneSection) -> int:
    """What counts of channels are multiples of."""
    return vector_block() if cfg.align == "auto" else cfg.align


def finer(cfg: PruneSection, budget: Budget, costs: Sequence[Cost]) -> list[Budget]:
    """`budget`, and for goals that are only counted, where the alignment is ours to set, with finer and finer widths:
    one step of a narrow layer may be more than a goal leaves. A latency is predicted for the measured alignment alone.
    """
    made = [budget]
    if cfg.align == "auto" and all(isinstance(cost, Counted) for cost in costs):
        while made[-1].align > 1:
            made.append(replace(budget, align=made[-1].align // 2))
    return made


HALVINGS = 14
"""Of the ratio, in a search for the one that meets a target: beyond, no width would change."""


def _by_ratio(
    clusters: Sequence[Cluster], scores: Mapping[str, Scores], budget: Budget, whole: Removed, costs: Sequence[Cost]
) -> Removed:
    """The choice at the smallest ratio, of all layers alike or of the whole model, that meets every goal; the most that
    may go where none does.
    """
    low, high = 0.0, 1.0
    best = allocate(clusters, scores, replace(budget, ratio=high))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        chosen = allocate(clusters, scores, replace(budget, ratio=middle))
        if excess(costs, whole | chosen):
            low = middle
        else:
            high, best = middle, chosen
    return best


def outputs_apart(task: Task, source: ModelSource) -> Apart | None:
    """How far outputs are from the dense ones by the task; None for logits, whose class shares are compared."""
    if task.classes and source.outputs == task.reads:
        return None

    def apart(dense: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], float]:
        wanted = dict(zip(source.outputs, dense, strict=True))
        return lambda other: float(task.divergence(dict(zip(source.outputs, other, strict=True)), wanted, 1.0).mean())

    return apart


def check_overrides(cfg: PruneSection, source: ModelSource) -> None:
    """Raise ConfigError for an override that names no layer, before anything is spent; costs a capture of the model."""
    if not cfg.overrides or cfg.method not in ("structured", "unstructured"):
        return
    model = source.build()
    if cfg.method == "unstructured":
        names = list(weights.prunable(model))
        overridden([*names, *(name.rpartition(".")[0] for name in names)], cfg.overrides)
    else:
        analysis = analyse(graph_of(model, source), policy_of(cfg.groups))
        overridden([c.name for c in choosable(analysis, masks.maskable(model))], cfg.overrides)


class Chooser:
    """The method of a recipe, asked once or in every round: `choose(seen, ratio)` gives masks.

    Curves are measured once, on the weights of the first time, however many rounds follow. `weighed`: what the last
    choice of whole groups was made from. `costs`: what the choice has to meet.
    """

    def __init__(
        self,
        cfg: PruneSection,
        analysis: Analysis,
        model: nn.Module,
        apart: Apart | None = None,
        progress: Progress | None = None,
        costs: Sequence[Cost] = (),
        kept: Measurements | None = None,
    ) -> None:
        self.cfg, self.analysis, self.apart, self.progress = cfg, analysis, apart, progress
        self.costs, self.kept = costs, kept or Measurements()
        self.maskable = masks.maskable(model)
        self.names = tuple(weights.prunable(model))
        self.weighed: Weighed | None = None
        self._measured: Measured | None = None
        self._branches = Offered()
        self._dearer: dict[tuple[float, ...], float] = {}  # goals -> how dear branches were in the best choice
        self._final: tuple[Sequence[Cost], Weighed] | None = None  # what rounds lead to, and the costs that it meets

    def choose(self, seen: Evidence, ratio: float) -> Masks:
        """Parameter name -> mask, for what is seen of the model as it is now."""
        if self.cfg.method == "structured":
            return self._groups(seen, ratio)
        if self.cfg.method == "unstructured":
            return weights.unstructured_l1(
                {name: seen.weights[name] for name in self.names},
                ratio,
                scope="global" if self.cfg.scope == "global" else "layer",
                overrides=self.cfg.overrides,
            )
        if self.cfg.method == "2:4" and ratio:
            return weights.two_four({name: seen.weights[name] for name in self.names})
        return {}

    def _groups(self, seen: Evidence, ratio: float) -> Masks:
        if self._measured is None:
            self._measured = measured(
                self.analysis, seen, self.cfg, self.maskable, self.apart, self.progress, self.kept
            )
            self._branches = branches_offered(
                self.cfg,
                self.analysis,
                seen,
                self.costs,
                self._measured,
                self.maskable,
                self.apart,
                self.progress,
                self.kept,
            )
        share = _way(self.cfg, ratio)
        if share < 1 and (self.costs or self._measured is not None):
            if self._final is None or self._final[0] is not self.costs:
                self._final = self.costs, self._at_the_end(seen)
            clusters = choosable(self.analysis, self.maskable)
            ranked = {c.name: criteria.rank(self.cfg.criterion, c, seen) for c in clusters}
            self.weighed = partway(self._final[1], ranked, share)
        elif self.costs:
            self.weighed = self._at_the_end(seen)
        else:
            self.weighed = choose_groups(self.analysis, seen, self.cfg, ratio, self.maskable, self._measured)
        return masks_of(self.analysis, self.weighed, self.maskable)

    def _at_the_end(self, seen: Evidence) -> Weighed:
        """The choice at the recipe's ratio, or that meets the costs."""
        goals = tuple(cost.asked for cost in self.costs)
        known = next((dearer for other, dearer in self._dearer.items() if _near(other, goals)), None)
        offered = self._branches if known is None else replace(self._branches, dearer=(known,))
        found = choose_groups(
            self.analysis, seen, self.cfg, self.cfg.ratio, self.maskable, self._measured, self.costs, offered
        )
        if known is None and (found.branches or found.dearer != offered.dearer[0]):
            self._dearer[goals] = found.dearer
        return found


def _near(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether goals are next to the same."""
    return all(abs(a / b - 1) <= AGAIN for a, b in zip(one, other, strict=True))


def masks_of(analysis: Analysis, weighed: Weighed, maskable: frozenset[str]) -> Masks:
    """Parameter name -> mask, of a choice of groups and of whole branches."""
    made = _masks(analysis, weighed.removed, weighed.branches, maskable)
    return {name: torch.from_numpy(mask) for name, mask in made.items()}


def _masks(
    analysis: Analysis, removed: Removed, gone: Sequence[Branch], maskable: frozenset[str]
) -> dict[str, npt.NDArray[np.bool_]]:
    made = dict(analysis.masks(removed))
    for branch in gone:
        made |= branch.masks(analysis.captured.state)
    # A buffer, such as a fixed position table, holds no weights.
    return {name: mask for name, mask in made.items() if name in maskable}


def branches_offered(
    cfg: PruneSection,
    analysis: Analysis,
    seen: Evidence,
    costs: Sequence[Cost],
    worth: Measured | None,
    maskable: frozenset[str],
    apart: Apart | None,
    progress: Progress | None,
    kept: Measurements,
) -> Offered:
    """The branches that a recipe lets go as a whole: with a target that curves meet."""
    if not (costs and cfg.depth and worth is not None):
        return Offered()
    return branches_worth(analysis, seen, maskable, apart, progress, kept, refit=cfg.refit)


def branches_worth(
    analysis: Analysis,
    seen: Evidence,
    maskable: frozenset[str],
    apart: Apart | None,
    progress: Progress | None = None,
    kept: Measurements | None = None,
    *,
    refit: bool = True,
) -> Offered:
    """Every residual branch that may go as a whole, with the divergence from the dense outputs when it does. As they
    were `kept` where the same was measured before.
    """
    found = choosable_branches(analysis, maskable)
    if not found or seen.samples is None:
        return Offered()
    told, kept = progress or Progress(), kept or Measurements()

    def measure() -> dict[str, float]:
        return branches.lost(analysis, found, seen, apart, told, refit=refit)

    fit = sorted(Path(closed_form.__file__).parent.glob("*.py"))
    key = {
        "tensors": curves.digest([*seen.samples, *(seen.others or ()), *seen.weights.values()]),
        "names": [*seen.weights, *(branch.node for branch in found)],
        "how": [refit, apart is None],
        "code": [sha256(path) for path in (Path(curves.__file__), Path(branches.__file__), *fit)],
    }
    lost = kept.kept("branches", key, measure)

    def tried(given: ArrayMasks) -> float:
        """Kept by what goes."""
        going = {name: hashlib.sha256(np.packbits(mask).tobytes()).hexdigest() for name, mask in given.items()}

        def measure() -> float:
            return branches.lost_with(analysis, given, seen, apart, refit=refit)

        nats = float(kept.kept("branches", key | {"going": going}, measure))
        told.say(f"  a choice of widths and branches, fitted as a whole: {nats:.3g} nats")
        return nats

    return Offered({branch: lost[branch.node] for branch in found}, tried)


def _by_curves(cfg: PruneSection) -> bool:
    return cfg.method == "structured" and cfg.scope == "curves"


def choosable(analysis: Analysis, maskable: frozenset[str]) -> list[Cluster]:
    """The clusters of which every parameter can be masked."""
    parameters = set(analysis.parameter_names)
    return [c for c in analysis.clusters if all(n in maskable for n, _ in c.labels if n in parameters)]


def choosable_branches(analysis: Analysis, maskable: frozenset[str]) -> tuple[Branch, ...]:
    """The residual branches that may go as a whole, of which every cluster inside is choosable."""
    names = {c.name for c in choosable(analysis, maskable)}
    return tuple(branch for branch in removable(analysis, maskable) if names.issuperset(branch.inside))
