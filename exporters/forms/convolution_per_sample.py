"""A convolution of every sample with weights of its own -> products of what the kernel's taps see.

Conditionally parameterised convolutions fold the batch into the groups: [1, batch·channels, …] and batch·groups groups.
In ONNX the number of groups is an attribute, so it cannot follow a free batch: torch.onnx (torch 2.13) stops with
"Unsupported attribute type ... SymbolicTensor". Here the batch is a dimension again: per tap of the kernel the input is
a strided slice, and all taps of a group are multiplied with the sample's weights at once.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
from torch import fx

from foundation.editor import Editor, argument

aten = torch.ops.aten
_CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}


def batch_in_front(editor: Editor, node: fx.Node) -> bool:
    """Whether a convolution whose groups are those of all samples was written with the batch as a dimension."""
    if node.target not in _CONVOLUTIONS or not isinstance(argument(node, "groups"), fx.Node):
        return False
    x: Any = argument(node, "input")
    weight: Any = argument(node, "weight")
    bias: Any = argument(node, "bias")
    groups = _of_one_sample(editor.value(argument(node, "groups")))
    inputs, *kernel = editor.value(weight).shape[1:]
    outputs = _of_one_sample(editor.value(weight).shape[0]) // groups  # of one group
    space, found = editor.value(x).shape[2:], editor.value(node).shape[2:]
    if editor.value(x).shape[0] != 1 or not all(isinstance(n, int) for n in (*space, *found, *kernel)):
        return False
    rank = len(kernel)
    stride, padding, dilation = (_each(argument(node, name), rank) for name in ("stride", "padding", "dilation"))
    with editor.before(node):
        call = editor.call
        samples = call(aten.reshape.default, x, [-1, groups * inputs, *space])
        if any(padding):
            samples = call(aten.pad.default, samples, [n for p in reversed(padding) for n in (p, p)])
        taps = []
        for place in product(*map(range, kernel)):
            tap = samples
            for d in range(rank):
                start = place[d] * dilation[d]
                end = start + (found[d] - 1) * stride[d] + 1
                tap = call(aten.slice.Tensor, tap, d + 2, start, end, stride[d])
            taps.append(call(aten.reshape.default, tap, [-1, groups, inputs, math.prod(found)]))
        seen = taps[0] if len(taps) == 1 else call(aten.cat.default, taps, 2)
        own = call(aten.reshape.default, weight, [-1, groups, outputs, inputs, len(taps)])
        own = call(aten.transpose.int, own, -2, -1)
        own = call(aten.reshape.default, own, [-1, groups, outputs, len(taps) * inputs])
        made = call(aten.matmul.default, own, seen)
        if isinstance(bias, fx.Node):
            made = call(aten.add.Tensor, made, call(aten.reshape.default, bias, [-1, groups, outputs, 1]))
        editor.retarget(node, aten.reshape.default, made, [1, -1, *found])
    return True


def _of_one_sample(size: Any) -> int:
    """What is left of a size that is a number times the batch when the batch is one."""
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))


def _each(given: Any, rank: int) -> list[int]:
    values = [given] if isinstance(given, int) else list(given)
    return values * rank if len(values) == 1 else values
