"""Train a shrunk program further.

Its graph says `training=False` at every norm and dropout; the flags are set in the graph itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from pipeline.channels.operators.table import bind, find
from pipeline.channels.removal.rewrite import Shrunk


class Trainable(nn.Module):
    """A shrunk program as a module with parameters; `train()` and `eval()` set the flags inside its graph.

    Weight standardisation, which is a batch_norm without running statistics, stays as it is.
    """

    def __init__(self, shrunk: Shrunk) -> None:
        super().__init__()
        graph_module = shrunk.program.module(check_guards=False)
        assert isinstance(graph_module, fx.GraphModule)
        self.body = graph_module
        self.names = tuple(shrunk.program.state_dict)
        for parameter in self.body.parameters():
            parameter.requires_grad_(parameter.dtype.is_floating_point)
        self.train(False)

    def forward(self, *inputs: Any) -> Any:
        """The program's outputs."""
        return self.body(*inputs)

    def train(self, mode: bool = True) -> Trainable:
        """Set the flags of every norm with running statistics and every dropout."""
        self.training = mode
        if hasattr(self, "body"):
            for node in self.body.graph.nodes:
                if node.op == "call_function":
                    _set_flag(node, mode)
            self.body.recompile()
        return self

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers by their names in the program."""
        held = dict(self.body.state_dict())
        return {name: held[name].detach() for name in self.names if name in held}


def _set_flag(node: fx.Node, mode: bool) -> None:
    card = find(node.target)
    if card is None or card.training is None:
        return
    arguments = bind(node)
    if card.kind == "norm" and arguments["running_mean"] is None:
        return
    at = list(arguments).index(card.training)
    if at < len(node.args):
        node.update_arg(at, mode)
    else:
        node.update_kwarg(card.training, mode)


def with_weights(shrunk: Shrunk, weights: dict[str, Tensor]) -> Shrunk:
    """The same program over other values of the same shapes, after a recovery."""
    program = shrunk.program
    parameters = set(program.graph_signature.parameters)
    state = {
        n: torch.nn.Parameter(weights[n], weights[n].dtype.is_floating_point) if n in parameters else weights[n]
        for n in program.state_dict
        if n in weights
    }
    state = {**program.state_dict, **state}
    return replace(shrunk, program=program._update(program.graph_module, program.graph_signature, state_dict=state))
