"""This engine: groups chosen, masked, fitted in closed form; trained on from there where that is asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.compare.problems import ALIGN, Problem, accuracy, train
from pipeline.channels.coupling.analyse import analyse
from pipeline.channels.program.capture import capture
from pipeline.recipe.prune import PruneSection
from pipeline.recovery import closed_form
from pipeline.selection import choose
from pipeline.selection.allocation import Removed
from pipeline.selection.criteria import Evidence
from pipeline.selection.kinds import policy_of
from pipeline.training import masks

SAMPLES = 2000
CURVE_SAMPLES = 64
STEPS = 12
GENTLE = 5e-5
"""Learning rate after a fit."""


@dataclass(frozen=True)
class Result:
    """Test accuracy (percent), share of MACs left, seconds of choosing and of recovery."""

    accuracy: float
    macs: float
    choice_seconds: float
    seconds: float


def results(
    dense: nn.Module, problem: Problem, wanted: tuple[float, ...], scope: str, train_seconds: float = 0.0
) -> Iterator[tuple[float, str, Result]]:
    """For each share of MACs: ("closed form", its result) and, with seconds to train, ("closed form, trained", ...)."""
    captured = capture(dense, (problem.x[:2],))
    cfg = PruneSection(scope=scope, align=ALIGN, floor=0.0 if scope == "layer" else 0.1, ratio=0.5)
    analysis = analyse(captured, policy_of(cfg.groups))
    x, _ = problem.part("train")
    began = time.perf_counter()
    state = {name: value.detach() for name, value in captured.state.items()}
    seen = Evidence(state, samples=problem.part("calibration")[0][:CURVE_SAMPLES])
    maskable = masks.maskable(dense)
    worth = choose.measured(analysis, seen, cfg, maskable)
    measuring = time.perf_counter() - began
    for share in wanted:
        began = time.perf_counter()
        removed = _bisected(
            lambda ratio: choose.choose_groups(
                analysis, seen, cfg.model_copy(update={"ratio": ratio}), ratio, maskable, worth
            ),
            lambda gone: analysis.estimate(gone).macs / analysis.macs,
            share,
        )
        chosen = {n: torch.from_numpy(m) for n, m in analysis.masks(removed).items() if n in maskable}
        choosing = measuring + time.perf_counter() - began
        left = analysis.estimate(removed).macs / analysis.macs
        made = closed_form.recover(captured, chosen, (x[:SAMPLES],))
        fitted = captured.with_state(made.state).fold(chosen)
        yield share, "closed form", Result(accuracy(fitted, problem), left, choosing, made.seconds)
        if train_seconds:
            began = time.perf_counter()
            got = _trained(dense, problem, made.state, chosen, train_seconds)
            yield (
                share,
                "closed form, trained",
                Result(got, left, choosing, made.seconds + time.perf_counter() - began),
            )


def _bisected(choose_at: Callable[[float], Removed], left: Callable[[Removed], float], wanted: float) -> Removed:
    low, high = 0.0, 0.98
    best = choose_at(high)
    for _ in range(STEPS):
        middle = (low + high) / 2
        removed = choose_at(middle)
        if left(removed) <= wanted * 1.01:
            high, best = middle, removed
        else:
            low = middle
    return best


def _trained(
    dense: nn.Module, problem: Problem, state: dict[str, Tensor], chosen: masks.Masks, seconds: float
) -> float:
    """Test accuracy after gentle distillation, kept only where the calibration part does not say it is worse."""
    model = problem.build().eval()
    model.load_state_dict(state, strict=False)
    masks.apply(model, chosen)
    before = accuracy(model, problem, "calibration"), accuracy(model, problem)
    x, y = problem.part("train")
    train(model, x, y, lr=GENTLE, seconds=seconds, teacher=dense)
    return accuracy(model, problem) if accuracy(model, problem, "calibration") >= before[0] else before[1]
