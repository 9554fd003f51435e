"""Choose what goes and mask it; the original weights stay under the masks until fold."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from exporters.host import vector_block
from pipeline.artifacts import Baseline, Pruned, WidthChange
from pipeline.channels.coupling.analyse import analyse
from pipeline.channels.coupling.groups import Analysis
from pipeline.channels.operators.trace import Policy
from pipeline.channels.program.capture import capture
from pipeline.data.parts import Data
from pipeline.models import ModelSource, example, weights
from pipeline.progress import Progress
from pipeline.recipe.config import GroupSwitches, PruneSection
from pipeline.report.tables import sparsity_plot, write_table
from pipeline.selection.allocation import Budget, Removed, allocate
from pipeline.selection.importance import group_norms
from pipeline.training import loop as training
from pipeline.training import masks
from pipeline.training.masks import Masks

Choose = Callable[[Mapping[str, Tensor], float], Masks]
"""(effective weights, ratio) -> masks."""


def run(
    cfg: PruneSection, out: Path, source: ModelSource, data: Data, baseline: Baseline, progress: Progress
) -> Pruned:
    """Mask once, in rounds with recovery between them, or gradually during training.

    Raises ConfigError when an override names no layer; CaptureError where torch.export cannot follow the model.
    """
    model = source.build()
    model.load_state_dict(baseline.weights())
    analysis = analyse(capture(model, example(source)), policy_of(cfg.groups))
    choose = _chooser(cfg, analysis, model)
    chosen = _SCHEDULES[cfg.schedule](cfg, model, data, choose, out, progress)
    state = masks.originals(model)
    weights.save(state, out / Pruned.WEIGHTS)
    masks.save(chosen, out / Pruned.MASKS)
    removed = _removed(analysis, chosen)
    expected = analysis.estimate(removed) if cfg.method == "structured" else None
    layers = masks.sparsity({name: state[name] for name in chosen}, chosen)
    write_table(out / "sparsity.csv", layers)
    sparsity_plot(layers, out / "sparsity.svg")
    widths = tuple(
        WidthChange(cluster=c.name, kind=c.kind, before=c.size, after=c.size - int(removed[c.name].sum()), unit=c.unit)
        for c in analysis.clusters
    )
    write_table(out / "widths.csv", widths)
    (out / "removed.json").write_text(
        json.dumps({name: np.flatnonzero(gone).tolist() for name, gone in removed.items()}, indent=1) + "\n",
        encoding="utf-8",
    )
    zeros = sum(layer.zeros for layer in layers)
    return Pruned(
        folder=out,
        method=cfg.method,
        kinds=cfg.groups,
        sparsity=zeros / analysis.params,
        zeros=zeros,
        params=analysis.params,
        expected_params=expected.params if expected else analysis.params,
        macs=analysis.macs,
        expected_macs=expected.macs if expected else analysis.macs,
        groups=sum(c.size for c in analysis.clusters),
        groups_cut=sum(int(gone.sum()) for gone in removed.values()),
        accuracy_after=training.evaluate(model, data, "test").accuracy,
        layers=layers,
        widths=widths,
    )


def policy_of(kinds: GroupSwitches) -> Policy:
    """The recipe's switches as the engine takes them."""
    return Policy(**kinds.model_dump())


def choose_groups(
    analysis: Analysis, state: Mapping[str, Tensor], cfg: PruneSection, ratio: float, maskable: frozenset[str]
) -> Removed:
    """Cluster name -> True for each group that goes at `ratio`: the lowest norms over the whole coupled group.

    A cluster with a parameter outside `maskable` (a recurrent layer's) stays whole.
    """
    parameters = set(analysis.parameter_names)
    clusters = [c for c in analysis.clusters if all(n in maskable for n, _ in c.labels if n in parameters)]
    scores = {c.name: group_norms(c, state, cfg.norm) for c in clusters}
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


