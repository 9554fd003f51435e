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
    source, states, weights, biases, layers, dropout, training, both_ways, batch_first = node.args
    hidden, cells = states  # type: ignore[misc]
    directions = 2 if both_ways else 1
    per = len(weights) // (layers * directions)  # type: ignore[arg-type, operator]
    if per != (5 if biases else 3) or not _zeros(hidden):
        return False
    given: dict[int, list[fx.Node]] = {0: [], 1: [], 2: []}
    with editor.before(node):
        reads: Any = source
        for layer in range(layers):  # type: ignore[arg-type]
            first = layer * directions * per
            own = [weights[at : at + per] for at in range(first, first + directions * per, per)]  # type: ignore[index]
            at = layer * directions
            cell = editor.call(aten.slice.Tensor, cells, 0, at, at + directions)
            start = editor.call(aten.zeros_like.default, cell)
            plain = [w for ih, hh, *rest, p in own for w in (ih, editor.call(aten.matmul.default, hh, p), *rest)]
            made = editor.call(
                node.target, reads, [start, cell], plain, biases, 1, dropout, training, both_ways, batch_first
            )
            every, last, cell = (editor.call(operator.getitem, made, k) for k in range(3))
            units = editor.value(cell).shape[-1]
            pairs = [(editor.call(aten.slice.Tensor, every, -1, k * units, (k + 1) * units), p)
                     for k, (*_, p) in enumerate(own)]  # fmt: skip
            outputs = [editor.call(aten.linear.default, h, p) for h, p in pairs]
            reads = outputs[0] if len(outputs) == 1 else editor.call(aten.cat.default, outputs, -1)
            given[1] += [
                editor.call(aten.linear.default, editor.call(aten.select.int, last, 0, k), p)
                for k, (*_, p) in enumerate(own)
            ]
            given[2] += [cell]
        given[0] = [reads]
        made_of = {1: (aten.stack.default, given[1]), 2: (aten.cat.default, given[2])}
        for part in list(node.users):
            at = part.args[1]  # type: ignore[assignment]
            if at == 0:
                # The part keeps its name, which the signature may list among the outputs.
                editor.retarget(part, aten.alias.default, reads)
            else:
                target, parts = made_of[at]
                editor.retarget(part, target, parts, 0)
    editor.erase(node)
    return True


def _zeros(state: fx.Node) -> bool:
    """Whether a state is zeros, perhaps repeated."""
    while state.target in (aten.expand.default, aten.slice.Tensor, aten.contiguous.default):
        state = state.args[0]  # type: ignore[assignment]
    return state.target in (aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)
