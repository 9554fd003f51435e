"""What criteria look at besides the weights, gathered in forward and backward passes over the calibration part."""

from __future__ import annotations

from torch import Tensor, nn

from pipeline.data.parts import Data
from pipeline.selection.criteria import Evidence, Observation
from pipeline.tasks import classification
from pipeline.training import masks

BATCH = 64


def observe(model: nn.Module, data: Data, wanted: frozenset[Observation], samples: int = 64) -> Evidence:
    """The weights as the masked model sees them, and what else is `wanted`; `samples` of the calibration part.

    What is masked already counts zero, so that pruning in rounds only ever takes more.
    """
    held = masks.masks_of(model)
    state = masks.originals(model)
    weights = {name: value * held[name] if name in held else value for name, value in state.items()}
    return Evidence(
        weights,
        _gradients(model, data) if "gradients" in wanted else {},
        data.sample("calibration", samples) if "samples" in wanted else None,
    )


def _gradients(model: nn.Module, data: Data) -> dict[str, Tensor]:
    """Parameter -> gradient of the task's loss, mean over the calibration samples; dropout off, norms as in use."""
    parameters = masks.parameters(model)
    before = {name: value.grad for name, value in parameters.items()}
    was_training = model.training
    model.eval()
    try:
        for value in parameters.values():
            value.grad = None
        for images, labels in data.batches("calibration", BATCH):
            share = len(labels) / len(data.calibration)
            loss = classification.loss(classification.logits_of(model(images)), labels) * share
            loss.backward()  # type: ignore[no-untyped-call]
        return {name: value.grad for name, value in parameters.items() if value.grad is not None}
    finally:
        for name, value in parameters.items():
            value.grad = before[name]
        model.train(was_training)
