"""A target is hit, not hoped for: the first choice is timed as a whole model, what was measured corrects the table, and
the choice is made again, all before anything is spent on weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.channels.coupling.groups import Analysis
from pipeline.latency.probes import Setting
from pipeline.latency.trial import Trial, tried
from pipeline.models.source import ModelSource
from pipeline.progress import Progress
from pipeline.recipe.prune import PruneSection
from pipeline.selection.allocation import Removed
from pipeline.selection.choose import Chooser
from pipeline.selection.cost import Cost, Timed
from pipeline.selection.criteria import Evidence
from pipeline.selection.targets import aimed, check_met, settings

ATTEMPTS = 4
"""Choices that are timed: the first by the table alone, each of the others corrected by what the one before took."""
NEAR = 0.01
"""Of the target: nearer than that, the measurement does not tell."""


@dataclass(frozen=True)
class Attempt:
    """One choice: what was predicted of it and what it took, per cost; None where that was not measured."""

    predicted: tuple[float, ...]
    measured: tuple[Trial | None, ...]

    def missed(self, costs: Sequence[Cost]) -> float:
        """How far the worst cost is from its goal, relative to that; what is only counted is never too low."""
        off = [0.0]
        for cost, predicted, measured in zip(costs, self.predicted, self.measured, strict=True):
            if measured is not None:
                off.append(abs(measured.ratio.value / cost.goal - 1))
            else:
                off.append(max(0.0, predicted / cost.goal - 1))
        return max(off)


def take_aim(
    cfg: PruneSection,
    chooser: Chooser,
    analysis: Analysis,
    source: ModelSource,
    seen: Evidence,
    weights: Mapping[str, Any],
    progress: Progress,
) -> tuple[Attempt, ...]:
    """Correct the chooser's costs until its choice, timed as it would ship, meets every goal; the attempts.

    Where a device's file stands for the latency, nothing can be timed here, and the table alone decides. Raises
    ConfigError where the corrected table says that a goal cannot be met.
    """
    goals = tuple(chooser.costs)
    timed = (
        [number for number, cost in enumerate(goals) if isinstance(cost, Timed)] if cfg.target.device is None else []
    )
    places = dict(zip(timed, settings(cfg), strict=False))
    attempts: list[tuple[Attempt, tuple[Cost, ...]]] = []
    before: Removed | None = None
    with progress.bar("aim", ATTEMPTS) as bar:
        for number in range(ATTEMPTS):
            chooser.choose(seen, cfg.ratio)
            assert chooser.weighed is not None, "a target goes with whole groups"
            removed = chooser.weighed.removed
            if before is not None and all((removed[name] == before[name]).all() for name in removed):
                break  # no width lies nearer
            before = removed
            costs = tuple(chooser.costs)
            attempt = _attempt(costs, analysis, weights, removed, source, places)
            attempts.append((attempt, costs))
            bar(number + 1, _words(attempt))
            if attempt.missed(goals) <= NEAR or not places:
                break
            found = {at: one.ratio.value for at, one in enumerate(attempt.measured) if one is not None}
            chooser.costs = aimed(costs, removed, found)
            check_met(cfg, chooser, analysis)
    best, chooser.costs = min(attempts, key=lambda pair: pair[0].missed(goals))
    others = [attempt for attempt, _ in attempts if attempt is not best]
    return (*others, best)


def _attempt(
    costs: Sequence[Cost],
    analysis: Analysis,
    weights: Mapping[str, Any],
    removed: Removed,
    source: ModelSource,
    places: Mapping[int, Setting],
) -> Attempt:
    measured = tuple(
        tried(analysis, weights, removed, source, places[number]) if number in places else None
        for number in range(len(costs))
    )
    return Attempt(tuple(cost.of(removed) for cost in costs), measured)


def _words(attempt: Attempt) -> str:
    one = next((m for m in attempt.measured if m is not None), None)
    return f"predicted {attempt.predicted[0]:.3f}" + ("" if one is None else f", took {one.ratio.value:.3f}")
