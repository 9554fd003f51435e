"""pad with zeros -> max pooling: the zeros become negative zeros.

onnxruntime's Pad_Fusion (1.31) makes zeros the pooling's own padding, which is minus infinity there: where all else is
below zero, the border changes. It knows zeros by their bytes (`onnxruntime/core/optimizer/pad_fusion.cc`), and -0.0,
which is equal to 0.0, has others.
"""

from __future__ import annotations

import torch
from torch import fx

from foundation.editor import Editor, argument

aten = torch.ops.aten


def kept_from_fusion(editor: Editor, node: fx.Node) -> bool:
    """Whether zeros put around what a max pooling reads became negative zeros."""
    if node.target not in (aten.pad.default, aten.constant_pad_nd.default):
        return False
    if not any("max_pool" in str(user.target) for user in node.users):
        return False
    if (node.target is aten.pad.default and argument(node, "mode") != "constant") or argument(node, "value"):
        return False
    editor.retarget(node, aten.constant_pad_nd.default, *node.args[:2], -0.0)
    return True
