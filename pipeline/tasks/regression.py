"""Numbers to predict: one or several per sample, a series ahead."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from foundation.errors import ModelError
from pipeline.data.parts import Target
from pipeline.models.calling import Outputs
from pipeline.tasks.task import Task, apart
from validators.runners import Array
from validators.scores import Score


def task(name: str, main: str) -> Task:
    """Numbers in the output `main`, of the target's shape: squared error; R² (averaged over the numbers), RMSE."""

    def pair(outputs: Outputs, target: Target) -> tuple[Tensor, Tensor]:
        found, wanted = outputs[main].float(), target.float()
        if found.numel() != wanted.numel():
            raise ModelError(
                f"The model gives {main} of shape {tuple(found.shape)}, the targets are {tuple(wanted.shape)}.",
                "Let the model give as many numbers as a target has.",
            )
        return found.reshape(len(wanted), -1), wanted.reshape(len(wanted), -1)

    def losses(outputs: Outputs, target: Target, smoothing: float) -> Tensor:
        found, wanted = pair(outputs, target)
        return (found - wanted).square().mean(1)

    def divergence(student: Outputs, teacher: Outputs, temperature: float) -> Tensor:
        return apart({main: student[main]}, {main: teacher[main]}, temperature)

    def explained(outputs: Outputs, target: Target) -> Tensor:
        found, wanted = (one.double() for one in pair(outputs, target))
        return torch.cat([(found - wanted).square(), wanted, wanted.square(), torch.ones(len(wanted), 1).double()], 1)

    def squared(outputs: Outputs, target: Target) -> Tensor:
        found, wanted = (one.double() for one in pair(outputs, target))
        return torch.stack([(found - wanted).square().mean(1), torch.ones(len(wanted)).double()], 1)

    scores = (
        Score("R2", explained, determination, floor=0.0),
        Score("RMSE", squared, lambda sums: np.sqrt(sums[..., 0] / sums[..., 1]), share=False, higher_is_better=False),
    )
    return Task(name, scores, losses, divergence, (main,), batch=256, numbers=pair)


def fits(value: Tensor, target: Target) -> bool:
    """Whether `value` can be predictions of `target`: as many numbers, floats or one whole number per sample."""
    return (
        isinstance(target, Tensor)
        and (target.is_floating_point() or target.dim() == 1)
        and value.is_floating_point()
        and value.numel() == target.numel()
    )


def determination(sums: Array) -> Array:
    """R² from sums of squared errors, values and squared values per number, and the count; the mean over the numbers.

    One minus the errors' share of the variance, as torchmetrics' R2Score with uniform average; a number that never
    varies is left out, and 0 is what is left where none does.
    """
    width = (sums.shape[-1] - 1) // 3
    errors, values, squares = (sums[..., k * width : (k + 1) * width] for k in range(3))
    spread = squares - values**2 / sums[..., -1:]
    varied = spread > 1e-12 * np.maximum(squares, 1e-30)
    each = np.where(varied, 1 - errors / np.where(varied, spread, 1.0), 0.0)
    found: Array = each.sum(-1) / np.maximum(varied.sum(-1), 1)
    return found
