"""LSTM and GRU: every gate of a hidden unit lives with the unit.

Gates are stacked in dimension 0 of the weights (4·H for LSTM, 3·H for GRU). A unit whose rows, columns and biases are
zero keeps h = 0: LSTM has tanh(0) = 0 for its candidate and its cell; GRU's candidate is tanh(0) = 0 too.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import fx

from pipeline.channels.operators.card import Card, Shape
from pipeline.channels.operators.table import base_name, family
from pipeline.channels.operators.trace import NoRule, Trace
from pipeline.channels.operators.values import Atoms, Flags, Value, opaque


def macs_recurrent(node: fx.Node, shape: Shape) -> int:
    """Every matrix of weights once per step."""
    source: Any = node.args[0]
    weights: Any = node.args[2]
    steps = math.prod(shape(source)[:2])
    return sum(steps * math.prod(shape(w)) for w in weights if len(shape(w)) == 2)


@family(Card("recurrent", macs=macs_recurrent), "lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(t: Trace, node: fx.Node) -> Any:
    """Input [T, B, I] or [B, T, I]; states [layers·directions, B, H]; output [.., directions·H]."""
    args = node.args
    if not isinstance(args[2], (list, tuple)):
        raise NoRule("a packed sequence")
    name = base_name(node.target)
    gates = {"lstm": 4, "gru": 3}.get(name, 1)
    source: Any = args[0]
    states = list(args[1]) if isinstance(args[1], (list, tuple)) else [args[1]]
    weights: list[Any] = list(args[2])
    has_biases, layers = bool(args[3]), int(args[4])  # type: ignore[arg-type]
    directions = 2 if args[7] else 1
    per = 4 if has_biases else 2  # weights of one layer in one direction
    if len(weights) > layers * directions * per:
        raise NoRule("a projected LSTM")
    for s in states:
        t.pin_value(t.value(s), node, "layers and batch", [0, 1])
    x = t.value(source)
    t.pin_value(x, node, "time and batch", range(len(x.shape) - 1))
    incoming: Atoms | None = x.atoms[-1]  # the channels that the next layer reads
    hidden_of_all: list[Atoms] = []
    for layer in range(layers):
        first = layer * directions * per
        found = [
            _one_direction(t, node, weights[at : at + per], gates, incoming, source if layer == 0 else None)
            for at in range(first, first + directions * per, per)
        ]
        hidden_of_all += [units for units, _ in found]
        incoming = np.concatenate([units for units, _ in found])
        quiet = np.concatenate([silent for _, silent in found])
    for s in states:  # one dimension for all layers: their units can only go together
        value = t.value(s)
        for unit in hidden_of_all:
            t.tie(value.atoms[2], unit, node)
        if value.atoms[2] is not None and (value.zeros[2] is None or not value.zeros[2].all()):
            t.pin(value.atoms[2], node, "an initial state that is not zero")
    shapes = [t.shape_of(v) for v in node.meta["val"]]
    outputs = Value(shapes[0], (None, None, incoming), (None, None, quiet))
    last = [
        Value(s, (None, None, hidden_of_all[0]), (None, None, None)) if len(s) == 3 else opaque(s) for s in shapes[1:]
    ]
    return (outputs, *last)


def _one_direction(
    t: Trace, node: fx.Node, weights: list[Any], gates: int, incoming: Atoms | None, source: Any
) -> tuple[Atoms, Flags]:
    """One layer in one direction: (atoms of its units, which of them are silent).

    `source`: the tensor that it reads, for the first layer; the others read what never leaves the operator.
    """
    w_ih, w_hh, *biases = (t.value(w) for w in weights)
    size = w_hh.shape[1]
    unit = w_hh.atoms[1] if w_hh.atoms[1] is not None else np.zeros(size, np.int64)
    silent = np.full(size, True)
    for v in (w_ih, w_hh, *biases):
        silent &= v.zeros[0].reshape(gates, size).all(axis=0) if v.zeros[0] is not None else False
        if v.atoms[0] is not None:  # the gates stay, and each has all units
            t.product(node, v.atoms[0], (None, unit), (gates, size))
    t.tie(incoming, w_ih.atoms[1], node)
    reads = [] if source is None else [(source, len(t.value(source).shape) - 1)]
    t.contract(node, [*reads, (weights[0], 1)])
    t.contract(node, [(weights[1], 1)])  # what a unit says to the other units of its layer
    t.reading(w_ih.atoms[1])
    t.reading(w_hh.atoms[1])
    return unit, silent
