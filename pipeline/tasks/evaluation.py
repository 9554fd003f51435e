"""How a model does on a part of the data: its score, its loss, and both sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.parts import Data, Part
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
    modal = isinstance(model, nn.Module) and not isinstance(model, torch.fx.GraphModule)  # exported ones know no modes
    was_training = modal and model.training  # type: ignore[union-attr]
    if modal:
        model.eval()  # type: ignore[union-attr]
    statistics, losses = [], []
    with torch.no_grad():
        for inputs, target in data.batches(part, batch_size or task.batch):
            outputs = named(model(*inputs))
            losses.append(task.losses(outputs, target, 0.0).double())
            statistics.append(measured(task.score, outputs, target, len(inputs[0])))
    if modal:
        model.train(was_training)  # type: ignore[union-attr]
    every, each = np.concatenate(statistics), torch.cat(losses)
    return Evaluation(task.score.of(every), float(each.mean()), every, each)
