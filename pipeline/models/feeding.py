"""What a source's models are compared on: made-up inputs at every size that they take, and real ones by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.models.source import ModelSource
from validators.feeds import Feed, edge_feeds, random_feeds
from validators.runners import InputSpec, Runner

OTHER_SIZE = 2
"""Samples in a feed at another than the usual size of a free dimension."""


def made_feeds(
    inputs: Sequence[InputSpec], source: ModelSource, *, seed: int, batches: Sequence[int], edges: Sequence[int] = ()
) -> list[Feed]:
    """Random feeds at `batches`, then one at each other size of a free dimension, then edges at the batches `edges`."""
    usual, ranges = source.usual, source.ranges
    feeds = random_feeds(inputs, seed=seed, batches=batches, sizes=usual, ranges=ranges)
    for name, sizes in source.sizes:
        for size in sizes[1:]:
            at = {**usual, name: size}
            made = random_feeds(inputs, seed=seed + size, batches=(OTHER_SIZE,), sizes=at, ranges=ranges)
            feeds += [replace(one, label=f"{one.label}, {name} {size}") for one in made]
    if edges:
        feeds += edge_feeds(inputs, seed=seed, batches=edges, sizes=usual, ranges=ranges)
    return feeds


def answers_of(runner: Runner) -> Callable[..., dict[str, Tensor]]:
    """A runner as a function of a batch's inputs, in its own order: its outputs by name."""
    names = [spec.name for spec in runner.inputs]

    def answer(*inputs: Tensor) -> dict[str, Tensor]:
        feed = {name: one.numpy() for name, one in zip(names, inputs, strict=True)}
        return {name: torch.from_numpy(value) for name, value in runner.infer(feed).items()}

    return answer
