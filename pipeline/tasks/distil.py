"""Data without labels: the dense model's own outputs are what a smaller one should give."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.data.parts import PLACES, Target
from pipeline.models.calling import Outputs
from pipeline.tasks.task import Task, apart, cosines, only
from validators.scores import Score, per_sample


def task(name: str, reads: tuple[str, ...]) -> Task:
    """Be like the dense model in the outputs `reads`: squared error over its mean square, cosine per sample.

    Places that only fill a sample up to the length of its batch count for nothing. Where a mask says which do, the
    neighbours of `embedding` are those of the mean over the places that count.
    """

    def losses(outputs: Outputs, target: Target, smoothing: float) -> Tensor:
        return apart(counting(outputs, reads, target), counting(target, reads, target), 1.0)

    def divergence(student: Outputs, teacher: Outputs, temperature: float) -> Tensor:
        return apart(only(student, reads), only(teacher, reads), temperature)

    def alike(outputs: Outputs, target: Target) -> Tensor:
        return cosines(counting(outputs, reads, target), counting(target, reads, target))

    def found(outputs: Outputs, target: Target) -> Tensor:
        places = target.get(PLACES)
        return retrieved(*(pooled(one[reads[0]], places) for one in (outputs, target)))

    scores: tuple[Score, ...] = (per_sample("cosine", alike),)
    if name == "embedding":
        scores = (*scores, per_sample("retrieval", found))
    return Task(name, scores, losses, divergence, reads, taught=True)


def counting(outputs: Outputs, reads: tuple[str, ...], target: Target) -> dict[str, Tensor]:
    """The outputs `reads`, 0 at the places that do not count."""
    places = target.get(PLACES)
    return {
        name: _blank(value, places) if places is not None and has_places(value, places) else value
        for name, value in only(outputs, reads).items()
    }


def has_places(value: Tensor, places: Tensor) -> bool:
    """Whether an output has one entry for each place of each sample."""
    return value.dim() > 1 and value.shape[:2] == places.shape


def _blank(value: Tensor, places: Tensor) -> Tensor:
    return value.masked_fill(~places.reshape(*places.shape, *[1] * (value.dim() - 2)), 0)


def pooled(value: Tensor, places: Tensor | None) -> Tensor:
    """Of an output (samples, places, numbers), the mean over the places that count; any other as it is."""
    if places is None or value.dim() != 3 or not has_places(value, places):
        return value
    return _blank(value, places).sum(1) / places.sum(1, keepdim=True).clamp_min(1)


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
