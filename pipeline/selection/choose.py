"""From what is seen of a model to masks, by the recipe's method: whole groups, or single weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from exporters.host import vector_block
from pipeline.channels.coupling.analyse import analyse
from pipeline.channels.coupling.groups import Analysis, Cluster
from pipeline.channels.program.capture import capture
from pipeline.models.source import ModelSource, example
from pipeline.recipe.prune import PruneSection
from pipeline.selection import criteria, weights
from pipeline.selection.allocation import Budget, Removed, allocate, overridden
from pipeline.selection.criteria import Evidence
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


def choose_groups(
    analysis: Analysis, seen: Evidence, cfg: PruneSection, ratio: float, maskable: frozenset[str]
) -> Removed:
    """Cluster name -> True for each group that goes at `ratio`: the lowest scores of the recipe's criterion.

    A cluster with a parameter outside `maskable` stays whole.
    """
    clusters = _choosable(analysis, maskable)
    criterion = criteria.find(cfg.criterion)
    scores = {c.name: criterion.score(c, seen) for c in clusters}
    share = ratio / cfg.ratio if cfg.ratio else 0.0  # how far a schedule has come; overrides grow with it
    budget = Budget(
        ratio=ratio,
        scope=cfg.scope,
        align=vector_block() if cfg.align == "auto" else cfg.align,
        floor=cfg.floor,
        overrides={glob: share * final for glob, final in cfg.overrides.items()},
    )
    whole = {c.name: np.zeros(c.size, dtype=bool) for c in analysis.clusters}
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
        maskable = masks.maskable(model)
        return lambda seen, ratio: {
            name: torch.from_numpy(mask)
            for name, mask in analysis.masks(choose_groups(analysis, seen, cfg, ratio, maskable)).items()
            if name in maskable  # a buffer, such as a fixed position table, holds no weights
        }
    if cfg.method == "unstructured":
        names = tuple(weights.prunable(model))
        return lambda seen, ratio: weights.unstructured_l1(
            {name: seen.weights[name] for name in names}, ratio, scope=cfg.scope, overrides=cfg.overrides
        )
    if cfg.method == "2:4":
        names = tuple(weights.prunable(model))
        return lambda seen, ratio: weights.two_four({name: seen.weights[name] for name in names}) if ratio else {}
    return lambda seen, ratio: {}


def _choosable(analysis: Analysis, maskable: frozenset[str]) -> list[Cluster]:
    """The clusters of which every parameter can be masked."""
    parameters = set(analysis.parameter_names)
    return [c for c in analysis.clusters if all(n in maskable for n, _ in c.labels if n in parameters)]