def _chooser(cfg: PruneSection, analysis: Analysis, model: nn.Module) -> Choose:
    """The method of the recipe as one function."""
    if cfg.method == "structured":
        maskable = masks.maskable(model)
        return lambda state, ratio: {
            name: torch.from_numpy(mask)
            for name, mask in analysis.masks(choose_groups(analysis, state, cfg, ratio, maskable)).items()
            if name in maskable  # a buffer, such as a fixed position table, holds no weights
        }
    if cfg.method == "unstructured":
        names = tuple(masks.prunable(model))
        return lambda state, ratio: masks.unstructured_l1(
            {name: state[name] for name in names}, ratio, scope=cfg.scope, overrides=cfg.overrides
        )
    if cfg.method == "2:4":
        names = tuple(masks.prunable(model))
        return lambda state, ratio: masks.two_four({name: state[name] for name in names}) if ratio else {}
    return lambda state, ratio: {}


def _one_shot(cfg: PruneSection, model: nn.Module, data: Data, choose: Choose, out: Path, progress: Progress) -> Masks:
    chosen = choose(model.state_dict(), cfg.ratio)
    masks.apply(model, chosen)
    return chosen


def _iterative(cfg: PruneSection, model: nn.Module, data: Data, choose: Choose, out: Path, progress: Progress) -> Masks:
    """`steps` rounds, each cutting an equal part of the way to the ratio and then recovering."""
    settings = training.default_settings(model, recovery=True, seed=cfg.seed, given=cfg.train)
    chosen: Masks = {}
    for number in range(1, cfg.steps + 1):
        chosen = choose(_effective(model), cfg.ratio * number / cfg.steps)
        masks.apply(model, chosen)
        progress.say(f"  round {number} of {cfg.steps}: {cfg.ratio * number / cfg.steps:.0%}")
        if number < cfg.steps:
            training.train(model, data, settings, masks=chosen, checkpoint=out / f"round{number}.pt", progress=progress)
    _discard_checkpoints(out)
    return chosen


def _gradual(cfg: PruneSection, model: nn.Module, data: Data, choose: Choose, out: Path, progress: Progress) -> Masks:
    """Masks tighten by the cubic schedule, `steps` times an epoch, while the model trains; then they hold."""
    settings = training.default_settings(model, recovery=True, seed=cfg.seed, given=cfg.train)
    masks.apply(model, choose(model.state_dict(), 0.0))

    def tighten(step: int, total: int) -> Masks | None:
        if step % max(1, total // max(1, cfg.steps * settings.epochs)):
            return None
        return choose(_effective(model), masks.cubic_ratio(cfg.ratio, step, total))

    result = training.train(model, data, settings, on_step=tighten, checkpoint=out / "gradual.pt", progress=progress)
    _discard_checkpoints(out)
    return result.masks


_SCHEDULES = {"one-shot": _one_shot, "iterative": _iterative, "gradual": _gradual}


def _effective(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as the masked model sees it: what is masked already scores zero, so rounds only ever take more."""
    held = masks.masks_of(model)
    return {name: value * held[name] if name in held else value for name, value in masks.originals(model).items()}


def _discard_checkpoints(out: Path) -> None:
    for path in out.glob("*.pt"):
        path.unlink()


def _removed(analysis: Analysis, chosen: Masks) -> Removed:
    """Which groups the masks take whole: the first producer's slices are all masked."""
    removed: Removed = {}
    for cluster in analysis.clusters:
        gone = np.zeros(cluster.size, dtype=bool)
        name, dim = cluster.producers[0]
        if name in chosen:
            alive = (
                chosen[name].movedim(dim, 0).flatten(1).any(1).numpy()
                if chosen[name].dim() > 1
                else chosen[name].numpy()
            )
            labels = cluster.labels[(name, dim)]
            kept = np.zeros(cluster.size, dtype=bool)
            np.logical_or.at(kept, labels[labels >= 0], alive[labels >= 0])
            gone = ~kept
        removed[cluster.name] = gone
    return removed
