"""A task of the user's own: a callable that returns a loss and scores.

    def task():
        return {"loss": my_loss, "scores": {"error": my_error}, "lower_is_better": ["error"], "shares": []}

`my_loss(outputs, target)` gives one number for a batch, `my_error(outputs, target)` one number per sample. `outputs` is
the tensor where the model has one output (or task.output names one), else a mapping of name to tensor.

A detector gives `boxes`, with or without further scores: a callable (outputs) -> for each image a mapping of boxes
(n, 4) as x1, y1, x2, y2, scores and labels. Its first score is the mean average precision (`detection`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from foundation.errors import ConfigError, first_line, nearest
from pipeline.data.parts import Target
from pipeline.models.calling import Outputs
from pipeline.models.from_code import load_callable, user_code
from pipeline.recipe.task import TaskSection
from pipeline.tasks import detection
from pipeline.tasks.task import Task, apart, by_sample, only
from validators.scores import Score, per_sample

KEYS = ("loss", "scores", "boxes", "lower_is_better", "shares", "name")


def task(cfg: TaskSection, reads: tuple[str, ...]) -> Task:
    """The task that `file.py:callable` describes, or a `Task` that it returns. Raises ConfigError for anything else."""
    call, digest = load_callable(cfg.name, ConfigError)
    with user_code(cfg.name, ConfigError):
        made: Any = call()
    if isinstance(made, Task):
        return made
    what = f"task.name: {cfg.name}"
    if not isinstance(made, Mapping):
        raise ConfigError(
            f"{what} returned {type(made).__name__}.", "Return a mapping with loss and scores (docs/tasks.md)."
        )
    unknown = [str(key) for key in made if key not in KEYS]
    if unknown:
        raise ConfigError(
            f"{what} has an entry {unknown[0]!r}.", nearest(unknown[0], KEYS) or f"Known: {', '.join(KEYS)}."
        )
    loss, scores, boxes = made.get("loss"), made.get("scores", {}), made.get("boxes")
    if not callable(loss):
        raise ConfigError(f"{what} has no loss.", "Give loss: a callable (outputs, target) -> one number.")
    if boxes is not None and not callable(boxes):
        raise ConfigError(f"{what}: boxes is {type(boxes).__name__}.", "Give a callable (outputs) -> boxes per image.")
    if not isinstance(scores, Mapping) or not (scores or boxes) or not all(map(callable, scores.values())):
        raise ConfigError(
            f"{what} has no scores.", "Give scores: name -> callable (outputs, target) -> one per sample."
        )
    lower, shares = (tuple(made.get(key, ())) for key in ("lower_is_better", "shares"))
    for name in (*lower, *shares):
        if name not in scores:
            raise ConfigError(
                f"{what}: there is no score {name!r}.", nearest(name, scores) or "Name one of the scores."
            )
    given = _given(reads)
    found = _boxes(boxes, given) if boxes is not None else None
    return Task(
        name=str(made.get("name") or cfg.name.rpartition(":")[2]),
        scores=(
            *(detection.scores(found) if found is not None else ()),
            *(
                _score(str(name), score, given, higher=name not in lower, share=name in shares)
                for name, score in scores.items()
            ),
        ),
        losses=by_sample(lambda outputs, target: loss(given(outputs), target)),
        divergence=lambda student, teacher, temperature: apart(only(student, reads), only(teacher, reads), temperature),
        reads=reads,
        drawn=partial(detection.drawn, found) if found is not None else None,
        panels="truth, dense, shipped",
        code=digest,
    )


def _given(reads: tuple[str, ...]) -> Callable[[Outputs], Any]:
    """What the user's functions are called with."""
    if len(reads) == 1:
        return lambda outputs: outputs[reads[0]]
    return lambda outputs: only(outputs, reads)


def _boxes(boxes: Callable[[Any], Any], given: Callable[[Outputs], Any]) -> detection.Boxes:
    def found(outputs: Outputs) -> Any:
        try:
            return boxes(given(outputs))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the user's own code, which may call sys.exit
            raise ConfigError(f"boxes failed: {first_line(error)}", "Mend it.") from error

    return found


def _score(
    name: str, score: Callable[..., Any], given: Callable[[Outputs], Any], *, higher: bool, share: bool
) -> Score:
    def values(outputs: Outputs, target: Target) -> Tensor:
        try:
            found = score(given(outputs), target)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the user's own code, which may call sys.exit
            raise ConfigError(f"The score {name} failed: {first_line(error)}", "Mend it.") from error
        if not isinstance(found, Tensor) or found.dim() != 1:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(f"The score {name} gave {shape}.", "Return a tensor with one number per sample.")
        return found

    return per_sample(name, values, higher_is_better=higher, share=share)
