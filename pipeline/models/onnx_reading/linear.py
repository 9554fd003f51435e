"""Products of matrices, and the operators with weights: convolutions, attention, recurrent layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.onnx_reading.node import Node
from pipeline.models.onnx_reading.shaping import padded
from pipeline.models.onnx_reading.values import Given, Value, tensor

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _linear(_node: Node, x: Value, weight: Tensor, bias: Given = None) -> Tensor:
    """`weights` made it of Gemm, or of MatMul and the Add after it; the weight is (outputs, inputs)."""
    return F.linear(tensor(x), weight, None if bias is None else tensor(bias))


def _matmul(_node: Node, a: Value, b: Value) -> Tensor:
    return torch.matmul(tensor(a), tensor(b))


def _gemm(node: Node, a: Value, b: Value, c: Given = None) -> Tensor:
    x, y = tensor(a), tensor(b)
    made = torch.matmul(x.t() if node.get("transA", 0) else x, y.t() if node.get("transB", 0) else y)
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    made = made if alpha == 1.0 else made * alpha
    if c is None or beta == 0.0:
        return made
    return made + (tensor(c) if beta == 1.0 else tensor(c) * beta)


def _einsum(node: Node, *values: Value) -> Tensor:
    return torch.einsum(node.get("equation").replace(" ", ""), *[tensor(one) for one in values])


def window_ends(
    node: Node, x: Tensor, kernel: list[int], strides: list[int], dilations: list[int]
) -> list[tuple[int, int]]:
    """What is added before and after each spatial axis, by `pads` or `auto_pad`."""
    auto = node.get("auto_pad", "NOTSET")
    if auto == "VALID":
        return [(0, 0)] * len(kernel)
    if auto == "NOTSET":
        pads = node.get("pads", [0] * 2 * len(kernel))
        return list(zip(pads[: len(kernel)], pads[len(kernel) :], strict=True))
    ends = []
    for size, width, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (width - 1) * dilation + 1 - size, 0)
        ends.append((total // 2, total - total // 2) if auto == "SAME_UPPER" else (total - total // 2, total // 2))
    return ends


def _steps(node: Node, x: Tensor, forms: Mapping[int, object]) -> tuple[int, list[int], list[int]]:
    """Spatial axes, strides and dilations of a convolution that has one of these `forms` by the number of axes."""
    spatial = x.ndim - 2
    if spatial not in forms:
        node.refuse(f"a convolution over {spatial} axes is not read")
    return spatial, node.get("strides", [1] * spatial), node.get("dilations", [1] * spatial)


def _conv(node: Node, x: Value, weight: Value, bias: Given = None) -> Tensor:
    x, weight = tensor(x), tensor(weight)
    spatial, strides, dilations = _steps(node, x, _CONVOLUTIONS)
    ends = window_ends(node, x, list(weight.shape[2:]), strides, dilations)
    padding = [before for before, _ in ends]
    if any(before != after or before < 0 for before, after in ends):
        x, padding = padded(node, x, [(0, 0), (0, 0), *ends]), [0] * spatial
    offset = None if bias is None else tensor(bias)
    return _CONVOLUTIONS[spatial](x, weight, offset, strides, padding, dilations, node.get("group", 1))


def _conv_transpose(node: Node, x: Value, weight: Value, bias: Given = None) -> Tensor:
    x, weight = tensor(x), tensor(weight)
    spatial, strides, dilations = _steps(node, x, _TRANSPOSED)
    extra = node.get("output_padding", [0] * spatial)
    kernel = list(weight.shape[2:])
    full = [
        stride * (size - 1) + more + (width - 1) * dilation + 1
        for stride, size, more, width, dilation in zip(strides, x.shape[2:], extra, kernel, dilations, strict=True)
    ]
    auto, wanted = node.get("auto_pad", "NOTSET"), node.get("output_shape")
    if wanted is not None or auto in ("SAME_UPPER", "SAME_LOWER"):
        target = wanted[-spatial:] if wanted is not None else [s * n for s, n in zip(strides, x.shape[2:], strict=True)]
        totals = [size - one for size, one in zip(full, target, strict=True)]
        upper = auto == "SAME_UPPER"
        ends = [(one // 2, one - one // 2) if upper else (one - one // 2, one // 2) for one in totals]
    else:
        ends = window_ends(node, x, kernel, strides, dilations)
    offset = None if bias is None else tensor(bias)
    form, group = _TRANSPOSED[spatial], node.get("group", 1)
    if all(before == after >= 0 for before, after in ends) and all(
        more < max(stride, dilation) for more, stride, dilation in zip(extra, strides, dilations, strict=True)
    ):
        return form(x, weight, offset, strides, [before for before, _ in ends], extra, group, dilations)
    whole = form(x, weight, offset, strides, [0] * spatial, extra, group, dilations)
    return padded(node, whole, [(0, 0), (0, 0), *((-before, -after) for before, after in ends)])


def _attention(
    node: Node,
    q: Value,
    k: Value,
    v: Value,
    mask: Given = None,
    past_k: Given = None,
    past_v: Given = None,
    *more: Given,
) -> Tensor:
    """ONNX's Attention, in three or four dimensions. Keys of earlier tokens are not read."""
    if past_k is not None or past_v is not None or any(one is not None for one in more):
        node.refuse("keys and values of earlier tokens are not read")
    if node.get("softcap", 0.0) or any(node.outputs[1:]):
        node.refuse("its soft cap or its further outputs are not read")
    query, key, value = tensor(q), tensor(k), tensor(v)
    flat = query.ndim == 3
    heads, shared = node.get("q_num_heads"), node.get("kv_num_heads")
    if flat:
        if not heads or not shared:
            node.refuse("it does not say how many heads it has")
        query = torch.unflatten(query, 2, (heads, -1)).transpose(1, 2)
        key, value = (torch.unflatten(one, 2, (shared, -1)).transpose(1, 2) for one in (key, value))
    held = None if mask is None else tensor(mask)
    causal = bool(node.get("is_causal", 0))
    if causal and held is not None:
        node.refuse("a mask beside a causal one is not read")
    grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    made = F.scaled_dot_product_attention(query, key, value, held, 0.0, causal, scale=node.get("scale"), **grouped)
    return made.transpose(1, 2).flatten(2) if flat else made


