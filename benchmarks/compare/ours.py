"""This engine: groups chosen, masked, fitted in closed form; trained on from there where that is asked."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.export import ExportedProgram

from benchmarks.compare.problems import ALIGN, Problem, Score, accuracy, outputs, train
from benchmarks.compare.timed import OPSET, Clock, hit, scoring, table
from pipeline.channels.coupling.analyse import analyse
from pipeline.channels.coupling.groups import Analysis
from pipeline.channels.operators.trace import Policy
from pipeline.channels.program.capture import Captured, capture
from pipeline.latency.probes import Setting, cut
from pipeline.recipe.prune import PruneSection
from pipeline.recovery import closed_form
from pipeline.recovery.pruned_size import at_pruned_size
from pipeline.selection import choose
from pipeline.selection.activations import norm_scales, observe_readers
from pipeline.selection.choose import Weighed
from pipeline.selection.cost import Counted, Timed
from pipeline.selection.criteria import Evidence
from pipeline.selection.curves import Measured
from pipeline.selection.kinds import policy_of
from pipeline.training import masks

SAMPLES = 2000
CURVE_SAMPLES = 64
FLOOR = 0.1
"""Of a layer's channels, what curves leave at the least."""
AFTER_FIT = 5e-4
"""Learning rate after a fit, half of what a pruned model takes: of ResNet-18 at 0.15, seed 0, four epochs made
96.8 % of 96.6 at 2e-4, 97.1 at 5e-4 and 97.0 at 1e-3 (dense 97.5).
"""
BY_TABLE = "milliseconds"
"""The scope of a choice by a latency table."""


@dataclass(frozen=True)
class Result:
    """Score on the test part, share of MACs left, seconds of choosing and of recovery, share of latency."""

    score: Score
    macs: float
    choice_seconds: float
    seconds: float
    latency: float | None = None


@dataclass(frozen=True)
class Study:
    """What is found out about a dense model once, whatever is asked for then: its program, what each width and each
    branch is worth, and the `seconds` that took.
    """

    captured: Captured
    analysis: Analysis
    cfg: PruneSection
    seen: Evidence
    maskable: frozenset[str]
    worth: Measured | None
    branches: choose.Offered
    seconds: float


def _study(dense: nn.Module, problem: Problem, choice: str, align: int) -> Study:
    """For a choice by a scope and a criterion of the recipe."""
    scope, _, criterion = choice.partition(":")
    captured = capture(dense, (problem.x[:2],))
    cfg = PruneSection(
        scope=scope, criterion=criterion, align=align, floor=0.0 if scope == "layer" else FLOOR, ratio=0.5
    )
    analysis = analyse(captured, policy_of(cfg.groups))
    began = time.perf_counter()
    state = {name: value.detach() for name, value in captured.state.items()}
    calibration, _ = problem.part("calibration")
    others = (calibration[CURVE_SAMPLES:SAMPLES],)  # what judges a refit is nothing that it was fitted to
    seen = Evidence(
        state,
        samples=(calibration[:CURVE_SAMPLES],),
        scales=norm_scales(captured),
        readers=observe_readers(captured, analysis.clusters, others, grams=True) if choose.observed(cfg) else {},
        others=others,
    )
    maskable = masks.maskable(dense)
    worth = choose.measured(analysis, seen, cfg, maskable)
    branches = choose.branches_worth(analysis, seen, maskable, None) if worth is not None else choose.Offered()
    return Study(captured, analysis, cfg, seen, maskable, worth, branches, time.perf_counter() - began)


