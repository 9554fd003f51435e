"""Choose what goes and mask it; the original weights stay under the masks until fold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from foundation.errors import WeightsError
from foundation.files import save_tensors
from pipeline.artifacts.base import WidthChange, write_json, write_table
from pipeline.artifacts.eager import CURVES, LATENCY, PRICES, SCORES, Aim, Baseline, CurveFacts, Pruned
from pipeline.channels.coupling.analyse import analyse
from pipeline.channels.coupling.groups import Analysis
from pipeline.channels.dead.removable import Branch
from pipeline.data.parts import Data
from pipeline.drawing.latency import plot
from pipeline.drawing.plots import sparsity_plot
from pipeline.measurements import Measurements
from pipeline.models.graph import graph_of
from pipeline.models.source import ModelSource
from pipeline.models.weights import load_weights
from pipeline.progress import Progress
from pipeline.recipe.prune import PruneSection
from pipeline.selection import schedules, targets, weights
from pipeline.selection.aiming import Aimed, Attempt, take_aim
from pipeline.selection.allocation import Removed
from pipeline.selection.choose import (
    Chooser,
    alignment,
    choosable_branches,
    chosen_by,
    observed,
    outputs_apart,
    rows,
)
from pipeline.selection.cost import Cost, Timed
from pipeline.selection.criteria import Evidence
from pipeline.selection.curves import Measured, points
from pipeline.selection.kinds import policy_of
from pipeline.selection.observe import observe
from pipeline.selection.schedules import Course
from pipeline.tasks.evaluation import evaluate
from pipeline.tasks.task import Task
from pipeline.training import loop, masks
from pipeline.training.defaults import default_settings
from pipeline.training.loop import OnStep
from pipeline.training.masks import Masks


def run(
    cfg: PruneSection,
    out: Path,
    source: ModelSource,
    data: Data,
    baseline: Baseline,
    task: Task,
    kept: Measurements,
    progress: Progress,
) -> Pruned:
    """Mask once, in rounds with recovery between them, or gradually during training.

    Raises ConfigError when an override names no layer, or a target cannot be met; CaptureError where torch.export
    cannot follow the model.
    """
    model = source.build()
    model.load_state_dict(baseline.weights())
    analysis = analyse(graph_of(model, source), policy_of(cfg.groups))
    wanted = observed(cfg)
    settings = default_settings(model, recovery=True, seed=cfg.seed, given=cfg.train)

    def recover(name: str, held: Masks | None, on_step: OnStep | None) -> Masks:
        checkpoint = out / f"{name}.pt"
        made = loop.train(
            model, data, task, settings, masks=held, on_step=on_step, checkpoint=checkpoint, progress=progress
        )
        return made.masks

    given = _given(cfg, model, progress) if cfg.weights is not None else None
    goals = targets.costs(cfg, analysis, source, masks.maskable(model), kept, progress)
    chooser = Chooser(cfg, analysis, model, outputs_apart(task, source), progress, goals, kept)

    def see() -> Evidence:
        return observe(model, data, task, wanted, analysis, cfg.samples, seed=cfg.seed)

    first = see() if goals else None
    aimed = Aimed()
    if first is not None:
        aimed = take_aim(cfg, chooser, analysis, source, first, masks.originals(model), baseline.onnx, progress)

    def look() -> Evidence:
        """What was seen for the aim serves the first round as well."""
        nonlocal first
        found, first = first or see(), None
        return found

    chosen = (
        given
        if given is not None
        else schedules.find(cfg.schedule)(
            Course(
                model=model,
                ratio=cfg.ratio,
                steps=cfg.steps,
                epochs=settings.epochs,
                choose=chooser.choose,
                see=look,
                recover=recover,
                progress=progress,
            )
        )
    )
    for checkpoint in out.glob("*.pt"):
        checkpoint.unlink()
    state = masks.originals(model)
    save_tensors(state, out / Pruned.WEIGHTS)
    masks.save(chosen, out / Pruned.MASKS)
    weighed = chooser.weighed
    removed = _removed(analysis, chosen, choosable_branches(analysis, chooser.maskable) if goals and cfg.depth else ())
    expected = analysis.estimate(removed, branches=True) if cfg.method == "structured" else None
    layers = masks.sparsity({name: state[name] for name in chosen}, chosen)
    write_table(out / "sparsity.csv", layers)
    sparsity_plot(layers, out / "sparsity.svg")
    widths = tuple(
        WidthChange(cluster=c.name, kind=c.kind, before=c.size, after=c.size - int(removed[c.name].sum()), unit=c.unit)
        for c in analysis.clusters
    )
    write_table(out / "widths.csv", widths)
    write_json(out / "removed.json", {name: np.flatnonzero(gone).tolist() for name, gone in removed.items()})
    if weighed is not None:
        write_table(out / SCORES, rows(weighed))
    if weighed is not None and weighed.measured is not None:
        write_table(out / CURVES, points(weighed.measured))
        write_table(out / PRICES, weighed.prices)
    aims = _aims(goals, chooser, aimed, removed)
    for aim in aims:
        progress.say(f"  {aim.words}")
    if weighed is not None and weighed.branches:
        progress.say(f"  whole branches go: {', '.join(branch.name for branch in weighed.branches)}")
    _predictions(goals, aimed.attempts, out)
    zeros = sum(layer.zeros for layer in layers)
    return Pruned(
        folder=out,
        method=cfg.method,
        chosen_by=chosen_by(cfg),
        kinds=cfg.groups,
        sparsity=zeros / analysis.params,
        zeros=zeros,
        params=analysis.params,
        expected_params=expected.params if expected else analysis.params,
        macs=analysis.macs,
        expected_macs=expected.macs if expected else analysis.macs,
        groups=sum(c.size for c in analysis.clusters),
        groups_cut=sum(int(gone.sum()) for gone in removed.values()),
        score_after=evaluate(task, model, data, "test").score,
        layers=layers,
        widths=widths,
        curves=_facts(weighed.measured) if weighed is not None and weighed.measured is not None else None,
        aims=aims,
        align=_left_aligned(cfg),
    )


def _left_aligned(cfg: PruneSection) -> int:
    """What counts of channels are to be multiples of, when the dead ones go: of a checkpoint that was pruned elsewhere
    all go, unless the recipe says a number.
    """
    asked = cfg.method == "structured" or (cfg.method == "given" and cfg.align != "auto")
    return alignment(cfg) if asked else 1


def _given(cfg: PruneSection, model: nn.Module, progress: Progress) -> Masks:
    """Fill `model` from a checkpoint that was pruned elsewhere, and mask what is zero there.

    Raises WeightsError where it does not fit the model, or nothing in it is zero.
    """
    assert cfg.weights is not None
    loaded = load_weights(model, cfg.weights)
    zeros = {name: value != 0 for name, value in weights.prunable(model).items()}
    chosen = {name: mask for name, mask in zeros.items() if not bool(mask.all())}
    if not chosen:
        raise WeightsError(
            f"{cfg.weights} holds no zeros: it was not pruned, or its masks are in another file.",
            "Give the checkpoint with zeros, or with weight_orig and weight_mask; or prune it: leanort deploy",
        )
    count = sum(int((~mask).sum()) for mask in chosen.values())
    progress.say(f"  {loaded}; {count:,} zeros in {len(chosen)} weights are taken as its masks")
    masks.apply(model, chosen)
    return chosen


def _aims(goals: Sequence[Cost], chooser: Chooser, aimed: Aimed, removed: Removed) -> tuple[Aim, ...]:
    """What was asked for, what is expected of the choice, and what a whole model of it took before training."""
    made, attempts = [], aimed.attempts
    for number, (goal, cost) in enumerate(zip(goals, chooser.costs, strict=True)):
        trial = attempts[aimed.best].measured[number] if attempts else None
        unit, dense = goal.unit
        made.append(
            Aim(
                quantity=goal.quantity,
                name=goal.name,
                unit=unit,
                dense=dense,
                goal=goal.goal,
                predicted=attempts[0].predicted[number] if attempts else cost.of(removed),
                expected=trial.ratio.value if trial is not None else cost.of(removed),
                measured=trial is not None,
                attempts=len(attempts),
                error=goal.fit.error if isinstance(goal, Timed) else 0.0,
                threads=goal.threads if isinstance(goal, Timed) else None,
                batch=goal.batch if isinstance(goal, Timed) else None,
            )
        )
    return tuple(made)


@dataclass(frozen=True)
class _Prediction:
    """A row of the table of predictions: of a model `left out` of the latency table, or of an `attempt` at a choice."""

    cost: str
    of: str
    predicted: float
    measured: float


def _predictions(goals: Sequence[Cost], attempts: Sequence[Attempt], out: Path) -> None:
    """What latency tables predicted and what was measured, as a table, and of the first as a plot."""
    rows: list[_Prediction] = []
    for number, goal in enumerate(goals):
        if not isinstance(goal, Timed):
            continue
        tried = [(one.predicted[number], one.measured[number]) for one in attempts]
        timed = [(predicted, trial.ratio.value) for predicted, trial in tried if trial is not None]
        if not rows:
            plot(goal.fit.checked, timed, goal.goal, goal.name, out / "latency.svg")
        rows += [_Prediction(goal.name, "left out", *pair) for pair in goal.fit.checked]
        rows += [_Prediction(goal.name, f"attempt {at}", *pair) for at, pair in enumerate(timed, start=1)]
    if rows:
        write_table(out / LATENCY, rows)


def _facts(measured: Measured) -> CurveFacts:
    return CurveFacts(
        shares=measured.shares, samples=measured.samples, refit=measured.refit, seconds=round(measured.seconds, 3)
    )


def _removed(analysis: Analysis, chosen: Masks, branches: Sequence[Branch] = ()) -> Removed:
    """Which groups the masks take whole: the first producer's slices are all masked, or all of one of `branches` is,
    and with it the group of each cluster inside that masks of widths leave.

    An embedding's table alone has no producer: its columns are masked as a reader's are.
    """
    removed: Removed = {}
    for cluster in analysis.clusters:
        gone = np.zeros(cluster.size, dtype=bool)
        name, dim = (*cluster.producers, *cluster.readers)[0]
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
    for branch in branches:
        if all(name in chosen and not chosen[name].any() for name in branch.tensors):
            removed |= {name: np.ones_like(removed[name]) for name in branch.inside}
    return removed
