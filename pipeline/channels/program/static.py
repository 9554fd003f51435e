"""Nodes whose value is the same for every input and whatever the weights are: index tables, attention masks."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind

from foundation.editor import writes
from pipeline.channels.operators.table import draws, find
from pipeline.channels.program.capture import Captured


def static_values(captured: Captured) -> dict[fx.Node, Tensor]:
    """Every node whose value depends on no input and no parameter (index tables, attention masks), with that value."""
    program = captured.program
    held = {**program.constants, **captured.state}
    named = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    roots: dict[str, Tensor] = {}
    for spec in program.graph_signature.input_specs:
        value = held.get(spec.target) if spec.target is not None else None
        constant = spec.kind == InputKind.CONSTANT_TENSOR or (spec.kind == InputKind.BUFFER and not spec.persistent)
        integer = isinstance(value, Tensor) and not value.dtype.is_floating_point and spec.kind == InputKind.BUFFER
        if isinstance(value, Tensor) and (constant or integer):
            roots[spec.arg.name] = value
    banned: set[fx.Node] = set()
    while True:  # what is written to from outside is not static, and then neither is what was made of it
        static = _static_nodes(program.graph, {named[n] for n in roots}, banned)
        more = _written_from_outside(program.graph, static)
        if not more:
            break
        banned |= more
    feeds = {n: v.clone() for n, v in roots.items()}  # in-place operators must not reach the model's own
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in program.graph.nodes:
            if node not in static:
                continue
            if node.op == "placeholder":
                values[node] = feeds[node.name]
                continue
            args = fx.node.map_arg(node.args, lambda n: values.get(n, torch.empty(0, dtype=_dtype(n))))
            kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    return values


def _dtype(node: fx.Node) -> torch.dtype:
    val = node.meta.get("val")
    return val.dtype if isinstance(val, Tensor) else torch.float32


def _static_nodes(graph: fx.Graph, roots: set[fx.Node], banned: set[fx.Node]) -> dict[fx.Node, None]:
    static: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node in banned:
            continue
        if node.op == "placeholder":
            if node in roots:
                static[node] = None
            continue
        if node.op != "call_function":
            continue
        val = node.meta.get("val")
        parts = val if isinstance(val, (tuple, list)) else (val,)
        if not all(isinstance(v, Tensor) and all(isinstance(s, int) for s in v.shape) for v in parts):
            continue
        part = node.target is operator.getitem and node.args[0] in static
        card = find(node.target)
        unknown = draws(node) or (card is not None and card.undefined)
        if not part and (unknown or not isinstance(node.target, torch._ops.OpOverload)):
            continue
        sources = node.all_input_nodes
        if card is not None and card.type_only:
            sources = sources[1:]
        if all(s in static for s in sources):
            static[node] = None
    return static


def _written_from_outside(graph: fx.Graph, static: Mapping[fx.Node, None]) -> set[fx.Node]:
    """Static nodes that an in-place operator fills with something that is not static, and what they are views of."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if not writes(node) or node in static or not node.args:
            continue
        target: Any = node.args[0]
        while isinstance(target, fx.Node) and target in static:
            found.add(target)
            target = target.args[0] if target.args else None
    return found
