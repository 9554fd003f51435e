"""attention with one head of keys or values for all heads of the query: it is written out for each.

torch broadcasts it; torch.onnx (torch 2.13, opset 23) does not: "SDPA (MHA) requires q_num_heads = kv_num_heads".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from foundation.editor import Editor

aten = torch.ops.aten


def repeated_heads(editor: Editor, node: fx.Node) -> bool:
    """Whether a single head of keys or values, broadcast over the query's, was written out for each of them."""
    if node.target is not aten.scaled_dot_product_attention.default:
        return False
    operands: list[Any] = list(node.args[:3])
    shape = editor.value(operands[0]).shape
    if len(shape) != 4 or not isinstance(shape[1], int) or node.kwargs.get("enable_gqa"):
        return False
    changed = False
    for name, source in zip(("key", "value"), operands[1:], strict=True):
        if shape[1] > 1 and editor.value(source).shape[1] == 1:
            with editor.before(node):
                editor.set_arguments(node, **{name: editor.call(aten.expand.default, source, [-1, shape[1], -1, -1])})
            changed = True
    return changed
