"""einsum and matrix products of complex numbers -> four of real ones.

torch.onnx (torch 2.13) has neither: "No ONNX function found for aten.einsum ... complex-valued input".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from foundation.editor import Editor

aten = torch.ops.aten
_PRODUCTS = {aten.matmul.default, aten.mm.default, aten.bmm.default}


def of_real_numbers(editor: Editor, node: fx.Node) -> bool:
    """Whether a product of two complex tensors was written as products of their real and imaginary parts."""
    operands: Any
    product: Callable[[Any, Any], fx.Node]
    if node.target is aten.einsum.default:
        operands = node.args[1]
        product = lambda a, b: editor.call(node.target, node.args[0], [a, b])  # type: ignore[arg-type]  # noqa: E731
    elif node.target in _PRODUCTS:
        operands = node.args[:2]
        product = lambda a, b: editor.call(node.target, a, b)  # type: ignore[arg-type]  # noqa: E731
    else:
        return False
    if len(operands) != 2 or not all(editor.value(n).dtype.is_complex for n in operands):
        return False
    with editor.before(node):
        (a, b), (c, d) = ([editor.call(part, n) for part in (aten.real.default, aten.imag.default)] for n in operands)
        real = editor.call(aten.sub.Tensor, product(a, c), product(b, d))
        imaginary = editor.call(aten.add.Tensor, product(a, d), product(b, c))
        editor.retarget(node, aten.complex.default, real, imaginary)
    return True
