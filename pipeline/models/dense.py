"""The dense model as a function from inputs to outputs by name, for data that has no other targets."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from pipeline.artifacts.eager import Baseline
from pipeline.models.calling import named
from pipeline.models.source import ModelSource

Answering = Callable[..., dict[str, Tensor]]


def answering(model: Callable[[], nn.Module]) -> Answering:
    """What the module that `model` gives answers to a batch, in eval mode and without gradients."""

    def answer(*inputs: Tensor) -> dict[str, Tensor]:
        module = model()
        was_training = module.training
        module.eval()
        with torch.no_grad():
            found = named(module(*inputs))
        module.train(was_training)
        return found

    return answer


def dense(source: ModelSource, baseline: Baseline) -> Answering:
    """The dense model, built when it is first asked."""

    @cache
    def model() -> nn.Module:
        made = source.build()
        made.load_state_dict(baseline.weights())
        return made.eval()

    return answering(model)
