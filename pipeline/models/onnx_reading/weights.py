"""Nodes whose weights torch lays out otherwise, and which constants are weights at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.models.onnx_reading.graph import Graph, names_weight
from pipeline.models.onnx_reading.node import Node

# Inputs that hold weights to train.
_WEIGHTS: Mapping[str, frozenset[int]] = {
    "Attention": frozenset(),
    "BatchNormalization": frozenset({1, 2}),
    "Conv": frozenset({1, 2}),
    "ConvTranspose": frozenset({1, 2}),
    "Einsum": frozenset(range(8)),
    "Gemm": frozenset({0, 1, 2}),
    "GroupNormalization": frozenset({1, 2}),
    "InstanceNormalization": frozenset({1, 2}),
    "LayerNormalization": frozenset({1, 2}),
    "MatMul": frozenset({0, 1}),
    "PRelu": frozenset({1}),
    "RMSNormalization": frozenset({1}),
    "embedding": frozenset({0}),
    "gru": frozenset(range(2, 10)),
    "linear": frozenset({1, 2}),
    "lstm": frozenset(range(3, 11)),
    "rnn_relu": frozenset(range(2, 10)),
    "rnn_tanh": frozenset(range(2, 10)),
}
# Operators beside whose inputs a float constant of the file is a weight: a scale, a position, a class token.
_MAY_HOLD_WEIGHTS = frozenset(
    {
        "Add", "Concat", "Div", "Expand", "Gather", "GatherElements", "GatherND", "Mul", "Reshape", "Slice", "Sub",
        "Sum", "Tile", "Transpose", "Unsqueeze", "concat_repeated",
    }
)  # fmt: skip
_MASKED = -100.0
"""What an additive mask holds is this low, or lower."""


def lay_out(graph: Graph) -> None:
    """Turn nodes with constant weights into torch's form of them, in place."""
    _check_dropout(graph)
    nodes = []
    for node in graph.nodes:
        form = _LAY_OUT.get(node.operator)
        nodes.append(node if form is None else form(graph, node))
    graph.nodes[:] = nodes
    _join_bias(graph)


_CHANNELS = (1, 3, 4)


def channels_first(graph: Graph) -> None:
    """Take images with the channels first where the file, as TensorFlow has them, turns them so itself; in place."""
    readers = graph.readers()
    for at, one in enumerate(graph.inputs):
        mine = [node for node, _ in readers.get(one.name, [])]
        turns = [node for node in mine if node.operator == "Transpose" and node.get("perm") == [0, 3, 1, 2]]
        if len(one.shape) != 4 or one.shape[3] not in _CHANNELS or not mine or len(turns) < len(mine):
            continue
        batch, height, width, channels = one.shape
        graph.inputs[at] = replace(one, shape=(batch, channels, height, width), turned=True)
        graph.nodes[:] = [node.having("Identity", [one.name]) if node in turns else node for node in graph.nodes]


def untie(graph: Graph) -> None:
    """Give layers their own weights where an exporter stored equal ones once, in place.

    Ones, zeros and the like of a fresh network, and biases of layers whose matrices differ; whatever else has several
    readers is taken for one weight that is used several times.
    """
    readers = graph.readers()
    owner: dict[str, str] = {}
    for at, node in enumerate(graph.nodes):
        names = list(node.inputs)
        for slot, name in enumerate(names):
            value = graph.constants.get(name)
            if value is None or value.numel() < 2 or not is_weight(graph, name, readers.get(name, [])):
                continue
            own = f"{names[1]} {name}" if node.operator in ("linear", "Conv") and slot == 2 else str(at)
            if owner.setdefault(name, own) == own:
                continue
            bias = value.ndim == 1 and own != str(at)
            if bias or bool((value == value.flatten()[0]).all()):
                names[slot] = graph.fresh(f"{name}_{at}", value.clone())
        graph.nodes[at] = replace(node, inputs=tuple(names))


def is_weight(graph: Graph, name: str, readers: list[tuple[Node, int]]) -> bool:
    """Whether the constant `name` is a parameter: read as a weight, or a plain number of the file that is no mask."""
    value = graph.constants[name]
    if not value.is_floating_point():
        return False
    if any(slot in _WEIGHTS.get(node.operator, ()) for node, slot in readers):
        return True
    if name in graph.computed or (value.numel() == 1 and not names_weight(name)):
        return False
    low = float(value.min()) if value.numel() else 0.0
    if low <= _MASKED and torch.unique(value).numel() <= 2:
        return False
    return any(node.operator in _MAY_HOLD_WEIGHTS for node, _ in readers)


def _check_dropout(graph: Graph) -> None:
    """Dropout does nothing outside of training; its mask is then read by nobody."""
    readers = graph.readers()
    for node in graph.nodes:
        if node.operator == "Dropout" and any(name in readers for name in node.outputs[1:]):
            node.refuse("its mask is read, as in training")


