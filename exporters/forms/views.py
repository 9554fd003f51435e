"""view -> reshape.

A view holds by the strides that a kernel happened to choose when the model was captured. torch.onnx (torch 2.13) works
shapes out with other kernels (decompositions), whose strides may differ: "view size is not compatible with input
tensor's size and stride". In ONNX both are Reshape.
"""

from __future__ import annotations

from torch import fx

from foundation.editor import Editor


def reshaped(editor: Editor, node: fx.Node) -> bool:
    """Whether a view was made a reshape."""
    return editor.reshape(node)
