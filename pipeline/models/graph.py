"""A source's module as a graph, with the dimensions free that the data says are."""

from __future__ import annotations

from torch import nn

from pipeline.channels.program.capture import Captured, capture
from pipeline.models.source import ModelSource, example


def graph_of(model: nn.Module, source: ModelSource) -> Captured:
    """`model`, built from `source`, captured. Raises CaptureError where torch.export cannot follow it."""
    return capture(model, example(source), free=tuple(tuple(one) for one in source.free))
