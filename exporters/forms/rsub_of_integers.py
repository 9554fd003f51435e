"""fraction − whole numbers (`1.0 - mask`): the whole numbers get their cast first.

aten.rsub.Scalar promotes inside; torch.onnx (torch 2.13) takes it apart into a subtraction of the operands as they are:
"Cannot find a compatible OpOverload for aten.sub with the provided arguments".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from foundation.editor import Editor

aten = torch.ops.aten


def promoted(editor: Editor, node: fx.Node) -> bool:
    """Whether whole numbers that are taken from a fraction were made fractions first, as the operator does inside."""
    if node.target is not aten.rsub.Scalar:
        return False
    source: Any = node.args[0]
    dtype = editor.value(node).dtype
    if editor.value(source).dtype == dtype:
        return False
    with editor.before(node):
        cast = editor.call(aten.to.dtype, source, dtype)
    editor.replace(source, cast, [node])
    return True
