"""Train a shrunk program further.

Its graph says `training=False` at every norm and dropout; the flags are set in the graph itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from pipeline.channels.operators.table import bind, find
from pipeline.channels.removal.rewrite import Shrunk


class Trainable(fx.GraphModule):
    """A shrunk program as a module whose parameters have their original names; `train()` and `eval()` set the flags
    inside its graph. It trains, deep-copies and is captured like any other module.

    Weight standardisation, which is a batch_norm without running statistics, stays as it is.
    """

    def __init__(self, program: ExportedProgram) -> None:
        module = program.module(check_guards=False)
        assert isinstance(module, fx.GraphModule)
        super().__init__(module, module.graph, class_name="Trainable")
        self.program = program
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.dtype.is_floating_point)
        self.train(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Trainable:
        made = super().__deepcopy__(memo)  # of a graph module's attributes it keeps what the graph names
        assert isinstance(made, Trainable)
        for name, value in vars(self).items():
            vars(made).setdefault(name, value)
        return made

    def train(self, mode: bool = True) -> Trainable:
        """Set the flags of every norm with running statistics and every dropout."""
        super().train(mode)
        for node in self.graph.nodes:
            if node.op == "call_function":
                _set_flag(node, mode)
        self.recompile()
        return self

    def exported(self) -> ExportedProgram:
        """The program with the weights as they are now."""
        return with_state(self.program, self.weights())

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers by their names in the program."""
        return {name: value.detach() for name, value in self.state_dict().items()}


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
    return replace(shrunk, program=with_state(shrunk.program, weights))


def with_state(program: ExportedProgram, weights: Mapping[str, Tensor]) -> ExportedProgram:
    """The same program over other values of the same shapes; those that are not named keep theirs."""
    parameters = set(program.graph_signature.parameters)
    state = {
        n: torch.nn.Parameter(weights[n], weights[n].dtype.is_floating_point) if n in parameters else weights[n]
        for n in program.state_dict
        if n in weights
    }
    state = {**program.state_dict, **state}
    return program._update(program.graph_module, program.graph_signature, state_dict=state)
