"""chunk or split of a dimension whose size depends on the batch -> slices.

The sizes of the pieces have to be numbers: onnxscript's optimiser (0.7) folds a split and fails ("'NoneType' object has
no attribute 'ndim'"). A slice takes bounds that are computed at run time.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from foundation.editor import Editor, argument

aten = torch.ops.aten


def sliced(editor: Editor, node: fx.Node) -> bool:
    """Whether the pieces of a dimension of no fixed size were made slices."""
    if node.target not in (aten.chunk.default, aten.split.Tensor):
        return False
    source: Any = node.args[0]
    count: Any = node.args[1]  # of a chunk's pieces; for a split their size
    shape = editor.value(source).shape
    dim = argument(node, "dim") % len(shape)
    if isinstance(shape[dim], int) or any(u.target is not operator.getitem for u in node.users):
        return False
    with editor.before(node):
        size = count
        if node.target is aten.chunk.default:  # every piece but the last has ceil(n / count)
            whole = editor.call(aten.sym_size.int, source, dim)
            size = editor.call(operator.floordiv, editor.call(operator.add, whole, count - 1), count)
        for piece in list(node.users):
            at: Any = piece.args[1]
            ends = [editor.call(operator.mul, size, k) if isinstance(size, fx.Node) else size * k for k in (at, at + 1)]
            # The piece keeps its name, which the signature may list among the outputs.
            editor.retarget(piece, aten.slice.Tensor, source, dim, *ends)
    editor.erase(node)
    return True