def _matrix(graph: Graph, name: str) -> Tensor | None:
    value = graph.constants.get(name)
    return value if value is not None and value.ndim == 2 and value.is_floating_point() else None


def _turned(graph: Graph, name: str) -> str:
    """The name of the constant that is the matrix `name` transposed: one of the file, or a new one."""
    if name in graph.transposed:
        return graph.transposed[name]
    made = next((mine for mine, theirs in graph.transposed.items() if theirs == name), None)
    if made is None:
        made = _same_table(graph, name)
    if made is None:
        made = graph.fresh(f"{name}_transposed", graph.constants[name].t().contiguous())
        graph.transposed[made] = name
        if name in graph.computed:
            graph.computed.add(made)
    return made


def _same_table(graph: Graph, name: str) -> str | None:
    """The table of rows that is the matrix `name` transposed, which an exporter stored a second time."""
    matrix = graph.constants[name].t()
    tables = (node.inputs[0] for node in graph.nodes if node.operator in ("Gather", "embedding"))
    for table in tables:
        held = _matrix(graph, table)
        if held is None or held.shape != matrix.shape or not torch.equal(held[0], matrix[0]):
            continue
        if torch.equal(held, matrix):
            return table
    return None


def _matmul(graph: Graph, node: Node) -> Node:
    a, b = node.inputs
    if a in graph.constants or _matrix(graph, b) is None:
        return node
    return node.having("linear", [a, _turned(graph, b)])


def _gemm(graph: Graph, node: Node) -> Node:
    weight = _matrix(graph, node.inputs[1])
    if weight is None or node.get("transA", 0) or node.inputs[0] in graph.constants:
        return node
    name = node.inputs[1] if node.get("transB", 0) else _turned(graph, node.inputs[1])
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    if alpha != 1.0:
        name = graph.fresh(f"{node.inputs[1]}_scaled", graph.constants[name] * alpha)
    given = node.inputs[2] if len(node.inputs) > 2 else ""
    if not given or beta == 0.0:
        return node.having("linear", [node.inputs[0], name])
    outputs = graph.constants[name].shape[0]
    bias = graph.constants.get(given)
    if bias is None or bias.numel() not in (1, outputs) or (bias.ndim and bias.shape[-1] != bias.numel()):
        return node
    if bias.shape != (outputs,) or beta != 1.0:
        plain = (bias.reshape(-1) * beta).expand(outputs).contiguous()
        given = graph.fresh(f"{given}_flat", plain)
    return node.having("linear", [node.inputs[0], name, given])


def _join_bias(graph: Graph) -> None:
    """A linear layer and the Add of a constant after it are one."""
    readers = graph.readers()
    by_output = {node.outputs[0]: at for at, node in enumerate(graph.nodes) if node.operator == "linear"}
    gone = set()
    for at, node in enumerate(graph.nodes):
        if node.operator != "Add":
            continue
        for mine, other in (node.inputs, node.inputs[::-1]):
            place = by_output.get(mine)
            bias = graph.constants.get(other)
            if place is None or bias is None or mine in graph.outputs or len(readers[mine]) != 1:
                continue
            layer = graph.nodes[place]
            weight = graph.constants[layer.inputs[1]]
            if len(layer.inputs) > 2 or tuple(bias.shape) != (weight.shape[0],):
                continue
            graph.nodes[at] = replace(node, operator="linear", inputs=(*layer.inputs, other), attributes={})
            gone.add(place)
            break
    graph.nodes[:] = [node for at, node in enumerate(graph.nodes) if at not in gone]


def _gather(graph: Graph, node: Node) -> Node:
    table, rows = node.inputs
    picked = graph.constants.get(rows)
    if picked is not None and picked.ndim > 1 and bool((picked < 0).any()):
        return node.having("Gather", node.inputs, axis=node.get("axis", 0), from_the_end=1)
    if _matrix(graph, table) is None or rows in graph.constants or node.get("axis", 0):
        return node
    return node.having("embedding", [table, rows])


def _prelu(graph: Graph, node: Node) -> Node:
    slope = graph.constants.get(node.inputs[1])
    if slope is None or slope.ndim < 2 or slope.shape[0] != slope.numel():
        return node
    flat = graph.fresh(f"{node.inputs[1]}_flat", slope.reshape(-1))
    return node.having("PRelu", [node.inputs[0], flat], per_channel=slope.ndim)


# ONNX's order of the gates -> torch's.
_GATES: Mapping[str, tuple[int, ...]] = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
_ACTIVATIONS: Mapping[str, list[str]] = {"LSTM": ["sigmoid", "tanh", "tanh"], "GRU": ["sigmoid", "tanh"]}


