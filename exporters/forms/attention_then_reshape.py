"""attention -> moves of dimensions -> reshape: a copy in order is put before the reshape.

torch.onnx (torch 2.13) makes views of reshapes, by the strides that it sees, before it takes attention apart; the parts
then give other strides, and the view fails. Of a tensor in order every view holds. The copy costs nothing in ONNX,
which knows no strides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from foundation.editor import Editor

aten = torch.ops.aten
_RESHAPES = {aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints}
_MOVES = {aten.transpose.int, aten.permute.default, aten.contiguous.default}


def copied_in_order(editor: Editor, node: fx.Node) -> bool:
    """Whether a copy in order was put before a reshape of what attention gives."""
    if node.target not in _RESHAPES:
        return False
    operand: Any = node.args[0]
    source = operand
    while source.target in _MOVES:
        source = source.args[0]
    if source.target is not aten.scaled_dot_product_attention.default:
        return False
    with editor.before(node):
        ordered = editor.call(aten.clone.default, operand, memory_format=torch.contiguous_format)
    editor.replace(operand, ordered, [node])
    return True
