"""Operators that contract their input with a weight: the rows that a regression sees, at positions that are drawn.

A contraction reads an input of shape (batch, ...) and gives, at each position of its output, a product of a weight and
a part of the input. `rows` gives these parts for a few positions of every sample without unfolding the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


@dataclass(frozen=True)
class Contraction:
    """How one node contracts.

    `x`, `weight`, `bias`: the nodes that it reads; `bias` may be None. `groups`: of the weight. `to_matrix` brings a
    weight into the form (groups, outputs, columns), `from_matrix` back. `rows(x, positions)` gives (batch, positions,
    groups, columns) of an input; `targets(y, positions)` gives (batch, positions, groups, outputs) of an output.
    `count`: positions of one sample, given an output. `matrix`: whether the last dimension alone is contracted, so that
    the others are in any order.
    """

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    groups: int
    to_matrix: Callable[[Tensor], Tensor]
    from_matrix: Callable[[Tensor], Tensor]
    rows: Callable[[Tensor, Tensor], Tensor]
    targets: Callable[[Tensor, Tensor], Tensor]
    count: Callable[[Tensor], int]
    matrix: bool = False


def contraction(node: fx.Node, weight: Tensor | None) -> Contraction | None:
    """The contraction that `node` is, None for any other operator; `weight` is the value of its weight."""
    if node.op != "call_function" or weight is None:
        return None
    if node.target is aten.linear.default and weight.dim() == 2:
        return _linear(node, 1, transposed=False)
    if node.target is aten.addmm.default and node.kwargs.get("beta", 1) == node.kwargs.get("alpha", 1) == 1:
        return _linear(node, 2, transposed=True)
    if node.target in (aten.mm.default, aten.matmul.default) and weight.dim() == 2:
        return _linear(node, 1, transposed=True)
    if node.target in _CONVOLUTIONS:
        return _convolution(node, weight)
    if node.target in _TRANSPOSED:
        return _transposed(node, weight)
    return None


def weight_of(node: fx.Node) -> fx.Node | None:
    """The node that a contraction reads its weight from, None for any other operator."""
    if node.op != "call_function":
        return None
    at = 2 if node.target is aten.addmm.default else 1
    known = (*_MATRICES, *_CONVOLUTIONS, *_TRANSPOSED)
    found = node.args[at] if node.target in known and len(node.args) > at else None
    return found if isinstance(found, fx.Node) else None


def whole_channels(kept: Tensor) -> bool:
    """Whether whole rows and columns of a mask (groups, outputs, columns) are gone, and no single weights."""
    return torch.equal(kept, kept.any(2, keepdim=True) & kept.any(1, keepdim=True))


_MATRICES = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default)
_CONVOLUTIONS = (
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
    aten.conv3d.padding,
)  # fmt: skip
_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)


def _argument(node: fx.Node, at: int, name: str, default: Any) -> Any:
    return node.args[at] if len(node.args) > at else node.kwargs.get(name, default)


def _node(value: Any) -> fx.Node | None:
    return value if isinstance(value, fx.Node) else None


# ── matrices ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _linear(node: fx.Node, at: int, *, transposed: bool) -> Contraction | None:
    x, weight = _node(node.args[at - 1]), _node(node.args[at])
    if x is None or weight is None:
        return None
    bias = _node(node.args[0]) if at == 2 else _node(_argument(node, 2, "bias", None)) if not transposed else None

    def turn(value: Tensor) -> Tensor:
        return value.mT.unsqueeze(0) if transposed else value.unsqueeze(0)

    def drawn(value: Tensor, positions: Tensor) -> Tensor:
        flat = value.reshape(len(value), -1, value.shape[-1])
        return flat[:, positions].unsqueeze(2)

    return Contraction(
        x=x,
        weight=weight,
        bias=bias,
        groups=1,
        to_matrix=turn,
        from_matrix=lambda value: value[0].mT.contiguous() if transposed else value[0],
        rows=drawn,
        targets=drawn,
        count=lambda y: y[0].numel() // y.shape[-1],
        matrix=True,
    )


# ── convolutions ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _each(value: Any, dims: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dims
    values = tuple(int(v) for v in value)
    return values * dims if len(values) == 1 else values


def _convolution(node: fx.Node, weight: Tensor) -> Contraction | None:
    dims = weight.dim() - 2
    x, held = _node(node.args[0]), _node(node.args[1])
    if x is None or held is None:
        return None
    stride = _each(_argument(node, 3, "stride", 1), dims)
    padding = _argument(node, 4, "padding", 0)
    dilation = _each(_argument(node, 5, "dilation", 1), dims)
    groups = int(_argument(node, 6, "groups", 1))
    kernel = tuple(weight.shape[2:])
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        pads = [(t // 2, t - t // 2) for t in total]
    else:
        pads = [(p, p) for p in _each(padding, dims)]
    outputs, columns = weight.shape[0] // groups, weight[0].numel()

    def rows(value: Tensor, positions: Tensor) -> Tensor:
        return _patches(value, positions, kernel, stride, dilation, pads, groups)

    return Contraction(
        x=x,
        weight=held,
        bias=_node(_argument(node, 2, "bias", None)),
        groups=groups,
        to_matrix=lambda value: value.reshape(groups, outputs, columns),
        from_matrix=lambda value: value.reshape(weight.shape),
        rows=rows,
        targets=lambda y, positions: _at(y, positions, groups),
        count=lambda y: y[0, 0].numel(),
    )


def _transposed(node: fx.Node, weight: Tensor) -> Contraction | None:
    """A transposed convolution is a convolution of stride 1 over an input with zeros between, its kernel reversed."""
    dims = weight.dim() - 2
    x, held = _node(node.args[0]), _node(node.args[1])
    if x is None or held is None:
        return None
    stride = _each(_argument(node, 3, "stride", 1), dims)
    padding = _each(_argument(node, 4, "padding", 0), dims)
    extra = _each(_argument(node, 5, "output_padding", 0), dims)
    groups = int(_argument(node, 6, "groups", 1))
    dilation = _each(_argument(node, 7, "dilation", 1), dims)
    kernel = tuple(weight.shape[2:])
    inputs, outputs = weight.shape[0] // groups, weight.shape[1]
    size = torch.Size(kernel).numel()
    spatial = list(range(3, 3 + dims))
    pads = [(d * (k - 1) - p, d * (k - 1) - p + e) for d, k, p, e in zip(dilation, kernel, padding, extra, strict=True)]

    def to_matrix(value: Tensor) -> Tensor:
        parts = value.reshape(groups, inputs, outputs, *kernel).flip(spatial)
        return parts.transpose(1, 2).reshape(groups, outputs, inputs * size)

    def from_matrix(value: Tensor) -> Tensor:
        parts = value.reshape(groups, outputs, inputs, *kernel).transpose(1, 2).flip(spatial)
        return parts.reshape(weight.shape).contiguous()

    def rows(value: Tensor, positions: Tensor) -> Tensor:
        spread = value.new_zeros(
            *value.shape[:2], *((n - 1) * s + 1 for n, s in zip(value.shape[2:], stride, strict=True))
        )
        spread[(slice(None), slice(None), *(slice(None, None, s) for s in stride))] = value
        return _patches(spread, positions, kernel, (1,) * dims, dilation, pads, groups)

    return Contraction(
        x=x,
        weight=held,
        bias=_node(_argument(node, 2, "bias", None)),
        groups=groups,
        to_matrix=to_matrix,
        from_matrix=from_matrix,
        rows=rows,
        targets=lambda y, positions: _at(y, positions, groups),
        count=lambda y: y[0, 0].numel(),
    )


def _at(y: Tensor, positions: Tensor, groups: int) -> Tensor:
    """(batch, positions, groups, channels of a group) of an output (batch, channels, ...)."""
    return y.flatten(2)[:, :, positions].movedim(2, 1).reshape(len(y), len(positions), groups, -1)


def _patches(
    x: Tensor,
    positions: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    pads: Sequence[tuple[int, int]],
    groups: int,
) -> Tensor:
    """(batch, positions, groups, channels of a group · kernel): what the kernel covers at flat output `positions`."""
    flat_pads = [p for pair in reversed(pads) for p in pair]
    padded = torch.nn.functional.pad(x, flat_pads) if any(flat_pads) else x
    out = [
        (n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(padded.shape[2:], kernel, stride, dilation, strict=True)
    ]
    sizes, places = list(padded.shape[2:]), []
    rest = positions
    for n in reversed(out):
        places.append(rest % n)
        rest = rest // n
    places.reverse()
    flat = torch.zeros(len(positions), 1, dtype=torch.long)
    offsets = list(itertools.product(*(range(k) for k in kernel)))
    for axis, (size, s, d) in enumerate(zip(sizes, stride, dilation, strict=True)):
        offset = torch.tensor([o[axis] * d for o in offsets])
        flat = flat * size + (places[axis] * s).unsqueeze(1) + offset.unsqueeze(0)
    taken = padded.flatten(2)[:, :, flat]  # batch, channels, positions, kernel
    batch, channels, count, size = taken.shape
    parts = taken.reshape(batch, groups, channels // groups, count, size)
    return parts.permute(0, 3, 1, 2, 4).reshape(batch, count, groups, channels // groups * size)
