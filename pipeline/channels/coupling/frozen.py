"""Weights that are computed from parameters (standardised, weight-normed).

Where a reduction inside that computation runs over channels that go, the result is computed once, on the folded weights
at full size, then sliced and kept as a parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from foundation.editor import writes
from pipeline.channels.operators.trace import Trace
from pipeline.channels.operators.values import Value


def frozen_part(graph: fx.Graph, trace: Trace, touched: Callable[[Any], bool]) -> tuple[set[fx.Node], list[fx.Node]]:
    """(nodes that are computed once, those among them whose values the rest of the graph uses).

    `touched(value)`: whether something of a value goes.
    """
    inside: set[fx.Node] = set()
    if not trace.frozen:
        return inside, []
    for node in graph.nodes:
        value = trace.values.get(node)
        parts = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(v, Value) and v.derived for v in parts):
            continue
        sources = node.all_input_nodes
        hit = node in trace.frozen and any(touched(trace.values.get(s)) for s in sources)
        if hit or any(s in inside for s in sources):
            inside.add(node)
    edge = [n for n in graph.nodes if n in inside and any(u not in inside for u in n.users)]
    return inside, edge


def still_used(graph: fx.Graph, edge: list[fx.Node]) -> set[fx.Node]:
    """The nodes that the outputs and the in-place writes need when the nodes of `edge` are given."""
    given = set(edge)
    roots = [n for n in graph.nodes if n.op == "output" or writes(n)]
    used: set[fx.Node] = set()
    while roots:
        node = roots.pop()
        if node not in used:
            used.add(node)
            if node not in given:
                roots += node.all_input_nodes
    return used
