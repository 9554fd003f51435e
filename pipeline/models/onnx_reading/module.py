"""The net that an ONNX file holds, as a module whose weights are parameters under their names in the file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.onnx_reading.graph import Graph, GraphInput, as_value
from pipeline.models.onnx_reading.node import Node, NotReadError
from pipeline.models.onnx_reading.normalization import batch_norm
from pipeline.models.onnx_reading.table import READINGS
from pipeline.models.onnx_reading.values import Known, tensor
from pipeline.models.onnx_reading.weights import is_weight

# Operators that want their constants as numbers, while a captured tensor does not tell its own.
_BY_NUMBERS = frozenset({"OneHot", "Resize", "Upsample"})


class OnnxNet(nn.Module):
    """Runs the nodes of an ONNX graph as torch operators.

    It takes the graph's inputs in order, and returns its only output, or a tuple. Integer and boolean inputs may come
    in any integer type. A constant `a.b.c` of the file is the parameter or buffer `c` of the part `a.b`, so that
    weights which an exporter kept the names of have them here.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.inputs: tuple[GraphInput, ...] = tuple(graph.inputs)
        self.outputs = tuple(graph.outputs)
        self._numbers: dict[str, Known] = {}
        self._places: dict[str, tuple[str, ...]] = {}
        readers = graph.readers()
        titles = _titles(graph)
        wanted = [name for name in graph.constants if name in readers or name in graph.outputs]
        for name in wanted:
            constant, mine = graph.constants[name], readers.get(name, [])
            weight = is_weight(graph, name, mine)
            value = as_value(constant, name, numbers=bool(mine) and all(n.operator in _BY_NUMBERS for n, _ in mine))
            if isinstance(value, Known) and not weight:
                self._numbers[name] = value
            else:
                self._places[name] = _hold(self, titles.get(name, name), constant.clone(), weight)
        self._steps = tuple(_steps(graph))

    def forward(self, *values: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run the graph on its inputs, the batch first."""
        held: dict[str, Any] = {}
        for _ in self.walk(held, values):
            pass
        outputs = tuple(tensor(held[name]) for name in self.outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def walk(self, held: dict[str, Any], values: tuple[Tensor, ...]) -> Iterator[Node]:
        """Run node by node, each given just before it is run; `held` has the values that are still to be read."""
        held.update(self._numbers)
        for name, place in self._places.items():
            held[name] = reduce(getattr, place, self)
        for one, value in zip(self.inputs, values, strict=True):
            if value.is_floating_point() and not one.dtype.is_floating_point:
                raise TypeError(f"{one.name} takes whole numbers, not {str(value.dtype).removeprefix('torch.')}")
            held[one.name] = value if value.dtype == one.dtype else value.to(one.dtype)
        for node, done in self._steps:
            yield node
            given: list[Any] = [held[name] if name else None for name in node.inputs]
            if node.operator == "BatchNormalization":
                made: Any = batch_norm(node, self.training, *given)
            else:
                made = READINGS[node.operator](node, *given)
            held.update(zip(node.outputs, made if isinstance(made, tuple) else (made,), strict=False))
            for name in done:
                held.pop(name, None)

    def extra_repr(self) -> str:
        """Its inputs and outputs by name."""
        return f"{', '.join(one.name for one in self.inputs)} -> {', '.join(self.outputs)}, {len(self._steps)} nodes"


def traced(net: OnnxNet, values: tuple[Tensor, ...]) -> dict[str, tuple[int, ...]]:
    """Run `net`; return the shape that each Reshape gives. Raises NotReadError, naming the node that fails."""
    held: dict[str, Any] = {}
    last: Node | None = None
    found: dict[str, tuple[int, ...]] = {}

    def note() -> None:
        if last is not None and last.operator == "Reshape" and isinstance(held.get(last.outputs[0]), Tensor):
            found[last.outputs[0]] = tuple(int(one) for one in held[last.outputs[0]].shape)

    try:
        with torch.no_grad():
            for node in net.walk(held, values):
                note()
                last = node
            note()
    except NotReadError:
        raise
    except Exception as error:  # sizes that do not fit each other are refused by torch, in its words
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise NotReadError(f"{last}: {said}" if last is not None else said) from error
    return found


def _steps(graph: Graph) -> Iterator[tuple[Node, tuple[str, ...]]]:
    """Each node, and the values that nobody reads after it."""
    last = {name: at for at, node in enumerate(graph.nodes) for name in (*node.outputs, *node.inputs) if name}
    for at, node in enumerate(graph.nodes):
        names = dict.fromkeys((*node.inputs, *node.outputs))
        yield node, tuple(name for name in names if name and last[name] == at and name not in graph.outputs)


def _titles(graph: Graph) -> dict[str, str]:
    """Better names for weights that the exporter named by number, after the bias or shift beside them."""
    found: dict[str, str] = {}
    taken = set(graph.constants)
    for node in graph.nodes:
        if node.operator not in ("linear", "Conv") or len(node.inputs) < 3:
            continue
        weight, bias = node.inputs[1:3]
        title = f"{bias.removesuffix('.bias')}.weight"
        if "." not in weight and bias.endswith(".bias") and title not in taken:
            found[weight] = title
            taken.add(title)
    for name in graph.constants:  # a matrix that is held transposed takes the place of the one in the file
        original = graph.transposed.get(name)
        if name not in found and original is not None and name == f"{original}_transposed":
            found.setdefault(name, original)
    return found


def _hold(root: nn.Module, title: str, value: Tensor, weight: bool) -> tuple[str, ...]:
    """Register a parameter or buffer in the part that its dotted name says; return where it is."""
    *path, last = [re.sub(r"\W", "_", part) for part in title.split(".") if part] or ["constant"]
    module = root
    for depth, part in enumerate(path):
        child = module._modules.get(part)
        if child is None:
            if hasattr(module, part):  # a name that torch's modules use, or a tensor
                return _hold(root, title.replace(".", "_"), value, weight)
            child = nn.Module()
            module.add_module(path[depth], child)
        module = child
    number, name = 1, last
    while hasattr(module, name):
        number += 1
        name = f"{last}_{number}"
    if weight:
        module.register_parameter(name, nn.Parameter(value))
    else:
        module.register_buffer(name, value)
    return (*path, name)
