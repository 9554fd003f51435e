"""attention over [batch, *between, tokens, positions] -> over [batch, heads, tokens, positions].

torch.onnx (torch 2.13): "only 4D query, key, and value are supported". What lies between the batch and the tokens is
merged into one dimension and taken apart again behind; where nothing lies there, one head is put in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from foundation.editor import Editor, argument

aten = torch.ops.aten


def in_four_dimensions(editor: Editor, node: fx.Node) -> bool:
    """Whether attention of another rank was put on four dimensions; it stays where its operands are broadcast."""
    if node.target is not aten.scaled_dot_product_attention.default:
        return False
    operands: list[Any] = list(node.args[:3])
    mask: Any = argument(node, "attn_mask")
    shapes = [editor.value(n).shape for n in operands]
    rank = len(shapes[0])
    between = shapes[0][1:-2]
    if rank in (2, 4) or node.kwargs.get("enable_gqa") or not _alike([shape[:-2] for shape in shapes]):
        return False
    if not all(isinstance(n, int) for n in between):
        return False
    wide_mask = isinstance(mask, fx.Node) and len(editor.value(mask).shape) > 2
    if wide_mask and not _alike([shapes[0][:-2], editor.value(mask).shape[:-2]]):
        return False

    def merged(source: fx.Node) -> fx.Node:
        if rank == 3:
            return editor.call(aten.unsqueeze.default, source, 1)
        return editor.call(aten.flatten.using_ints, source, 1, rank - 3)

    with editor.before(node):
        operands = [merged(n) for n in operands]
        if wide_mask:
            mask = merged(mask)
        options = {k: v for k, v in node.kwargs.items() if k != "attn_mask"}
        attended = editor.call(node.target, *operands, mask, *node.args[4:], **options)
    # The node keeps its name, which the signature may list among the outputs.
    if rank == 3:
        editor.retarget(node, aten.squeeze.dim, attended, 1)
    else:
        editor.retarget(node, aten.unflatten.int, attended, 1, list(between))
    return True


def _alike(shapes: list[Any]) -> bool:
    """Whether sizes are equal one by one; symbolic ones only where they are the same expression."""
    plain = [tuple(s if isinstance(s, int) else s.node.expr for s in shape) for shape in shapes]
    return all(p == plain[0] for p in plain)
