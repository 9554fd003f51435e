"""Images with one class each: what counts as the answer, the loss, how far a student is from its teacher, the score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foundation.errors import ModelError
from pipeline.data.parts import PARTS, Data, Part


@dataclass(frozen=True)
class Evaluation:
    """How a model did on one part."""

    accuracy: float
    """Share in 0..1."""
    loss: float
    """Mean cross-entropy, natural logarithm."""
    predictions: Tensor
    """Class per sample, int64, in the order of the part."""
    labels: Tensor


def evaluate(
    model: nn.Module | Callable[[Tensor], object], data: Data, part: Part = "test", batch_size: int = 256
) -> Evaluation:
    """Run a module (in eval mode), or anything else callable on a batch, over one part.

    The first output counts as logits, (batch, at least data.classes), as a tensor or array.
    """
    plain = isinstance(model, nn.Module) and not isinstance(model, torch.fx.GraphModule)  # exported ones know no modes
    was_training = plain and model.training  # type: ignore[union-attr]
    if plain:
        model.eval()  # type: ignore[union-attr]
    predicted, lost = [], 0.0
    with torch.no_grad():
        for images, labels in data.batches(part, batch_size):
            logits = logits_of(model(images))
            lost += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
            predicted.append(logits.argmax(1))
    if plain:
        model.train(was_training)  # type: ignore[union-attr]
    predictions, labels = torch.cat(predicted), data.split(part).labels
    return Evaluation(float((predictions == labels).float().mean()), lost / len(labels), predictions, labels)


def answers(model: nn.Module, data: Data) -> tuple[dict[str, Tensor], int]:
    """What `model`, in eval mode, answers to every sample: part -> class number, int64; and how many outputs it has.

    Raises ModelError where an output is not finite: it is no answer, and what is held against it would mean nothing.
    """
    found: dict[str, Tensor] = {}
    outputs = 0
    with torch.no_grad():
        for part in PARTS:
            numbers = []
            for images, _ in data.batches(part):
                logits = logits_of(model(images))
                if not bool(logits.isfinite().all()):
                    raise ModelError(
                        f"The dense model gives NaN or infinity on samples of the {part} part of {data.name}.",
                        "Check its weights, and that its inputs are scaled as it expects.",
                    )
                outputs = logits.shape[1]
                numbers.append(logits.argmax(1))
            found[part] = torch.cat(numbers)
    return found, outputs


def loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of logits (batch, classes) against class numbers (batch,), natural logarithm."""
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL divergence of the softened outputs, times T² so that its gradient does not shrink with T (Hinton 2015, §2)."""
    if student.shape != teacher.shape:
        raise ModelError(
            f"The teacher gives outputs of shape {tuple(teacher.shape)}, the model {tuple(student.shape)}.",
            "Distil from a model with the same outputs, or set distill_weight to 0.",
        )
    soft = F.kl_div(
        F.log_softmax(student / temperature, 1),
        F.log_softmax(teacher / temperature, 1),
        log_target=True,
        reduction="batchmean",
    )
    return soft * temperature**2


def logits_of(out: object) -> Tensor:
    """The first tensor or array of whatever a model returned."""
    while isinstance(out, Mapping | Sequence):
        out = next(iter(out.values())) if isinstance(out, Mapping) else out[0]
    if isinstance(out, np.ndarray):
        return torch.from_numpy(out)
    if not isinstance(out, Tensor):
        raise ModelError(f"The model returned {type(out).__name__}, not a tensor.", "Return logits (batch, classes).")
    return out
