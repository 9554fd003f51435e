"""Which task: named by the recipe, of the user's own, or read off targets and outputs; what does not fit is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from foundation.errors import ConfigError, DataError, Explained, ModelError, first_line, nearest
from pipeline.data.parts import IGNORED, Data, Target
from pipeline.data.samples import leaves_of
from pipeline.models.calling import ONLY, Outputs
from pipeline.models.trial import check_logits
from pipeline.recipe.task import TaskSection
from pipeline.tasks import classification, ctc, distil, multilabel, own, regression, segmentation, tokens
from pipeline.tasks.task import Task
from validators.scores import measured

Made = Callable[[str, str], Task]
"""(name, output that is judged) -> the task."""

TASKS: dict[str, Made] = {
    "classification": classification.task,
    "text-classification": classification.task,
    "multilabel": multilabel.task,
    "segmentation": segmentation.task,
    "token-classification": tokens.task,
    "ctc": ctc.task,
    "regression": regression.task,
}
"""Tasks with labels, by name."""
UNLABELLED = ("distil", "embedding")
"""Tasks whose targets are the dense model's outputs."""


def names() -> tuple[str, ...]:
    """Every task that can be named."""
    return (*TASKS, *UNLABELLED)


def check(cfg: TaskSection) -> None:
    """Raise ConfigError for a name that is no task; cheap, so that a run can ask before it spends anything."""
    if cfg.name == "detection":
        raise ConfigError(
            "task.name: detection has no loss of its own, since every detector has another.",
            "Give --set task.name=path/to/file.py:callable that returns loss and boxes (docs/tasks.md).",
        )
    if cfg.name != "auto" and ":" not in cfg.name and cfg.name not in names():
        raise ConfigError(
            f"task.name: there is no task {cfg.name!r}.",
            nearest(cfg.name, names()) or f"There are {', '.join(names())}, and path/to/file.py:callable.",
        )


def targets_of(cfg: TaskSection) -> Literal["auto", "classes", "values"]:
    """Whether whole numbers are to be read as classes, as values, or as whichever they can be ("auto")."""
    if cfg.name in classification.NAMES:
        return "classes"
    return "auto" if cfg.name in ("auto", *UNLABELLED) else "values"


def pad_of(cfg: TaskSection) -> int | None:
    """What fills up targets that differ in size, where the task is built in; own ones get them as they are."""
    if ":" in cfg.name:
        return None
    return ctc.PADDING if cfg.name == "ctc" else IGNORED


def choose(
    cfg: TaskSection, data: Data, outputs: Outputs, target: Target, spec: str, rows: int, *, image: bool
) -> Task:
    """The task for `rows` real samples' `outputs` and `target` (None: the data has no labels).

    `image`: the model is a classifier as far as one can know where nothing is labelled: it is fed one image.
    Raises ConfigError, DataError or ModelError, naming the task that would fit, where this one does not.
    """
    if ":" in cfg.name:
        made = own.task(cfg, reads=_reads(cfg, outputs))
        return _tried(made, outputs, target, rows)
    name = _auto(cfg, data, outputs, target, spec, rows, image=image) if cfg.name == "auto" else cfg.name
    if name in UNLABELLED:
        return distil.task(name, _floats(cfg, outputs))
    if not data.labelled and name not in classification.NAMES:
        raise ConfigError(
            f"{data.name} has no labels, which {name} needs.",
            "Give labels, or take the dense model as the teacher: --set task.name=distil",
        )
    if name in classification.NAMES:
        main = _logits(cfg, data, outputs, rows, spec)
        return replace(TASKS[name](name, main), name=name)
    main = _judged(cfg, name, outputs, target, spec)
    return _tried(TASKS[name](name, main), outputs, target, rows)


def _auto(cfg: TaskSection, data: Data, outputs: Outputs, target: Target, spec: str, rows: int, *, image: bool) -> str:
    if not data.labelled:
        logits = any(value.dim() == 2 and value.shape[1] > 1 for value in outputs.values())
        return "classification" if image and logits and not data.made_up else "distil"
    if data.classes is not None:
        return "classification"
    found = _fitting(outputs, target)
    if "multilabel" in found:  # two samples of numbers, or of counts, may be 0 and 1 by chance
        many = next(data.some("train", LOOKED_AT).batches("train", LOOKED_AT))[1]
        flags = isinstance(many, Tensor) and bool(((many == 0) | (many == 1)).all())
        found = [name for name in found if name != ("regression" if flags else "multilabel")]
    if len(found) == 1 and found[0] in _SHOWN:
        return found[0]
    if found:
        raise DataError(
            f"{data.name} has targets like {_shown(target)}, and {spec} gives {_given(outputs)}: that may be "
            f"{' or '.join(found)}.",
            f"Name the task: --set task.name={found[0]}",
        )
    if isinstance(target, Tensor) and target.is_floating_point():
        raise DataError(
            f"{data.name} has {target.numel() // rows} numbers per sample as targets; {spec} gives {_given(outputs)}.",
            "Use a model that gives as many numbers as a target has, or name the task: --set task.name=NAME",
        )
    raise DataError(
        f"No task is known for targets like {_shown(target)} and outputs like {_given(outputs)}.",
        f"Name one: --set task.name=NAME, of {', '.join(names())}, or a file.py:callable of your own (docs/tasks.md).",
    )


