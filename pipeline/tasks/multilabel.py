"""Any number of labels per sample, each there or not."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foundation.errors import DataError, ModelError
from pipeline.data.parts import Target
from pipeline.models.calling import Outputs
from pipeline.tasks.per_class import macro_f1, micro_f1
from pipeline.tasks.task import Task, same_shape
from validators.scores import Score, per_sample


def task(name: str, main: str) -> Task:
    """Labels by the logits (samples, labels) in the output `main`: binary cross-entropy; F1, exact match.

    A label is there where its logit is above 0. Targets are 0 and 1, (samples, labels).
    """

    def pair(outputs: Outputs, target: Target) -> tuple[Tensor, Tensor]:
        logits = outputs[main].float()
        if not isinstance(target, Tensor) or logits.numel() != target.numel():
            shown = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
            raise ModelError(
                f"The model gives {main} of shape {tuple(logits.shape)}, the targets are {shown}.",
                "Let the model give one logit for each label.",
            )
        wrong = (target != 0) & (target != 1)
        if bool(wrong.any()):
            raise DataError(
                f"The targets hold {target[wrong][0]:.4g}.", "Give 1 for a label that is there, 0 for others."
            )
        rows = len(target)
        return logits.reshape(rows, -1), target.float().reshape(rows, -1)

    def losses(outputs: Outputs, target: Target, smoothing: float) -> Tensor:
        logits, wanted = pair(outputs, target)
        soft = wanted * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, soft, reduction="none").mean(1)

    def divergence(student: Outputs, teacher: Outputs, temperature: float) -> Tensor:
        return bernoulli(student[main], teacher[main], temperature)

    def by_label(outputs: Outputs, target: Target) -> Tensor:
        logits, wanted = pair(outputs, target)
        found, there = logits > 0, wanted > 0
        return torch.cat([found & there, found & ~there, ~found & there], 1).double()

    def exact(outputs: Outputs, target: Target) -> Tensor:
        logits, wanted = pair(outputs, target)
        same: Tensor = ((logits > 0) == (wanted > 0)).all(1)
        return same

    scores = (
        Score("macro F1", by_label, macro_f1),
        Score("micro F1", by_label, micro_f1),
        per_sample("exact match", exact),
    )
    return Task(name, scores, losses, divergence, (main,), batch=256)


def bernoulli(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL divergence of softened yes-or-no probabilities by their logits, (samples, labels), per sample and mean over
    labels, times T² so that its gradient does not shrink with T (Hinton 2015, §2).
    """
    same_shape(student, teacher)
    given, wanted = (one.float().reshape(len(one), -1) / temperature for one in (student, teacher))
    each = sum(
        F.logsigmoid(sign * wanted).exp() * (F.logsigmoid(sign * wanted) - F.logsigmoid(sign * given))
        for sign in (1.0, -1.0)
    )
    assert isinstance(each, Tensor)
    return each.mean(1) * temperature**2


def fits(value: Tensor, target: Any) -> bool:
    """Whether `value` can be logits for `target`: as many, and nothing but 0 and 1, of two labels at least."""
    return (
        isinstance(target, Tensor)
        and target.dim() == 2
        and target.shape[1] > 1
        and value.is_floating_point()
        and value.shape == target.shape
        and bool(((target == 0) | (target == 1)).all())
    )
