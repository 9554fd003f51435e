"""Which elements of a tensor depend on the inputs at all, read off one run of the graph.

Every card says how its output depends on its operands (see `Masks`): a zero row, a zero scale or a zero gate cuts the
dependence off. Where a card does not say, everything depends as soon as anything of an operand does: the answer can be
too cautious, never too bold.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from foundation.editor import writes
from pipeline.channels.operators.masks import Masks, NoAnswer, alike, parts
from pipeline.channels.operators.strict import BUGS, strict
from pipeline.channels.operators.table import draws, find
from pipeline.channels.program.capture import Captured, small
from pipeline.channels.program.execute import execute, feeds_of, last_uses

Seen = Callable[[fx.Node, Tensor, Tensor], None]
"""Called with (node, its value in float64, its `depends` mask) for every tensor of a run."""


def follow(captured: Captured, seen: Seen) -> None:
    """Run `captured` once in float64 on random inputs and hand every tensor to `seen`.

    A graph that writes into a view of a tensor is not followed: `seen` is told that all of it depends.
    """
    graph = captured.program.graph
    inputs = set(captured.program.graph_signature.user_inputs)
    run = _Run(graph, inputs, seen)
    execute(graph, feeds_of(captured.program, small(captured), captured.state), dtype=torch.float64, watch=run.step)


class _Run:
    """One run of the graph, node by node in order, each node's masks worked out from its operands'."""

    def __init__(self, graph: fx.Graph, inputs: set[str], seen: Seen) -> None:
        self.inputs, self.seen = inputs, seen
        self.aliased = _writes_into_views(graph)
        self.dies = last_uses(graph)
        self.masks = Masks()

    def step(self, node: fx.Node, value: Any) -> None:
        """One node, in order."""
        depends = self._depends(node, value)
        self.masks.store(node, value, depends)
        if _is_write(node):  # what was written to has changed as well
            target: Any = node.args[0]
            while isinstance(target, fx.Node):
                self.masks.store(target, value, depends)
                target = target.args[0] if _is_write(target) else None
        for v, d in zip(parts(value), parts(depends), strict=True):
            if isinstance(v, Tensor):
                self.seen(node, v, d)
        for dead in self.dies.get(node, ()):
            self.masks.forget(dead)

    def _depends(self, node: fx.Node, value: Any) -> Any:
        """What depends in the node's value: by its card where it has an answer, else everything."""
        everything = alike(value, True)
        if node.op == "placeholder":
            return alike(value, node.name in self.inputs)
        if self.aliased:
            return everything
        if node.target is operator.getitem:
            whole = self.masks.depends.get(node.args[0])
            return whole[int(node.args[1])] if isinstance(whole, tuple) else everything  # type: ignore[arg-type]
        card = find(node.target)
        if draws(node) or (card is not None and card.undefined):
            return everything
        if not any(self.masks.any(n) for n in node.all_input_nodes):
            return alike(value, False)
        if card is None or card.depends is None:
            return everything
        try:
            found = card.depends(self.masks, node, value)
        except NoAnswer:
            return everything
        except BUGS:
            if strict():
                raise
            return everything
        return found if _fits(found, value) else everything


def _fits(found: Any, value: Any) -> bool:
    """Whether masks have the shapes of the value's tensors."""
    masks, tensors = parts(found), parts(value)
    return len(masks) == len(tensors) and all(
        not isinstance(v, Tensor) or (isinstance(d, Tensor) and d.shape == v.shape)
        for v, d in zip(tensors, masks, strict=True)
    )


def _is_write(node: fx.Node) -> bool:
    return writes(node) and bool(node.args) and isinstance(node.args[0], fx.Node)


def _writes_into_views(graph: fx.Graph) -> bool:
    """Whether an in-place operator's target is a view of something, or something has a view of it already."""

    def is_view(node: fx.Node) -> bool:
        schema = getattr(node.target, "_schema", None)
        if node.target is operator.getitem:
            return True
        return schema is not None and not writes(node) and any(a.alias_info for a in schema.arguments)

    order = {node: k for k, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if not _is_write(node):
            continue
        target: Any = node.args[0]
        while _is_write(target):
            target = target.args[0]
        if is_view(target) or any(is_view(u) and order[u] < order[node] for u in target.users):
            return True
    return False
