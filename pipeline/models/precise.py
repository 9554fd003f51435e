"""A captured program in float64, against which the stages measure what float32 rounding costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from pipeline.channels.program.capture import Captured
from pipeline.channels.program.execute import run_program
from validators.runners import Runner

UNIT_ROUNDOFF = 2.0**-24  # of IEEE float32: half the distance between 1 and the next number
# The float64 run itself, and three that are shaken.
SEEDS = (None, 1, 2, 3)


class Precise:
    """A captured model in float64: what float32 rounding costs on a feed is measured against it.

    With a `seed`, every parameter and every intermediate is shaken by one float32 rounding on top.
    """

    def __init__(self, captured: Captured, like: Runner, outputs: Sequence[str], seed: int | None = None) -> None:
        self.name = "float64" if seed is None else f"float64, shaken {seed}"
        self.inputs, self.threads = like.inputs, like.threads
        self._captured, self._outputs, self._seed = captured, outputs, seed

    def infer(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        """Run once, every float32 of the graph in float64."""
        draw = torch.Generator().manual_seed(self._seed or 0)
        given = set(self._captured.program.graph_signature.user_inputs)

        def shake(node: torch.fx.Node, value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.dtype != torch.float64 or node.name in given:
                return value
            return value * (1 + UNIT_ROUNDOFF * (2 * torch.rand(value.shape, generator=draw) - 1))

        found = run_program(
            self._captured.program,
            [torch.tensor(feed[spec.name]) for spec in self.inputs],
            self._captured.state,
            torch.float64,
            change=None if self._seed is None else shake,
        )
        tensors = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        return {name: tensor.numpy(force=True) for name, tensor in zip(self._outputs, tensors, strict=True)}
