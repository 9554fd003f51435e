"""One class per sample, whatever goes in: images, texts, sounds, tables."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foundation.errors import ModelError
from pipeline.data.parts import PARTS, Data, Target
from pipeline.models.calling import Outputs, named
from pipeline.tasks.task import Task, softened
from validators.scores import Score, per_sample

NAMES = ("classification", "text-classification")


def task(name: str, main: str) -> Task:
    """Classes by the logits (samples, classes) in the output `main`: cross-entropy, accuracy."""

    def losses(outputs: Outputs, target: Target, smoothing: float) -> Tensor:
        return F.cross_entropy(outputs[main].float(), target, label_smoothing=smoothing, reduction="none")

    def divergence(student: Outputs, teacher: Outputs, temperature: float) -> Tensor:
        return softened(student[main], teacher[main], temperature)

    return Task(name, (accuracy(main),), losses, divergence, (main,), classes=True, batch=256)


def accuracy(main: str) -> Score:
    """Share of samples whose largest logit is that of their class."""
    return per_sample("accuracy", lambda outputs, target: outputs[main].argmax(1) == target)


def suits(outputs: Mapping[str, Tensor], rows: int, classes: int) -> list[str]:
    """The outputs that can be logits of `classes` classes for `rows` samples, those of just that width first."""
    fit = [
        name for name, value in outputs.items() if value.dim() == 2 and len(value) == rows and value.shape[1] >= classes
    ]
    exact = [name for name in fit if outputs[name].shape[1] == classes]
    return exact or fit


def answers(task: Task, model: nn.Module, data: Data) -> tuple[dict[str, Tensor], int]:
    """What `model`, in eval mode, answers to every sample: part -> class number, int64; and how many outputs it has.

    Raises ModelError where an output is not finite: it is no answer, and what is held against it would mean nothing.
    """
    found: dict[str, Tensor] = {}
    outputs = 0
    with torch.no_grad():
        for part in PARTS:
            numbers = []
            for inputs, _ in data.batches(part, task.batch):
                logits = task.read(named(model(*inputs)))
                if not bool(logits.isfinite().all()):
                    raise ModelError(
                        f"The dense model gives NaN or infinity on samples of the {part} part of {data.name}.",
                        "Check its weights, and that its inputs are scaled as it expects.",
                    )
                outputs = logits.shape[1]
                numbers.append(logits.argmax(1))
            found[part] = torch.cat(numbers)
    return found, outputs