FITS: dict[str, Callable[[Tensor, Target], bool]] = {
    "multilabel": multilabel.fits,
    "segmentation": segmentation.fits,
    "token-classification": tokens.fits,
    "ctc": ctc.fits,
    "regression": regression.fits,
}
"""Task -> whether an output can be what it judges for a batch's targets, as far as shapes and values tell."""
_SHOWN = ("multilabel", "segmentation", "token-classification", "regression")
"""Tasks that need no name where no other fits. What looks like symbols of ctc may be something else: it is named."""
LOOKED_AT = 64
"""Samples whose targets are looked at where two do not tell."""


def _fitting(outputs: Outputs, target: Target) -> list[str]:
    """Every task that some output fits."""
    return [name for name, fits in FITS.items() if any(fits(value, target) for value in outputs.values())]


def _given(outputs: Outputs) -> str:
    return ", ".join(f"{name} {_shape(value)}" for name, value in outputs.items())


def _shown(target: Target) -> str:
    return " and ".join(sorted({_shape(one) for one in leaves_of(target)}))


def _shape(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{'x'.join(map(str, value.shape))} {str(value.dtype).removeprefix('torch.')}"


def _named(main: str, outputs: Outputs, spec: str) -> None:
    if main not in outputs:
        raise ConfigError(
            f"task.output: {spec} has no output {main!r}; it has {', '.join(outputs)}.",
            nearest(main, outputs) or "Name one of them.",
        )


_USUAL = (ONLY, "out", "logits")
"""Names of the output that counts where several fit: torchvision's segmentation nets give "out" and "aux"."""


def _judged(cfg: TaskSection, name: str, outputs: Outputs, target: Target, spec: str) -> str:
    """The output that the task judges: the one that is named, or the only one that fits the targets."""
    if cfg.output is not None:
        _named(cfg.output, outputs, spec)
        return cfg.output
    if len(outputs) == 1:
        return next(iter(outputs))
    fit = [key for key, value in outputs.items() if FITS[name](value, target)]
    usual = [key for key in _USUAL if key in fit]
    if usual or len(fit) == 1:
        return (usual or fit)[0]
    raise ModelError(
        f"{spec} has the outputs {', '.join(outputs)}; which of them is to be judged?",
        f"Say so: --set task.output={(fit or list(outputs))[0]}",
    )


def _reads(cfg: TaskSection, outputs: Outputs) -> tuple[str, ...]:
    return (cfg.output,) if cfg.output is not None else tuple(outputs)


def _floats(cfg: TaskSection, outputs: Outputs) -> tuple[str, ...]:
    if cfg.output is not None:
        _named(cfg.output, outputs, "the model")
        return (cfg.output,)
    found = tuple(name for name, value in outputs.items() if value.is_floating_point())
    if not found:
        raise ModelError(
            "The model gives no output in a float type, which nothing can be held against.", "Return floats."
        )
    return found


def _logits(cfg: TaskSection, data: Data, outputs: Outputs, rows: int, spec: str) -> str:
    """The output that is logits. Raises ModelError where none can be, ConfigError where several can."""
    if data.labelled and data.classes is None:
        raise DataError(
            f"{data.name} has targets that are no class numbers.",
            "Return whole numbers from 0, or name another task: --set task.name=regression",
        )
    classes = data.classes or LEAST_CLASSES
    if cfg.output is not None:
        _named(cfg.output, outputs, spec)
        outputs = {cfg.output: outputs[cfg.output]}
    if len(outputs) == 1:
        ((name, value),) = outputs.items()
        judged = f"Use a model with {classes} outputs, or judge one as yes or no: --set task.name=multilabel"
        check_logits(value, rows, classes, spec, judged if classes == 2 and value.numel() == rows else "")
        return name
    fit = classification.suits(outputs, rows, classes)
    if "logits" in fit:
        return "logits"
    if len(fit) == 1:
        return fit[0]
    given = ", ".join(f"{name} {_shape(value)}" for name, value in outputs.items())
    if not fit:
        raise ModelError(
            f"{spec} gives {given}, none of which is logits of {classes} classes.",
            f"Use a model with {classes} outputs, or data whose labels fit it.",
        )
    raise ConfigError(
        f"{spec} gives {given}: {' and '.join(fit)} can be the logits of {classes} classes.",
        f"Say which: --set task.output={fit[-1]}",
    )


LEAST_CLASSES = 2
"""Outputs that a model has at least where the data has no labels: of one alone, the largest is always the same."""


def _tried(task: Task, outputs: Outputs, target: Target, rows: int) -> Task:
    """`task`, whose loss and scores take this batch. Raises DataError for whatever they raise."""
    what = "loss"
    try:
        with torch.no_grad():
            losses = task.losses(outputs, target, 0.0)
            if tuple(losses.shape) != (rows,):
                raise ValueError(f"it gives the shape {tuple(losses.shape)} for {rows} samples")
            for score in task.scores:
                what = f"score {score.name}"
                measured(score, outputs, target, rows)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # an own task is the user's code
        others = [name for name in _fitting(outputs, target) if name != task.name]
        hint = error.hint if isinstance(error, Explained) else ""
        if others:
            hint = f"These fit {' or '.join(others)}: --set task.name={others[0]}"
        raise DataError(
            f"The {what} of {task.name} cannot take outputs of {_shape(task.read(outputs))} with targets of "
            f"{_shown(target)}: {error.message if isinstance(error, Explained) else first_line(error)}",
            hint or "Name the task that fits the targets: --set task.name=NAME (docs/tasks.md), or mend the targets.",
        ) from error
    return task
