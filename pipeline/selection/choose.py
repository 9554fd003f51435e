"""From what is seen of a model to masks, by the recipe's method: whole groups, or single weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn

from exporters.host import vector_block
from pipeline.channels.coupling.analyse import analyse
from pipeline.channels.coupling.groups import Analysis, Cluster
from pipeline.channels.program.capture import capture
from pipeline.models.source import ModelSource, example
from pipeline.recipe.prune import PruneSection
from pipeline.selection import criteria, curves, weights
from pipeline.selection.allocation import Budget, Removed, allocate, overridden
from pipeline.selection.criteria import Evidence, Observation
from pipeline.selection.curves import Curve
from pipeline.selection.kinds import policy_of
from pipeline.training import masks
from pipeline.training.masks import Masks

Choose = Callable[[Evidence, float], Masks]
"""(what is seen of the model, ratio) -> masks."""


def chosen_by(cfg: PruneSection) -> str:
    """What a recipe takes away, in words that end a sentence: "the groups with the lowest L2 norms"."""
    words: dict[str, str] = {
        "structured": f"the groups with {criteria.find(cfg.criterion).words}",
        "unstructured": "the weights of the smallest magnitude",
        "2:4": "the two smallest of every four weights",
        "none": "nothing",
    }
    return words[cfg.method]


def observed(cfg: PruneSection) -> frozenset[Observation]:
    """What a recipe's choice looks at besides the weights."""
    by_scope: frozenset[Observation] = frozenset({"samples"} if _by_curves(cfg) else ())
    by_criterion = criteria.find(cfg.criterion).observes if cfg.method == "structured" else frozenset()
    return by_criterion | by_scope


def measured(
    analysis: Analysis, seen: Evidence, cfg: PruneSection, maskable: frozenset[str]
) -> Mapping[str, Curve] | None:
    """The curves of all clusters that may be cut, by the recipe's criterion; None where its scope asks for none."""
    if not _by_curves(cfg) or seen.samples is None:
        return None
    clusters = _choosable(analysis, maskable)
    scores = {c.name: criteria.rank(cfg.criterion, c, seen).scores for c in clusters}
    return curves.measure(analysis, clusters, scores, seen.samples, seen.weights)


def choose_groups(
    analysis: Analysis,
    seen: Evidence,
    cfg: PruneSection,
    ratio: float,
    maskable: frozenset[str],
    worth: Mapping[str, Curve] | None = None,
) -> Removed:
    """Cluster name -> True for each group that goes at `ratio`: the lowest scores of the recipe's criterion.

    `worth`: curves as `measured` gives them, by which the widths follow then. A cluster with a parameter outside
    `maskable` stays whole.
    """
    clusters = _choosable(analysis, maskable)
    scores = {c.name: criteria.rank(cfg.criterion, c, seen).scores for c in clusters}
    share = ratio / cfg.ratio if cfg.ratio else 0.0  # how far a schedule has come; overrides grow with it
    budget = Budget(
        ratio=ratio,
        scope="global" if cfg.scope == "global" else "layer",
        align=vector_block() if cfg.align == "auto" else cfg.align,
        floor=cfg.floor,
        overrides={glob: share * final for glob, final in cfg.overrides.items()},
    )
    whole = {c.name: np.zeros(c.size, dtype=bool) for c in analysis.clusters}
    if worth is not None:
        return whole | curves.choose(analysis, clusters, scores, worth, budget)
    return whole | allocate(clusters, scores, budget)


def check_overrides(cfg: PruneSection, source: ModelSource) -> None:
    """Raise ConfigError for an override that names no layer, before anything is spent; costs a capture of the model."""
    if not cfg.overrides or cfg.method not in ("structured", "unstructured"):
        return
    model = source.build()
    if cfg.method == "unstructured":
        names = list(weights.prunable(model))
        overridden([*names, *(name.rpartition(".")[0] for name in names)], cfg.overrides)
    else:
        analysis = analyse(capture(model, example(source)), policy_of(cfg.groups))
        overridden([c.name for c in _choosable(analysis, masks.maskable(model))], cfg.overrides)


def chooser(cfg: PruneSection, analysis: Analysis, model: nn.Module) -> Choose:
    """The method of the recipe as one function."""
    if cfg.method == "structured":
        return _structured(cfg, analysis, masks.maskable(model))
    if cfg.method == "unstructured":
        names = tuple(weights.prunable(model))
        return lambda seen, ratio: weights.unstructured_l1(
            {name: seen.weights[name] for name in names},
            ratio,
            scope="global" if cfg.scope == "global" else "layer",
            overrides=cfg.overrides,
        )
    if cfg.method == "2:4":
        names = tuple(weights.prunable(model))
        return lambda seen, ratio: weights.two_four({name: seen.weights[name] for name in names}) if ratio else {}
    return lambda seen, ratio: {}


def _structured(cfg: PruneSection, analysis: Analysis, maskable: frozenset[str]) -> Choose:
    """Whole groups. Curves are measured once, on the dense weights, however many rounds follow."""
    held: list[Mapping[str, Curve] | None] = []

    def choose(seen: Evidence, ratio: float) -> Masks:
        if not held:
            held.append(measured(analysis, seen, cfg, maskable))
        removed = choose_groups(analysis, seen, cfg, ratio, maskable, held[0])
        return {
            name: torch.from_numpy(mask)
            for name, mask in analysis.masks(removed).items()
            if name in maskable  # a buffer, such as a fixed position table, holds no weights
        }

    return choose


def _by_curves(cfg: PruneSection) -> bool:
    return cfg.method == "structured" and cfg.scope == "curves"


def _choosable(analysis: Analysis, maskable: frozenset[str]) -> list[Cluster]:
    """The clusters of which every parameter can be masked."""
    parameters = set(analysis.parameter_names)
    return [c for c in analysis.clusters if all(n in maskable for n, _ in c.labels if n in parameters)]
