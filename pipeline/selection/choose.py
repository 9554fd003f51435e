"""From what is seen of a model to masks, by the recipe's method: whole groups, or single weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from exporters.host import vector_block
from pipeline.channels.coupling.analyse import analyse
from pipeline.channels.coupling.groups import Analysis, Cluster
from pipeline.models.graph import graph_of
from pipeline.models.source import ModelSource
from pipeline.progress import Progress
from pipeline.recipe.prune import PruneSection
from pipeline.selection import criteria, curves, weights
from pipeline.selection.allocation import Budget, Removed, allocate, overridden
from pipeline.selection.criteria import Evidence, Observation, Ranked
from pipeline.selection.curves import Apart, Measured, Price
from pipeline.selection.kinds import policy_of
from pipeline.tasks.task import Task
from pipeline.training import masks
from pipeline.training.masks import Masks


@dataclass(frozen=True)
class Weighed:
    """What a choice of groups was made from: how each cluster's groups rank, and, where curves decided on the widths,
    these and what each width costs.
    """

    removed: Removed
    ranked: Mapping[str, Ranked]
    measured: Measured | None = None
    prices: Sequence[Price] = ()


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
) -> Measured | None:
    """The curves of all clusters that may be cut, by the recipe's criterion; None where its scope asks for none."""
    if not _by_curves(cfg) or seen.samples is None:
        return None
    clusters = _choosable(analysis, maskable)
    scores = {c.name: criteria.rank(cfg.criterion, c, seen).scores for c in clusters}
    return curves.measure(
        analysis,
        clusters,
        scores,
        seen.samples,
        seen.weights,
        readers=seen.readers if cfg.refit else None,
        seconds=cfg.seconds,
        apart=apart,
        progress=progress,
    )


def choose_groups(
    analysis: Analysis,
    seen: Evidence,
    cfg: PruneSection,
    ratio: float,
    maskable: frozenset[str],
    worth: Measured | None = None,
) -> Weighed:
    """Which groups go at `ratio`, by cluster: those with the lowest scores of the recipe's criterion; and why these.

    `worth`: curves as `measured` gives them, by which the widths follow then. A cluster with a parameter outside
    `maskable` stays whole, and is not ranked.
    """
    clusters = _choosable(analysis, maskable)
    ranked = {c.name: criteria.rank(cfg.criterion, c, seen) for c in clusters}
    scores = {name: one.scores for name, one in ranked.items()}
    share = ratio / cfg.ratio if cfg.ratio else 0.0  # how far a schedule has come; overrides grow with it
    budget = Budget(
        ratio=ratio,
        scope="global" if cfg.scope == "global" else "layer",
        align=vector_block() if cfg.align == "auto" else cfg.align,
        floor=cfg.floor,
        overrides={glob: share * final for glob, final in cfg.overrides.items()},
    )
    whole = {c.name: np.zeros(c.size, dtype=bool) for c in analysis.clusters}
    if worth is None:
        return Weighed(whole | allocate(clusters, scores, budget), ranked)
    chosen = curves.choose(analysis, clusters, scores, worth.curves, budget, exact=cfg.allocation == "exact")
    prices = curves.prices(analysis, clusters, scores, worth.curves, budget, whole | chosen)
    return Weighed(whole | chosen, ranked, worth, prices)


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
        overridden([c.name for c in _choosable(analysis, masks.maskable(model))], cfg.overrides)


class Chooser:
    """The method of a recipe, asked once or in every round: `choose(seen, ratio)` gives masks.

    Curves are measured once, on the weights of the first time, however many rounds follow. `weighed`: what the last
    choice of whole groups was made from.
    """

    def __init__(
        self,
        cfg: PruneSection,
        analysis: Analysis,
        model: nn.Module,
        apart: Apart | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.cfg, self.analysis, self.apart, self.progress = cfg, analysis, apart, progress
        self.maskable = masks.maskable(model)
        self.names = tuple(weights.prunable(model))
        self.weighed: Weighed | None = None
        self._measured: Measured | None = None

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
            self._measured = measured(self.analysis, seen, self.cfg, self.maskable, self.apart, self.progress)
        self.weighed = choose_groups(self.analysis, seen, self.cfg, ratio, self.maskable, self._measured)
        return {
            name: torch.from_numpy(mask)
            for name, mask in self.analysis.masks(self.weighed.removed).items()
            if name in self.maskable  # a buffer, such as a fixed position table, holds no weights
        }


def _by_curves(cfg: PruneSection) -> bool:
    return cfg.method == "structured" and cfg.scope == "curves"


def _choosable(analysis: Analysis, maskable: frozenset[str]) -> list[Cluster]:
    """The clusters of which every parameter can be masked."""
    parameters = set(analysis.parameter_names)
    return [c for c in analysis.clusters if all(n in maskable for n, _ in c.labels if n in parameters)]
