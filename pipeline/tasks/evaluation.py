"""How a model does on a part of the data: its score, its loss, and both sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.parts import Batch, Data, Part
from pipeline.models.calling import named
from pipeline.tasks.task import Task
from validators.runners import Array
from validators.scores import measured


@dataclass(frozen=True)
class Evaluation:
    """How a model did on one part. `statistics` (samples, k) of the task's first score, `losses` (samples,)."""

    score: float
    loss: float
    statistics: Array
    losses: Tensor


def evaluate(
    task: Task, model: nn.Module | Callable[..., object], data: Data, part: Part = "test", batch_size: int | None = None
) -> Evaluation:
    """Run a module (in eval mode), or anything else callable on a batch's inputs, over one part.

    Raises ValidationError where the score gives no finite numbers per sample.
    """
    return judged(task, seen_by(task, model, data.batches(part, batch_size or task.batch)))


Seen = tuple[Array, Tensor]
"""Of one batch: statistics (samples, k) and losses (samples,)."""


def seen_by(task: Task, model: nn.Module | Callable[..., object], batches: Iterable[Batch]) -> list[Seen]:
    """What a module (in eval mode), or anything else callable on a batch's inputs, makes of each batch."""
    modal = isinstance(model, nn.Module) and not isinstance(model, torch.fx.GraphModule)  # exported ones know no modes
    was_training = modal and model.training  # type: ignore[union-attr]
    if modal:
        model.eval()  # type: ignore[union-attr]
    found: list[Seen] = []
    with torch.no_grad():
        for inputs, target in batches:
            outputs = named(model(*inputs))
            losses = task.losses(outputs, target, 0.0).double()
            found.append((measured(task.score, outputs, target, len(inputs[0])), losses))
    if modal:
        model.train(was_training)  # type: ignore[union-attr]
    return found


def judged(task: Task, seen: Sequence[Seen]) -> Evaluation:
    """The evaluation of these batches."""
    every, each = np.concatenate([one for one, _ in seen]), torch.cat([losses for _, losses in seen])
    return Evaluation(task.score.of(every), float(each.mean()), every, each)
