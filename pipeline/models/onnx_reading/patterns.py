"""Norms that older exporters wrote as several operators, joined to the one they are: LayerNorm and GroupNorm.

The channel engine knows a norm by its operator, and keeps channels that meet in a mean it does not know.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from pipeline.models.onnx_reading.graph import Graph
from pipeline.models.onnx_reading.node import Node


def join(graph: Graph) -> None:
    """Join what is a norm, in place; nodes that nobody reads any more go."""
    for form in (_layer_norm, _group_norm):
        view = _View(graph)
        for at, node in enumerate(graph.nodes):
            joined = form(view, node)
            if joined is not None:
                last, made = joined
                place = next(k for k in range(at, len(graph.nodes)) if graph.nodes[k] is last)
                graph.nodes[place] = replace(made, outputs=last.outputs)
        graph.drop_unread()


@dataclass
class _View:
    """Who gives and who reads each value of a graph as it was before any node was joined."""

    graph: Graph

    def __post_init__(self) -> None:
        self.givers = {name: node for node in self.graph.nodes for name in node.outputs if name}
        self.readers = self.graph.readers()

    def giver(self, name: str, *operators: str) -> Node | None:
        """The node that gives `name`, if it is one of `operators`."""
        node = self.givers.get(name)
        return node if node is not None and node.operator in operators else None

    def beside(self, node: Node) -> tuple[str, Tensor] | None:
        """The computed and the constant operand of a node that has one of each."""
        if len(node.inputs) != 2:
            return None
        for mine, other in (node.inputs, node.inputs[::-1]):
            if other in self.graph.constants and mine not in self.graph.constants:
                return mine, self.graph.constants[other]
        return None

    def next(self, node: Node, operator: str) -> tuple[Node, str] | None:
        """The only reader of a node's output, if it joins it with a constant by `operator`; that constant's name."""
        name = node.outputs[0]
        found = self.readers.get(name, [])
        if len(found) != 1 or name in self.graph.outputs or found[0][0].operator != operator:
            return None
        reader, slot = found[0]
        other = reader.inputs[1 - slot]
        return (reader, other) if other in self.graph.constants else None

    def mean(self, name: str) -> tuple[str, list[int]] | None:
        """What `name` is the mean of, over which last axes (counted from the end), if it keeps them."""
        node = self.giver(name, "ReduceMean")
        if node is None or not node.get("keepdims", 1):
            return None
        axes = node.get("axes")
        if axes is None and len(node.inputs) > 1 and node.inputs[1] in self.graph.constants:
            axes = self.graph.constants[node.inputs[1]].tolist()
        if not axes or sorted(axes) != list(range(-len(axes), 0)):
            return None
        return node.inputs[0], sorted(axes)


def _layer_norm(view: _View, node: Node) -> tuple[Node, Node] | None:
    """(x - mean) / sqrt(variance + eps), or times its reciprocal; then, where it has them, times scale, plus shift."""
    if node.operator == "Div":
        centred, root = node.inputs
    elif node.operator == "Mul":
        inverse = [view.giver(name, "Reciprocal") for name in node.inputs]
        at = next((k for k, one in enumerate(inverse) if one is not None), None)
        if at is None:
            return None
        centred, root = node.inputs[1 - at], inverse[at].inputs[0]  # type: ignore[union-attr]
    else:
        return None
    sub, sqrt = view.giver(centred, "Sub"), view.giver(root, "Sqrt")
    add = None if sqrt is None else view.giver(sqrt.inputs[0], "Add")
    shifted = None if add is None else view.beside(add)
    if sub is None or shifted is None or shifted[1].numel() != 1:
        return None
    variance, centre = view.mean(shifted[0]), view.mean(sub.inputs[1])
    if variance is None or centre is None or variance[1] != centre[1] or centre[0] != sub.inputs[0]:
        return None
    square = view.giver(variance[0], "Pow", "Mul")
    if square is None or not _is_square_of(view, square, sub):
        return None
    count = len(centre[1])
    last, given = node, [sub.inputs[0]]
    scale = view.next(node, "Mul")
    if scale is not None and view.graph.constants[scale[1]].ndim == count:
        last, given = scale[0], [*given, scale[1]]
        shift = view.next(last, "Add")
        if shift is not None and view.graph.constants[shift[1]].ndim == count:
            last, given = shift[0], [*given, shift[1]]
    return last, node.having("LayerNormalization", given, axis=-count, epsilon=float(shifted[1]))


def _is_square_of(view: _View, square: Node, sub: Node) -> bool:
    """Whether `square` is the square of what `sub` gives; some exporters write that difference twice."""

    def same(name: str) -> bool:
        other = view.giver(name, "Sub")
        return other is not None and other.inputs == sub.inputs

    if square.operator == "Mul":
        return square.inputs[0] == square.inputs[1] and same(square.inputs[0])
    exponent = view.graph.constants.get(square.inputs[1])
    return exponent is not None and exponent.numel() == 1 and float(exponent) == 2.0 and same(square.inputs[0])


def _group_norm(view: _View, node: Node) -> tuple[Node, Node] | None:
    """Channels in groups along one axis, an InstanceNormalization of each, back, times scale, plus shift."""
    if node.operator != "InstanceNormalization":
        return None
    graph = view.graph
    held = [graph.constants.get(name) for name in node.inputs[1:]]
    split = view.giver(node.inputs[0], "Reshape")
    target = None if split is None else graph.constants.get(split.inputs[1])
    if split is None or target is None or target.numel() != 3 or any(one is None for one in held):
        return None
    ones, zeros = held
    assert ones is not None and zeros is not None
    back = view.readers.get(node.outputs[0], [])
    if not (ones == 1).all() or zeros.any() or len(back) != 1 or back[0][0].operator != "Reshape":
        return None
    scale = view.next(back[0][0], "Mul")
    shift = None if scale is None else view.next(scale[0], "Add")
    if scale is None or shift is None:
        return None
    names = []
    for name in (scale[1], shift[1]):
        value = graph.constants[name]
        sizes = list(value.shape)
        if len(sizes) == 4 and sizes[0] == 1:
            sizes = sizes[1:]
        if len(sizes) < 2 or sizes[0] != value.numel():
            return None
        names.append((name, value.reshape(-1)))
    flat = [graph.fresh(f"{name}_flat", value) for name, value in names]
    made = node.having(
        "GroupNormalization",
        [split.inputs[0], *flat],
        num_groups=ones.numel(),
        epsilon=node.get("epsilon", 1e-5),
    )
    return shift[0], made
