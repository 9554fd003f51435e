"""The weights of a program as the fits see them: names, masks, readers, and the values that were found so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from foundation.files import memory_of
from pipeline.channels.program.capture import Captured
from pipeline.recovery import tied
from pipeline.recovery.fitted import Fitted


class Weights:
    """Parameters, buffers and constants, by the names of their placeholders in the graph.

    `names`: placeholder -> name. `dense`: what it holds in the dense network. `start`: every parameter by name, as the
    pruned network has it before the fit. `masks`: bool, True = kept. `parameters`: which placeholders are parameters.
    `readers`: `key` -> how many operators read it. `shared`: `key` -> the readers of a weight of several, where the
    numbers of its matrices are, why it cannot be fitted to all of them (`tied.uses`). `together`: nodes whose weight is
    fitted over all its readers. `new`: what was fitted so far, by name.
    """

    def __init__(self, captured: Captured, masks: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> None:
        self.graph, self.names, self.start = captured.program.graph, captured.targets, start
        held: dict[str, Any] = {**captured.program.constants, **captured.program.state_dict, **captured.state}
        self.dense = {node: held[target] for node, target in self.names.items()}
        self.parameters = set(captured.program.graph_signature.inputs_to_parameters)
        # Tied tensors lie under several names, and a mask may be given under any of them.
        self.memory = {name: memory_of(name, value) for name, value in captured.state.items()}
        known = {self.memory[name]: torch.as_tensor(mask) for name, mask in masks.items() if name in self.memory}
        self.masks = {
            node: known[self.memory[target]] for node, target in self.names.items() if self.memory.get(target) in known
        }
        self.placeholders: dict[Any, list[fx.Node]] = {}
        for node in self.graph.nodes:
            if node.name in self.names:
                self.placeholders.setdefault(self.key(node), []).append(node)
        self.readers = {key: len(tied.readers(nodes)) for key, nodes in self.placeholders.items()}
        self.shared = {
            key: tied.uses(nodes, self.dense[nodes[0].name])
            for key, nodes in self.placeholders.items()
            if self.masks and self._is_matrix(nodes[0])
        }
        self.together = {use.node for uses, *_ in self.shared.values() for use in uses}
        self.new: dict[str, Tensor] = {}

    def _is_matrix(self, node: fx.Node) -> bool:
        """Whether it is a parameter of real numbers with outputs and columns."""
        if node.name not in self.parameters:
            return False
        weight = self.dense[node.name]
        return bool(weight.dim() > 1 and weight.is_floating_point())

    def key(self, node: fx.Node) -> Any:
        """The same for placeholders of tied tensors."""
        target = self.names[node.name]
        return self.memory.get(target, target)

    def kept(self, node: fx.Node) -> Tensor:
        """The mask of a weight, all True where it has none."""
        mask = self.masks.get(node.name)
        return torch.ones_like(self.dense[node.name], dtype=torch.bool) if mask is None else mask

    def masked(self, node: fx.Node, value: Tensor) -> Tensor:
        """A copy of a new value for a weight, zero where it is masked."""
        return torch.where(self.kept(node), value, torch.zeros_like(value))

    def is_own_shift(self, node: fx.Node, size: int) -> bool:
        """Whether it is a parameter of `size` numbers that one operator alone reads."""
        if node.name not in self.parameters:
            return False
        value = self.dense[node.name]
        return tuple(value.shape) == (size,) and value.is_floating_point() and self.readers[self.key(node)] == 1

    def not_free(self, held: fx.Node, reader: str) -> str:
        """Why what `held` gives is no parameter that could be fitted, beginning with `reader`; "" where it is one."""
        if held.name not in self.names:
            return f"{reader} is computed from others"
        return "" if held.name in self.parameters else f"{reader} is no parameter"

    def read_by_several(self, held: fx.Node) -> str:
        """The reason where several operators read a weight; "" where one does."""
        key = self.key(held)
        if self.readers[key] < 2:
            return ""
        return (self.shared[key][2] if key in self.shared else "") or f"{self.readers[key]} operators read it"

    def pruned(self) -> dict[str, Any]:
        """What the pruned network starts with, by placeholder; the very tensors of the dense one where they agree."""
        made: dict[str, Any] = {node: self.start.get(self.names[node], value) for node, value in self.dense.items()}
        for node, mask in self.masks.items():
            made[node] = torch.where(mask, made[node], torch.zeros((), dtype=made[node].dtype))
        return {node: self.dense[node] if same(value, self.dense[node]) else value for node, value in made.items()}

    def unread(self) -> list[Fitted]:
        """Weights with a mask that nothing reads: there is nothing to fit them to."""
        return [
            Fitted(self.names[node.name], reason="no operator reads it")
            for node in self.graph.nodes
            if node.name in self.masks and not bool(self.masks[node.name].all())
            if self.readers[self.key(node)] == 0 and self.dense[node.name].dim() > 1
        ]

    @torch.no_grad()
    def state(self, new: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every parameter by each of its names, with the values of `new`, originals under the masks as they were."""
        made: dict[Any, Tensor] = {}
        for node in self.graph.nodes:
            name = self.names.get(node.name)
            if name is None or name not in new:
                continue
            value, mask = new[name], self.masks.get(node.name)
            made[self.key(node)] = value if mask is None else torch.where(mask, value, self.start[name])
        return {name: made.get(self.memory.get(name, name), value) for name, value in self.start.items()}


def same(a: Any, b: Any) -> bool:
    """Whether two values of the model are one, or alike in every number."""
    return a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b))
