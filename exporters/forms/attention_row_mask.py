"""attention with a mask of one row for all queries: the row is written out for each.

torch broadcasts it; onnxruntime's Attention (1.31) fails at run time on a mask of [..., 1, keys].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from foundation.editor import Editor, argument

aten = torch.ops.aten


def row_for_every_query(editor: Editor, node: fx.Node) -> bool:
    """Whether a mask of one row for all queries was written out for each of them."""
    if node.target is not aten.scaled_dot_product_attention.default:
        return False
    query: Any = node.args[0]
    queries = editor.value(query).shape[-2]
    mask: Any = argument(node, "attn_mask")
    if not isinstance(mask, fx.Node) or (isinstance(queries, int) and queries == 1):
        return False
    shape = editor.value(mask).shape
    rows = shape[-2] if len(shape) > 1 else 0  # of one dimension: broadcast in full
    if not isinstance(rows, int) or rows != 1:
        return False
    with editor.before(node):
        if not isinstance(queries, int):  # as many as there are at run time
            queries = editor.call(aten.sym_size.int, query, len(editor.value(query).shape) - 2)
        each = editor.call(aten.expand.default, mask, [*[-1] * (len(shape) - 2), queries, -1])
    editor.replace(mask, each, [node])
    return True
