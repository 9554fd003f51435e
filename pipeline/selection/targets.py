"""From what a recipe asks for to the costs that a choice has to meet; and whether they can be met at all."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from foundation.errors import ConfigError, TargetError
from pipeline.channels.coupling.analyse import analyse
from pipeline.channels.coupling.groups import Analysis, Cluster
from pipeline.channels.dead.removable import Branch
from pipeline.latency import profile
from pipeline.latency.probes import Setting
from pipeline.latency.profile import Profile
from pipeline.measurements import Measurements
from pipeline.models.graph import graph_of
from pipeline.models.source import ModelSource
from pipeline.progress import Progress
from pipeline.recipe.prune import PruneSection
from pipeline.recipe.target import Amount, Quantity
from pipeline.selection.allocation import Budget, Removed, overridden, widths_allowed
from pipeline.selection.choose import Chooser, alignment, budget_of, choosable, choosable_branches, finer
from pipeline.selection.cost import Cost, Counted, Timed, excess, over
from pipeline.selection.kinds import policy_of
from pipeline.selection.widths import least
from pipeline.training import masks

PARAMETER_BYTES, INT8_BYTES = 4, 1
MET_ANYWAY = 1.25
"""Times the dense model's latency: a target above it is refused before the table is measured. The first measurements of
a table tell the dense model's time by no better than a busy machine allows; what is nearer to it is left to them all.
"""
MANY = 0.01
"""Of the parameters: an operator that keeps a smaller share is no reason why a target cannot be reached."""


def costs(
    cfg: PruneSection,
    analysis: Analysis,
    source: ModelSource,
    maskable: frozenset[str],
    kept: Measurements,
    progress: Progress,
) -> tuple[Cost, ...]:
    """What the recipe's target asks for, latency first; () where it asks for nothing.

    A latency is measured here, or kept from before, or read from a device's file. Raises TargetError for a target that
    the dense model meets already or that nothing meets, ConfigError for a device's file that is of something else.
    """
    amounts = cfg.target.amounts
    if not amounts:
        return ()
    clusters = choosable(analysis, maskable)
    if not clusters:
        why, _ = _in_the_way(analysis, clusters, budget_of(cfg, cfg.ratio), (), {})
        raise TargetError(
            f"The target cannot be reached: no width of this model can change.{_held(why)}",
            "Ship it as it is: --set prune.method=none",
        )
    counted: list[Cost] = []  # first: it costs nothing to see that one of these cannot be
    if "macs" in amounts:
        goal = _goal("macs", amounts["macs"], analysis.macs)
        counted.append(Counted(analysis, "macs", goal, analysis.macs / 1e6))
    if "params" in amounts:
        goal = _goal("params", amounts["params"], analysis.params)
        counted.append(Counted(analysis, "params", goal, analysis.params / 1e6))
    if "size" in amounts:
        each = INT8_BYTES / PARAMETER_BYTES if cfg.target.int8 else 1.0
        size = analysis.params * PARAMETER_BYTES
        goal = _goal("size", amounts["size"], size)
        if goal < each:
            counted.append(Counted(analysis, "size", goal, size / 1e6, each))
        elif len(amounts) == 1:
            _refuse_met("size", size * each, " in int8")
    check(cfg, analysis, clusters, counted, maskable)
    timed: list[Cost] = []
    if "latency" in amounts:
        branches = choosable_branches(analysis, maskable)
        for setting in settings(cfg):
            measured = profiled(cfg, analysis, source, setting, clusters, branches, kept, progress)
            goal = _goal("latency", amounts["latency"], measured.dense_ms)
            timed.append(Timed(measured.fit(analysis), goal, measured.dense_ms, setting.threads, setting.batch))
    made = (*timed, *counted)
    if timed:
        check(cfg, analysis, clusters, made, maskable)
    return made


def check_before(cfg: PruneSection, source: ModelSource, kept: Measurements, progress: Progress) -> None:
    """Raise TargetError for a target that cannot be met, or is met already, before anything is spent on weights, which
    no latency hangs on. What is measured for it is kept.
    """
    if cfg.target.device is not None and "latency" not in cfg.target.amounts:
        raise ConfigError("A device was given, and no latency that is to be met on it.", "Add --latency 0.4, say.")
    if not cfg.target.amounts:
        return
    model = source.build()
    costs(cfg, analyse(graph_of(model, source), policy_of(cfg.groups)), source, masks.maskable(model), kept, progress)


def settings(cfg: PruneSection) -> list[Setting]:
    """Every setting at which the latency has to be met."""
    target = cfg.target
    return [
        Setting(threads, batch, bool(target.int8), target.opset or 23, alignment(cfg))
        for threads in target.threads or (1,)
        for batch in target.batch_sizes or (1,)
    ]


def profiled(
    cfg: PruneSection,
    analysis: Analysis,
    source: ModelSource,
    setting: Setting,
    clusters: Sequence[Cluster],
    branches: Sequence[Branch],
    kept: Measurements,
    progress: Progress,
) -> Profile:
    """The latency table: from the recipe's device file, or of this machine."""
    if cfg.target.device is not None:
        return profile.read(Path(cfg.target.device), analysis, source, setting, clusters, branches)
    wanted = cfg.target.amounts.get("latency")  # none where the table is all that is asked for

    def dense_known(ms: float) -> None:
        if wanted is not None and wanted.of(ms) > MET_ANYWAY:
            _refuse_met("latency", ms)

    return profile.measure(analysis, source, setting, clusters, kept, progress, branches, dense_known=dense_known)


def _goal(quantity: Quantity, wanted: Amount, dense: float) -> float:
    goal = wanted.of(dense)
    if goal >= 1:
        _refuse_met(quantity, dense)
    return goal


