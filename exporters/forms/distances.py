"""cdist -> differences and their norm, or one product of matrices where torch itself takes one.

torch.onnx (torch 2.13) has no translation: "No ONNX function found for aten._cdist_forward".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from foundation.editor import Editor, argument

aten = torch.ops.aten
_BY_PRODUCT_ABOVE = 25
"""So many vectors on one side, and torch takes the Euclidean distance from a product of matrices."""


def written_out(editor: Editor, node: fx.Node) -> bool:
    """Whether distances between all pairs of two sets of vectors were written out."""
    if node.target is not aten.cdist.default:
        return False
    a, b = node.args[:2]
    power: Any = argument(node, "p")
    mode = argument(node, "compute_mode")
    counts = [editor.value(n).shape[-2] for n in (a, b)]  # type: ignore[arg-type]
    many = any(isinstance(n, int) and n > _BY_PRODUCT_ABOVE for n in counts)
    with editor.before(node):
        if power == 2 and (mode == 1 or (mode != 2 and many)):  # 1: always by a product, 2: never
            squares = [
                editor.call(aten.sum.dim_IntList, editor.call(aten.mul.Tensor, n, n), [-1], True) for n in (a, b)
            ]
            both = editor.call(aten.add.Tensor, squares[0], editor.call(aten.transpose.int, squares[1], -2, -1))
            product = editor.call(aten.matmul.default, a, editor.call(aten.transpose.int, b, -2, -1))
            left = editor.call(aten.sub.Tensor, both, editor.call(aten.mul.Tensor, product, 2.0))
            found = editor.call(aten.clamp_min.default, left, 0.0)
            editor.retarget(node, aten.sqrt.default, found)
        else:
            rows, columns = editor.call(aten.unsqueeze.default, a, -2), editor.call(aten.unsqueeze.default, b, -3)
            difference = editor.call(aten.sub.Tensor, rows, columns)
            editor.retarget(node, aten.linalg_vector_norm.default, difference, power, [-1])
    return True
