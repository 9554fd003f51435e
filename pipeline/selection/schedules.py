"""How masks come about over time, as a table: at once, in rounds with recovery between them, or gradually."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from foundation.errors import ConfigError, nearest
from pipeline.progress import Progress
from pipeline.selection.criteria import Evidence
from pipeline.training import masks
from pipeline.training.loop import OnStep
from pipeline.training.masks import Masks


@dataclass(frozen=True)
class Course:
    """What a schedule works with.

    `choose(what is seen of the model, ratio)` gives masks; `see` looks at the model as it is now. `recover(name, masks,
    on_step)` trains it with the masks held, resumable under that name, and returns the masks that it ended with.
    `steps`: rounds, or mask updates per epoch of `epochs`.
    """

    model: nn.Module
    ratio: float
    steps: int
    epochs: int
    choose: Callable[[Evidence, float], Masks]
    see: Callable[[], Evidence]
    recover: Callable[[str, Masks | None, OnStep | None], Masks]
    progress: Progress


Schedule = Callable[[Course], Masks]
"""Puts masks on the model and returns them."""


def _one_shot(course: Course) -> Masks:
    chosen = course.choose(course.see(), course.ratio)
    masks.apply(course.model, chosen)
    return chosen


def _iterative(course: Course) -> Masks:
    """`steps` rounds, each cutting an equal part of what is to go and then recovering."""
    chosen: Masks = {}
    for number in range(1, course.steps + 1):
        chosen = course.choose(course.see(), course.ratio * number / course.steps)
        masks.apply(course.model, chosen)
        course.progress.say(f"  round {number} of {course.steps}: {number / course.steps:.0%} of what is to go")
        if number < course.steps:
            course.recover(f"round{number}", chosen, None)
    return chosen


def _gradual(course: Course) -> Masks:
    """Masks tighten by the cubic schedule, `steps` times an epoch, while the model trains; then they hold."""
    masks.apply(course.model, course.choose(course.see(), 0.0))

    def tighten(step: int, total: int) -> Masks | None:
        if step % max(1, total // max(1, course.steps * course.epochs)):
            return None
        return course.choose(course.see(), cubic_ratio(course.ratio, step, total))

    return course.recover("gradual", None, tighten)


SCHEDULES: Mapping[str, Schedule] = {"one-shot": _one_shot, "iterative": _iterative, "gradual": _gradual}


def find(name: str) -> Schedule:
    """The schedule called `name`. Raises ConfigError, naming the nearest one."""
    if name not in SCHEDULES:
        hint = nearest(name, SCHEDULES) or f"There are {', '.join(SCHEDULES)}."
        raise ConfigError(f"prune.schedule: there is no schedule {name!r}.", hint)
    return SCHEDULES[name]


def cubic_ratio(
    ratio: float, step: int, total: int, *, start: float = 0.0, begin: float = 0.0, end: float = 0.75
) -> float:
    """Ratio to have reached at `step` of `total`: s_f + (s_i - s_f) (1 - t)³ (Zhu & Gupta 2017, arXiv:1710.01878).

    t runs from 0 to 1 between the shares `begin` and `end` of the steps; after `end` the network recovers at the final
    ratio. `start` is the initial ratio s_i.
    """
    share = (step / max(total, 1) - begin) / max(end - begin, 1e-12)
    left = 1.0 - min(max(share, 0.0), 1.0)
    return ratio + (start - ratio) * left**3