def results(
    dense: nn.Module,
    problem: Problem,
    wanted: tuple[float, ...],
    choice: str,
    train_seconds: float = 0.0,
    clock: Clock | None = None,
    *,
    align: int = ALIGN,
    studies: dict[str, Study] | None = None,
    score: Callable[[Any], Score] | None = None,
) -> Iterator[tuple[float, str, Result]]:
    """For each share of MACs: ("closed form", its result) and, with seconds to train, ("closed form, trained", ...).

    `choice`: a scope and a criterion of the recipe, such as "curves:l2"; a criterion that needs no labels. With a
    `clock`, shares are of latency: "milliseconds:l2" chooses by a latency table, other scopes by MACs, and either is
    asked again until a whole model takes as long as wanted. `align`: what counts of channels are multiples of.
    `studies`: what is known of the model already, and for the next choice that asks for the same. `score`: what a
    network is worth, by default on the test part.
    """
    needed = choice.replace(BY_TABLE, "curves")
    studies = {} if studies is None else studies
    if needed not in studies:
        studies[needed] = _study(dense, problem, needed, align)
    studied = studies[needed]
    captured, analysis, cfg, maskable = studied.captured, studied.analysis, studied.cfg, studied.maskable
    by_table = choice.startswith(BY_TABLE)
    x, _ = problem.part("train")
    began = time.perf_counter()
    goal: Counted | Timed = Counted(analysis, "macs", 1.0, analysis.macs / 1e6)
    if by_table:
        assert clock is not None
        goal = Timed(table(dense, problem, analysis, maskable, cfg.align, int8=clock.int8), 1.0, 1.0, 1, 1)
    whole = {c.name: np.zeros(c.size, dtype=bool) for c in analysis.clusters}

    def at_share(share: float) -> Weighed:
        """As much left as asked for, of latency by the table or of MACs."""
        # A table's shares are of float32.
        cost = replace(goal, goal=min(share, 0.999) * goal.of(whole)) if by_table else replace(goal, goal=share)
        seen, worth, branches = studied.seen, studied.worth, studied.branches
        return choose.choose_groups(analysis, seen, cfg, cfg.ratio, maskable, worth, [cost], branches)

    def smaller(weights: Mapping[str, Tensor], chosen: masks.Masks) -> ExportedProgram:
        return cut(analysis, weights, chosen, Setting(1, 1, clock is not None and clock.int8, OPSET, cfg.align))

    def took(weighed: Weighed) -> float:
        assert clock is not None
        return clock.of(smaller(studied.seen.weights, choose.masks_of(analysis, weighed, maskable)))

    score = score or scoring(dense, problem, clock)
    measuring = studied.seconds + time.perf_counter() - began
    for share in wanted:
        began = time.perf_counter()
        latency = None
        if clock is None:
            weighed = at_share(share)
        else:
            weighed, latency = hit(at_share, took, share)
        chosen = choose.masks_of(analysis, weighed, maskable)
        choosing = measuring + time.perf_counter() - began
        left = analysis.estimate(weighed.removed, branches=True).macs / analysis.macs
        made = closed_form.recover(captured, chosen, (x[:SAMPLES],))
        got = score(smaller(made.state, chosen) if clock else captured.with_state(made.state).fold(chosen))
        yield share, "closed form", Result(got, left, choosing, made.seconds, latency)
        if train_seconds:
            began = time.perf_counter()
            got = score(_trained(dense, problem, captured, made.state, chosen, train_seconds))
            yield (
                share,
                "closed form, trained",
                Result(got, left, choosing, made.seconds + time.perf_counter() - began, latency),
            )


def _trained(
    dense: nn.Module,
    problem: Problem,
    captured: Captured,
    state: dict[str, Tensor],
    chosen: masks.Masks,
    seconds: float,
) -> nn.Module:
    """The model after distillation at the pruned size, or before it where the calibration part says that it is worse;
    making the smaller model is counted in `seconds`.
    """
    began = time.perf_counter()
    model = problem.build().eval()
    model.load_state_dict(state, strict=False)
    masks.apply(model, chosen)
    small, _ = at_pruned_size(model, problem.build(), captured, chosen, Policy())
    model = small.model if small else model
    seen, labels = problem.part("calibration")
    before, right = copy.deepcopy(model), accuracy(outputs(model, seen), labels)
    x, y = problem.part("train")
    left = max(seconds - (time.perf_counter() - began), 1e-3)
    train(model, x, y, lr=AFTER_FIT, seconds=left, teacher=dense)
    return model if accuracy(outputs(model, seen), labels) >= right else before