def _recurrent(graph: Graph, node: Node) -> Node:
    """LSTM, GRU and RNN: the gates in torch's order, two biases instead of one that holds both."""
    kind = node.operator
    x, w, r, b, lengths, state, cell, peepholes = (*node.inputs, *[""] * 8)[:8]
    activations = [one.lower() for one in node.get("activations") or []]
    ways = 2 if node.get("direction") == "bidirectional" else 1
    if w not in graph.constants or r not in graph.constants or (b and b not in graph.constants):
        node.refuse("weights that are computed are not read")
    if lengths:
        node.refuse("sequences of different lengths are not read")
    if peepholes or node.get("input_forget", 0) or node.get("clip") or node.get("layout", 0):
        node.refuse("peepholes, a coupled forget gate, clipping or another layout are not read")
    if kind == "GRU" and not node.get("linear_before_reset", 0):
        node.refuse("a reset gate before the product is not read (linear_before_reset=0)")
    if kind == "RNN":
        first = activations[0] if activations else "tanh"
        if first not in ("tanh", "relu") or any(one != first for one in activations):
            node.refuse(f"the activation {first} is not read")
        operator = f"rnn_{first}"
    else:
        if activations and activations != _ACTIVATIONS[kind] * ways:
            node.refuse(f"the activations {', '.join(activations)} are not read")
        operator = kind.lower()
    gates = _GATES[kind]
    hidden = graph.constants[r].shape[2]

    def ordered(value: Tensor) -> Tensor:
        return torch.cat([value[gate * hidden : (gate + 1) * hidden] for gate in gates]).contiguous()

    stem = (node.name or node.outputs[0] or kind.lower()).strip("/").replace("/", ".")
    names = []
    for way in range(ways):
        end = "_reverse" if way else ""
        parts = {"weight_ih": ordered(graph.constants[w][way]), "weight_hh": ordered(graph.constants[r][way])}
        if b:
            one, two = graph.constants[b][way].chunk(2)
            parts |= {"bias_ih": ordered(one), "bias_hh": ordered(two)}
        names += [graph.fresh(f"{stem}.{part}_l0{end}", value) for part, value in parts.items()]
    # Zeros are torch's own start, at whatever batch.
    givers = {name: one for one in graph.nodes for name in one.outputs}
    given = (state, cell) if kind == "LSTM" else (state,)
    states = ["" if _is_zero(graph, givers, name) else name for name in given]
    return node.having(operator, [x, *states, *names], hidden_size=hidden, direction=node.get("direction", "forward"))


def _is_zero(graph: Graph, givers: Mapping[str, Node], name: str) -> bool:
    """Whether `name` is zeros, in whatever shape."""
    if name in graph.constants:
        return not graph.constants[name].any()
    node = givers.get(name)
    if node is None:
        return False
    if node.operator == "ConstantOfShape":
        return not (node.get("value") or (0.0,))[0]
    if node.operator == "Concat":
        return all(_is_zero(graph, givers, one) for one in node.inputs)
    return node.operator in _MOVED and _is_zero(graph, givers, node.inputs[0])


# Operators after which zeros are zeros still.
_MOVED = frozenset(
    {"Expand", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)

_LAY_OUT: Mapping[str, Callable[[Graph, Node], Node]] = {
    "GRU": _recurrent,
    "Gather": _gather,
    "Gemm": _gemm,
    "LSTM": _recurrent,
    "MatMul": _matmul,
    "PRelu": _prelu,
    "RNN": _recurrent,
}


def free_batch(graph: Graph, shapes: Mapping[str, tuple[int, ...]], *, every: bool) -> Graph:
    """A graph like this one of batch 1 that takes any batch, as far as sizes written down in it stand in the way.

    A guess, which the caller proves: the batch is taken for a factor of the first size of what a Reshape gives, as it
    is in `shapes` (output -> its sizes at batch 1): of `every` one, or of those alone that name a first size. Constants
    that are joined to a sample are repeated.
    """
    freed = replace(graph, nodes=[], constants=dict(graph.constants))
    for node in graph.nodes:
        if node.operator == "Reshape" and (sizes := shapes.get(node.outputs[0])):
            target = graph.constants.get(node.inputs[1])
            if every or (target is not None and target[0] > 0):
                name = freed.fresh(f"{node.outputs[0]}_sizes", torch.tensor([-1, *sizes[1:]]))
                node = node.having("Reshape", [node.inputs[0], name])
        elif node.operator == "Concat" and node.get("axis", 1) != 0 and any(n in graph.constants for n in node.inputs):
            node = replace(node, operator="concat_repeated")
        freed.nodes.append(node)
    freed.inputs = [replace(one, shape=(None, *one.shape[1:])) for one in graph.inputs]
    return freed
