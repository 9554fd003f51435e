"""A label for every token of a text, or every step of a series."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foundation.errors import ModelError
from pipeline.data.parts import Target
from pipeline.models.calling import Outputs
from pipeline.tasks.per_class import counted, macro_f1, right_places
from pipeline.tasks.places import cross_entropy, in_range, is_whole, spread, whole
from pipeline.tasks.task import Task, softened
from validators.scores import Score, ratio


def task(name: str, main: str) -> Task:
    """Labels of tokens by the logits (samples, tokens, labels) in the output `main`: cross-entropy; share of tokens
    that are right, F1 (mean over labels that occur).

    Targets are (samples, tokens), -100 where a token counts for nothing.
    """

    def pair(outputs: Outputs, target: Target) -> tuple[Tensor, Tensor]:
        labels, logits = whole(target, "The token labels"), outputs[main].float()
        if logits.dim() != 3 or logits.shape[:2] != labels.shape:
            raise ModelError(
                f"The model gives {main} of shape {tuple(logits.shape)}, the targets are {tuple(labels.shape)}.",
                "Token labels are (samples, tokens), logits (samples, tokens, labels).",
            )
        return logits.transpose(1, 2), in_range(labels, logits.shape[2], "The token labels")

    def losses(outputs: Outputs, target: Target, smoothing: float) -> Tensor:
        return cross_entropy(*pair(outputs, target), smoothing)

    def divergence(student: Outputs, teacher: Outputs, temperature: float) -> Tensor:
        return softened(student[main].transpose(1, 2), teacher[main].transpose(1, 2), temperature)

    def right(outputs: Outputs, target: Target) -> Tensor:
        logits, labels = pair(outputs, target)
        return right_places(logits.argmax(1), labels)

    def by_label(outputs: Outputs, target: Target) -> Tensor:
        logits, labels = pair(outputs, target)
        return counted(logits.argmax(1), labels, logits.shape[1])

    scores = (Score("token accuracy", right, ratio), Score("macro F1", by_label, macro_f1))
    return Task(name, scores, losses, divergence, (main,))


def fits(value: Tensor, target: Any) -> bool:
    """Whether `value` can be logits for the token labels `target`."""
    return (
        is_whole(target)
        and target.dim() == 2
        and value.is_floating_point()
        and value.dim() == 3
        and value.shape[:2] == target.shape
        and value.shape[2] > 1
        and spread(value.transpose(1, 2), target)
    )
