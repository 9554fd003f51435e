"""LSTM and GRU: every gate of a hidden unit lives with the unit.

Gates are stacked in dimension 0 of the weights (4·H for LSTM, 3·H for GRU). A unit whose rows, columns and biases are
zero keeps h = 0: LSTM has tanh(0) = 0 for its candidate and its cell; GRU's candidate is tanh(0) = 0 too.

An LSTM with projections gives P·h in the place of h, to the next step and the next layer: its units are summed over by
P, and what it gives out are the rows of P.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from pipeline.channels.operators.card import Card, Shape
from pipeline.channels.operators.cut import Cut
from pipeline.channels.operators.table import base_name, family
from pipeline.channels.operators.trace import NoRule, Trace
from pipeline.channels.operators.values import Atoms, Flags, Value, opaque

aten = torch.ops.aten


def macs_recurrent(node: fx.Node, shape: Shape) -> int:
    """Every matrix of weights once per step."""
    source: Any = node.args[0]
    weights: Any = node.args[2]
    steps = math.prod(shape(source)[:2])
    return sum(steps * math.prod(shape(w)) for w in weights if len(shape(w)) == 2)


@dataclass(frozen=True, eq=False)
class Projected:
    """The atoms of a projected LSTM's units, and of what it gives out."""

    unit: Atoms
    given: Atoms


def edit_projected(c: Cut, node: fx.Node) -> None:
    """With as many units as outputs PyTorch takes it for an LSTM without projections: it gets one more unit, of zeros.

    Such a unit stays zero, and its column of the projection is zero.
    """
    found = c.note(node, Projected)
    if found is None or c.count(found.unit, found.unit.shape[0]) != c.count(found.given, found.given.shape[0]):
        return
    units = c.count(found.unit, found.unit.shape[0])
    args: Any = node.args
    hidden, cells = args[1]
    weights = [c.new_of[w] for w in args[2]]
    per = 5 if args[3] else 3

    def wider(weight: fx.Node, rank: int) -> fx.Node:
        by_gate = c.call(aten.unflatten.int, weight, 0, [4, units])
        return c.call(aten.flatten.using_ints, c.call(aten.pad.default, by_gate, [0, 0] * (rank - 1) + [0, 1]), 0, 1)

    with c.editor.before(c.new_of[node]):
        more = [
            c.call(aten.pad.default, weight, [0, 1])
            if at % per == per - 1
            else wider(weight, len(c.value(args[2][at]).shape))
            for at, weight in enumerate(weights)
        ]
        states = [c.new_of[hidden], c.call(aten.pad.default, c.new_of[cells], [0, 1])]
    c.retarget(node, node.target, (c.new_of[args[0]], states, more, *args[3:]))
    for part in node.users:
        if part.args[1] == 2:
            c.replace(part, lambda new: c.call(aten.slice.Tensor, new, 2, 0, units), "without the unit of zeros")


@family(Card("recurrent", edit=edit_projected, macs=macs_recurrent), "lstm", "gru", "rnn_tanh", "rnn_relu")
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
    projected = len(weights) > layers * directions * per
    per += int(projected)  # behind the others, the projection
    for s in states:
        t.pin_value(t.value(s), node, "layers and batch", [0, 1])
    x = t.value(source)
    t.pin_value(x, node, "time and batch", range(len(x.shape) - 1))
    incoming: Atoms | None = x.atoms[-1]  # the channels that the next layer reads
    hidden_of_all: list[Atoms] = []
    given_of_all: list[Atoms] = []  # the rows of the projections; without them the units themselves
    for layer in range(layers):
        first = layer * directions * per
        found = [
            _one_direction(t, node, weights[at : at + per], gates, incoming, source if layer == 0 else None, projected)
            for at in range(first, first + directions * per, per)
        ]
        hidden_of_all += [units for units, _, _ in found]
        given_of_all += [given for _, given, _ in found]
        incoming = np.concatenate([given for _, given, _ in found])
        quiet = np.concatenate([silent for _, _, silent in found])
    for s, each in zip(states, (given_of_all, hidden_of_all), strict=False):
        value = t.value(s)
        for unit in each:  # one dimension for all layers: their units can only go together
            t.tie(value.atoms[2], unit, node)
        if value.atoms[2] is not None and (value.zeros[2] is None or not value.zeros[2].all()):
            t.pin(value.atoms[2], node, "an initial state that is not zero")
    shapes = [t.shape_of(v) for v in node.meta["val"]]
    outputs = Value(shapes[0], (None, None, incoming), (None, None, quiet))
    last = [
        Value(s, (None, None, each[0]), (None, None, None)) if len(s) == 3 else opaque(s)
        for s, each in zip(shapes[1:], (given_of_all, hidden_of_all), strict=False)
    ]
    if projected:
        t.notes[node] = Projected(hidden_of_all[0], given_of_all[0])
    return (outputs, *last)


def _one_direction(
    t: Trace, node: fx.Node, weights: list[Any], gates: int, incoming: Atoms | None, source: Any, projected: bool
) -> tuple[Atoms, Atoms, Flags]:
    """One layer in one direction: (atoms of its units, atoms of what it gives out, which of those are silent).

    `source`: the tensor that it reads, for the first layer; the others read what never leaves the operator.
    """
    w_ih, w_hh, *biases = (t.value(w) for w in (weights[:-1] if projected else weights))
    size = w_ih.shape[0] // gates
    given = _atoms(w_hh, 1)
    unit = _atoms(t.value(weights[-1]), 1) if projected else given
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
    if projected:
        p = t.value(weights[-1])
        t.contract(node, [(weights[-1], 1)])
        t.reading(p.atoms[1])
        t.tie(given, _atoms(p, 0), node)
        silent = p.zeros[0] if p.zeros[0] is not None else np.full(p.shape[0], False)
    return unit, given, silent


def _atoms(v: Value, dim: int) -> Atoms:
    """The atoms of a dimension; pinned ones where it has none."""
    atoms = v.atoms[dim]
    return np.zeros(v.shape[dim], np.int64) if atoms is None else atoms
