"""complex numbers picked or written by place, their dimensions put in or dropped, zeros -> the same on pairs.

torch.onnx (torch 2.13) has no translation for complex operands: "slice_scatter does not support automatic
differentiation for outputs with complex dtype".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from foundation.editor import Editor

aten = torch.ops.aten
_WRITTEN = {aten.slice_scatter.default, aten.select_scatter.default, aten.copy.default}
_PICKED = {aten.select.int, aten.index_select.default, aten.unsqueeze.default, aten.squeeze.dim}
_FILLED = {aten.zeros.default, aten.new_zeros.default}


def on_pairs(editor: Editor, node: fx.Node) -> bool:
    """Whether an operator on complex numbers was put on pairs (real, imaginary) in a last dimension."""
    if node.target not in _WRITTEN | _PICKED | _FILLED or not editor.value(node).dtype.is_complex:
        return False
    if node.target in _WRITTEN and not editor.value(node.args[1]).dtype.is_complex:  # type: ignore[arg-type]
        return False
    rank = editor.value(node).dim()
    with editor.before(node):
        if node.target in _WRITTEN:
            x, part, *rest = node.args
            pairs = [editor.call(aten.view_as_real.default, n) for n in (x, part)]
            if node.target is not aten.copy.default:
                dim: Any = rest[0] if rest else 0
                rest = [dim % rank, *rest[1:]]
            made = editor.call(node.target, *pairs, *rest)
        elif node.target in _PICKED:
            source: Any = node.args[0]
            at: Any = node.args[1]
            pairs = [editor.call(aten.view_as_real.default, source)]
            places = editor.value(source).dim() + (node.target is aten.unsqueeze.default)
            made = editor.call(node.target, *pairs, at % places, *node.args[2:])
        else:
            sizes: Any = node.args[-1]
            real = torch.zeros((), dtype=editor.value(node).dtype).real.dtype
            made = editor.call(aten.zeros.default, [*sizes, 2], dtype=real)
        editor.retarget(node, aten.view_as_complex.default, made)
    return True