def _recurrent(node: Node, x: Value, *values: Value) -> tuple[Tensor, ...]:
    """`weights` laid the weights out as torch's; before them come the initial states."""
    x = tensor(x)
    both, reverse = node.get("direction") == "bidirectional", node.get("direction") == "reverse"
    ways, hidden, count = 2 if both else 1, node.get("hidden_size"), 2 if node.operator == "lstm" else 1
    states = [x.new_zeros(ways, x.shape[1], hidden) if one is None else tensor(one) for one in values[:count]]
    weights = [tensor(one) for one in values[count:]]
    x = torch.flip(x, [0]) if reverse else x
    biased = len(weights) == 4 * ways
    settings = (weights, biased, 1, 0.0, False, both, False)
    if node.operator == "lstm":
        out, *last = torch.lstm(x, states, *settings)
    else:
        form = {"gru": torch.gru, "rnn_tanh": torch.rnn_tanh, "rnn_relu": torch.rnn_relu}[node.operator]
        out, *last = form(x, states[0], *settings)
    out = torch.flip(out, [0]) if reverse else out
    if both:
        return torch.unflatten(out, 2, (2, hidden)).transpose(1, 2), *last
    return out.unsqueeze(1), *last


def _embedding(_node: Node, table: Tensor, rows: Value) -> Tensor:
    return F.embedding(tensor(rows), table)


def _grid_sample(node: Node, x: Value, grid: Value) -> Tensor:
    names = {
        "linear": "bilinear",
        "bilinear": "bilinear",
        "nearest": "nearest",
        "cubic": "bicubic",
        "bicubic": "bicubic",
    }
    mode = names.get(node.get("mode", "linear"))
    if mode is None:
        node.refuse("its mode is not read")
    return F.grid_sample(
        tensor(x), tensor(grid), mode, node.get("padding_mode", "zeros"), bool(node.get("align_corners", 0))
    )


TABLE: Mapping[str, Callable[..., Any]] = {
    "linear": _linear,
    "embedding": _embedding,
    "lstm": _recurrent,
    "gru": _recurrent,
    "rnn_tanh": _recurrent,
    "rnn_relu": _recurrent,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Einsum": _einsum,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Attention": _attention,
    "GridSample": _grid_sample,
}
