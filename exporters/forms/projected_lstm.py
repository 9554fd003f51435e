"""LSTM with projections -> one plain LSTM per layer, and a product behind it.

ONNX's LSTM has no projection; torch.onnx (torch 2.13) writes one all the same, which onnxruntime refuses at run time
("Input initial_c must have shape"). A layer gives P·h, and reads it again in the next step as W·(P·h) = (W·P)·h: a
plain LSTM with W·P in the place of W gives h, and the product with P stands behind it. The first step reads the state
that was given, which has no h: it has to be zero, as it is where none is given.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from foundation.editor import Editor

aten = torch.ops.aten


def taken_apart(editor: Editor, node: fx.Node) -> bool:
    """Whether a projected LSTM that starts from zeros was made plain ones with products."""
    if node.target is not aten.lstm.input:
        return False
    args: Any = node.args
    source, (hidden, cells), weights, biases, layers, *_, both_ways, _ = args
    directions = 2 if both_ways else 1
    per = len(weights) // (layers * directions)
    if per != (5 if biases else 3) or not _zeros(hidden):
        return False
    last_outputs: list[fx.Node] = []
    last_cells: list[fx.Node] = []
    with editor.before(node):
        call, reads = editor.call, source
        for layer in range(layers):
            first = layer * directions * per
            own = [weights[at : at + per] for at in range(first, first + directions * per, per)]
            projections = [of_one[-1] for of_one in own]
            plain = [w for ih, hh, *rest, p in own for w in (ih, call(aten.matmul.default, hh, p), *rest)]
            start = call(aten.slice.Tensor, cells, 0, layer * directions, (layer + 1) * directions)
            states = [call(aten.zeros_like.default, start), start]
            made = call(node.target, reads, states, plain, biases, 1, *args[5:])
            every, last, cell = (call(operator.getitem, made, k) for k in range(3))
            units = editor.value(cell).shape[-1]
            outputs = []
            for k, p in enumerate(projections):
                one_way = call(aten.slice.Tensor, every, -1, k * units, (k + 1) * units)
                outputs.append(call(aten.linear.default, one_way, p))
                last_outputs.append(call(aten.linear.default, call(aten.select.int, last, 0, k), p))
            last_cells.append(cell)
            reads = call(aten.cat.default, outputs, -1)
        for part in list(node.users):
            # The part keeps its name, which the signature may list among the outputs.
            if part.args[1] == 0:
                editor.retarget(part, aten.alias.default, reads)
            elif part.args[1] == 1:
                editor.retarget(part, aten.stack.default, last_outputs, 0)
            else:
                editor.retarget(part, aten.cat.default, last_cells, 0)
    editor.erase(node)
    return True


def _zeros(state: fx.Node) -> bool:
    """Whether a state is zeros, perhaps repeated."""
    at: Any = state
    while at.target in (aten.expand.default, aten.slice.Tensor, aten.contiguous.default):
        at = at.args[0]
    return at.target in (aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)
