"""What a model is for, as a value: what its outputs are held against, and by how much they miss it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foundation.errors import ModelError
from pipeline.data.parts import Target
from pipeline.data.samples import sliced
from pipeline.models.calling import Outputs
from validators.scores import Score

if TYPE_CHECKING:
    from pipeline.tasks.pictures import Drawn

Losses = Callable[[Outputs, Target, float], Tensor]
"""(outputs, target, label smoothing) -> loss per sample, (samples,)."""
Divergence = Callable[[Outputs, Outputs, float], Tensor]
"""(student's outputs, teacher's, temperature) -> how far each sample is from the teacher's, (samples,)."""


@dataclass(frozen=True)
class Task:
    """A task: its loss, its scores, and how far a model is from its teacher.

    `scores`: the first picks the best epoch, guards reduced precision and is gated; the others are told beside it.
    `reads`: the outputs that it looks at, by name. `classes`: targets are class numbers, and the first output it reads
    is logits (samples, classes), so that single answers can be compared. `taught`: targets are the dense model's
    outputs, of data without labels. `batch`: samples that are evaluated at once. `drawn`: a picture of a sample that
    got worse, for the report, where `panels` says what is in it; None: there is none. `code`: whatever decides the
    result besides the name, such as the digest of the user's own file. `numbers(outputs, target)`: what was
    predicted and what is true, of one shape, where a report can show one over the other.
    """

    name: str
    scores: tuple[Score, ...]
    losses: Losses
    divergence: Divergence
    reads: tuple[str, ...]
    classes: bool = False
    taught: bool = False
    batch: int = 32
    drawn: Drawn | None = None
    panels: str = ""
    numbers: Callable[[Outputs, Target], tuple[Tensor, Tensor]] | None = None
    code: str = ""

    @property
    def score(self) -> Score:
        """The score that decides."""
        return self.scores[0]

    @property
    def fingerprint(self) -> str:
        """What a stage's result depends on."""
        return repr((self.name, [score.name for score in self.scores], self.reads, self.code))

    def read(self, outputs: Outputs) -> Tensor:
        """The output that it looks at first."""
        return outputs[self.reads[0]]


def only(outputs: Outputs, reads: tuple[str, ...]) -> dict[str, Tensor]:
    """Some of the outputs."""
    return {name: outputs[name] for name in reads}


def by_sample(loss: Callable[[Outputs, Target], Tensor]) -> Losses:
    """Losses per sample of a `loss` that gives one number for a batch: it is asked about each sample alone."""

    def losses(outputs: Outputs, target: Target, smoothing: float) -> Tensor:
        rows = len(next(iter(outputs.values())))
        each = [
            loss({name: value[row : row + 1] for name, value in outputs.items()}, sliced(target, slice(row, row + 1)))
            for row in range(rows)
        ]
        return torch.stack([one.reshape(()) for one in each])

    return losses


def apart(student: Outputs, teacher: Outputs, temperature: float) -> Tensor:
    """Squared error of every output over the teacher's mean square of it, mean over outputs: 0 equal, 1 as far as zero.

    Outputs that are no floats are left out. A teacher of zeros counts as one of ones.
    """
    found = []
    for name, wanted in teacher.items():
        if not wanted.is_floating_point():
            continue
        given = _alike(student, name, wanted)
        wide = _rows(wanted)
        scale = wide.square().mean()
        error = _rows(given) - wide
        found.append(error.square().mean(1) / (scale if float(scale) > 0 else torch.ones_like(scale)))
    if not found:
        raise ModelError(
            "The model gives no output in a float type, which nothing can be trained towards.", "Return floats."
        )
    return torch.stack(found).mean(0)


def _rows(output: Tensor) -> Tensor:
    """One row of numbers per sample."""
    return output.flatten(1) if output.dim() > 1 else output[:, None]


def same_shape(student: Tensor, teacher: Tensor) -> None:
    """Raise ModelError where a teacher's output is of another shape than the model's."""
    if student.shape != teacher.shape:
        raise ModelError(
            f"The teacher gives outputs of shape {tuple(teacher.shape)}, the model {tuple(student.shape)}.",
            "Distil from a model with the same outputs, or set distill_weight to 0.",
        )


def softened(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL divergence of softened class scores (samples, classes, ...), per sample and mean over places, times T² so that
    its gradient does not shrink with T (Hinton 2015, §2).
    """
    same_shape(student, teacher)
    logs, wanted = (torch.log_softmax(one.float() / temperature, 1) for one in (student, teacher))
    each = (wanted.exp() * (wanted - logs)).sum(1)
    return (each.flatten(1).mean(1) if each.dim() > 1 else each) * temperature**2


def _alike(outputs: Mapping[str, Tensor], name: str, wanted: Tensor) -> Tensor:
    given = outputs.get(name)
    if given is None or given.shape != wanted.shape:
        raise ModelError(
            f"The teacher gives {name} of shape {tuple(wanted.shape)}, the model "
            f"{None if given is None else tuple(given.shape)}.",
            "Distil from a model with the same outputs, or set distill_weight to 0.",
        )
    return given


def cosines(outputs: Outputs, target: Any, reads: tuple[str, ...] | None = None) -> Tensor:
    """Mean cosine, per sample, of float outputs with those of `target` under the same names; of zeros with zeros 1."""
    found = []
    for name, wanted in target.items():
        if reads is not None and name not in reads:
            continue
        if not wanted.is_floating_point():
            continue
        left, right = (
            one.double().flatten(1) if one.dim() > 1 else one.double()[:, None] for one in (outputs[name], wanted)
        )
        scale = left.norm(dim=1) * right.norm(dim=1)
        same = (left == right).all(1)
        found.append(torch.where(same, 1.0, (left * right).sum(1) / scale.clamp_min(1e-30)))
    return torch.stack(found).mean(0)
