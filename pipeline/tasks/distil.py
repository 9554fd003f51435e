"""Data without labels: the dense model's own outputs are what a smaller one should give."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.data.parts import Target
from pipeline.models.calling import Outputs
from pipeline.tasks.task import Task, apart, cosines, only
from validators.scores import Score, per_sample


def task(name: str, reads: tuple[str, ...]) -> Task:
    """Be like the dense model in the outputs `reads`: squared error over its mean square, cosine per sample."""

    def losses(outputs: Outputs, target: Target, smoothing: float) -> Tensor:
        return apart(only(outputs, reads), only(target, reads), 1.0)

    def divergence(student: Outputs, teacher: Outputs, temperature: float) -> Tensor:
        return apart(only(student, reads), only(teacher, reads), temperature)

    scores: tuple[Score, ...] = (per_sample("cosine", lambda outputs, target: cosines(outputs, target, reads)),)
    if name == "embedding":
        scores = (
            *scores,
            per_sample("retrieval", lambda outputs, target: retrieved(outputs[reads[0]], target[reads[0]])),
        )
    return Task(name, scores, losses, divergence, reads, taught=True)


def retrieved(found: Tensor, wanted: Tensor) -> Tensor:
    """Per sample: whether its nearest neighbour by cosine, among the others of the batch, is the one that the dense
    model has, 1 or 0; a batch of one sample keeps its order.
    """
    if len(found) < 2:
        return torch.ones(len(found))
    nearest = [_nearest(one.double().flatten(1)) for one in (found, wanted)]
    same: Tensor = nearest[0] == nearest[1]
    return same.double()


def _nearest(rows: Tensor) -> Tensor:
    directions = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)
    alike = directions @ directions.T
    alike.fill_diagonal_(-torch.inf)
    found: Tensor = alike.argmax(1)
    return found
