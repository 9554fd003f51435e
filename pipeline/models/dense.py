"""The dense model as a function from inputs to outputs by name, for data that has no other targets."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from pipeline.artifacts.eager import Baseline
from pipeline.models.calling import named
from pipeline.models.source import ModelSource


class Answering:
    """What the module that `model` gives answers to a batch, in eval mode and without gradients."""

    def __init__(self, model: Callable[[], nn.Module]) -> None:
        self.model = model

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """The outputs by name."""
        module = self.model()
        was_training = module.training
        module.eval()
        with torch.no_grad():
            found = named(module(*inputs))
        module.train(was_training)
        return found


def dense(source: ModelSource, baseline: Baseline) -> Answering:
    """The dense model, built when it is first asked."""

    @cache
    def model() -> nn.Module:
        made = source.build()
        made.load_state_dict(baseline.weights())
        return made.eval()

    return Answering(model)