def _refuse_met(quantity: Quantity, dense: float, form: str = "") -> NoReturn:
    has = {
        "latency": f"the dense model takes {dense:.3g} ms",
        "macs": f"the dense model has {dense / 1e6:,.4g} million",
        "params": f"the dense model has {dense / 1e6:,.4g} million",
        "size": f"the dense model's weights have {dense / 1e6:.4g} MB",
    }[quantity]
    raise TargetError(
        f"The target {quantity} is met without pruning: {has}{form}.",
        "Ask for less, or ship it as it is: --set prune.method=none",
    )


def check(
    cfg: PruneSection,
    analysis: Analysis,
    clusters: Sequence[Cluster],
    costs: Sequence[Cost],
    maskable: frozenset[str],
) -> None:
    """Raise TargetError where even the fastest widths that the recipe allows do not meet every goal, saying what is
    the least that can be had, and what stands in the way.
    """
    if not costs:
        return
    scores = {c.name: _plain(c) for c in clusters}
    budget = finer(cfg, budget_of(cfg, cfg.ratio), costs)[-1]
    narrowest = least(clusters, scores, budget)
    if not excess(costs, narrowest):
        return
    fixed = overridden([c.name for c in clusters], budget.overrides).keys()
    narrowest = fastest(costs, narrowest, fixed)
    if not excess(costs, narrowest):
        return
    if cfg.depth and cfg.scope == "curves":  # whole branches may go as well, with all that is inside them
        branches = choosable_branches(analysis, maskable)
        inside = {name for branch in branches if fixed.isdisjoint(branch.inside) for name in branch.inside}
        deepest = narrowest | {c.name: np.ones(c.size, np.bool_) for c in clusters if c.name in inside}
        if not excess(costs, deepest):
            return
        narrowest = min(narrowest, deepest, key=lambda one: excess(costs, one))
    left = [(cost, cost.of(narrowest)) for cost in costs]
    missed = "; ".join(
        f"{cost.name} {cost.goal:.3g} of dense, the least is {value:.3g}"
        for cost, value in left
        if over(value, cost.goal) > 0
    )
    why, hint = _in_the_way(analysis, clusters, budget, left, narrowest)
    raise TargetError(f"The target cannot be reached: {missed}.{_held(why)}", hint)


def _held(why: Sequence[str]) -> str:
    return f" What is in the way: {'; '.join(why)}." if why else ""


def _in_the_way(
    analysis: Analysis,
    clusters: Sequence[Cluster],
    budget: Budget,
    left: Sequence[tuple[Cost, float]],
    narrowest: Removed,
) -> tuple[list[str], str]:
    """Why no less than `left` of each cost can be had under `budget`, and what to do about it."""
    why = []
    for cost, value in left:
        constant = cost.at_any_width(narrowest) if isinstance(cost, Timed) and over(value, cost.goal) > 0 else 0.0
        if constant > value / 2 or constant >= cost.goal:
            why.append(f"its operators take {constant:.2g} of dense at any width")
        if constant >= cost.goal:
            return why, "Ask for more: no width is narrow enough. Larger inputs or batches leave more to save."
    many = [one for one in analysis.blocked if one.params > MANY * analysis.params]
    for one in sorted(many, key=lambda one: -one.params)[:2]:
        why.append(f"{one.op} at {one.node} keeps {one.params:,} parameters ({one.reason})")
    fixed = overridden([c.name for c in clusters], budget.overrides)
    wide = [c for c in clusters if c.name in fixed and (~narrowest[c.name]).sum() > widths_allowed(c, budget)[-1]]
    if wide:
        those = "all layers" if len(wide) == len(clusters) else f"{len(wide)} of {len(clusters)} layers"
        why.append(f"prune.overrides keeps {those} wider than they could be")
    holds = _held_by([c for c in clusters if c.name not in fixed], budget)
    if "floor" in holds:
        why.append(f"every layer keeps prune.floor = {budget.floor:g} of its channels")
    if "align" in holds:
        why.append(f"counts are multiples of prune.align = {budget.align}")
    could = [{"floor": "lower prune.floor", "align": "set prune.align to 1"}[name] for name in holds]
    if wide:
        could.append("take layers out of prune.overrides")
    return why, ", or ".join(("Ask for more", *could)) + "."


def _held_by(clusters: Sequence[Cluster], budget: Budget) -> list[str]:
    """Which of `budget`'s limits, "floor" and "align", keeps some cluster from being narrower: each that does alone, or
    both where only both together do.
    """

    def narrowest(limits: Budget) -> list[int]:
        return [widths_allowed(c, limits)[-1] for c in clusters]

    free, now = {"floor": replace(budget, floor=0.0), "align": replace(budget, align=1)}, narrowest(budget)
    alone = [name for name, limits in free.items() if narrowest(limits) != now]
    return alone or (list(free) if narrowest(replace(budget, floor=0.0, align=1)) != now else [])


def fastest(costs: Sequence[Cost], narrowest: Removed, fixed: Collection[str]) -> Removed:
    """`narrowest`, but for clusters that cost less whole: a norm over a stream of which a part is gone needs pads.
    Those that are `fixed` stay as they are.
    """
    found, missing = dict(narrowest), excess(costs, narrowest)
    for name, gone in narrowest.items():
        if name in fixed:
            continue
        whole = {**found, name: np.zeros_like(gone)}
        left = excess(costs, whole)
        if left < missing:
            found, missing = whole, left
    return found


def check_met(cfg: PruneSection, chooser: Chooser, analysis: Analysis) -> None:
    """`check` for the costs of a chooser, after what was measured corrected them."""
    check(cfg, analysis, choosable(analysis, chooser.maskable), chooser.costs, chooser.maskable)


def _plain(cluster: Cluster) -> Any:
    return np.arange(cluster.size, dtype=float)
