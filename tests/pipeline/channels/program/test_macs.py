"""Multiply-accumulates against PyTorch's own counter, which counts each as two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.channels import capture, count_macs
from pipeline.channels.operators import CARDS
from pipeline.channels.program.macs import node_macs

aten = torch.ops.aten


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


COUNTED: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.linear.default, (r(2, 3, 4), r(5, 4), r(5))),
    (aten.conv1d.default, (r(2, 4, 9), r(6, 4, 3), None, [2])),
    (aten.conv2d.default, (r(2, 4, 7, 6), r(6, 2, 3, 3), r(6), [2, 1], [1, 1], [1, 1], 2)),
    (aten.conv3d.default, (r(1, 2, 5, 5, 5), r(3, 2, 2, 2, 2))),
    (aten.conv_transpose2d.input, (r(2, 4, 5, 5), r(4, 3, 3, 3), None, [2, 2], [0, 0], [0, 0], 2)),
    (aten.matmul.default, (r(2, 3, 4), r(2, 4, 5))),
    (aten.mm.default, (r(3, 4), r(4, 5))),
    (aten.bmm.default, (r(2, 3, 4), r(2, 4, 5))),
    (aten.addmm.default, (r(5), r(3, 4), r(4, 5))),
    (aten.baddbmm.default, (r(2, 3, 5), r(2, 3, 4), r(2, 4, 5))),
    (aten.einsum.default, ("bic,oc->bio", [r(2, 3, 4), r(5, 4)])),
]
BY_HAND: list[tuple[Any, tuple[Any, ...], int]] = [
    (aten.addbmm.default, (r(3, 5), r(2, 3, 4), r(2, 4, 5)), 2 * 3 * 4 * 5),
    (aten.addmv.default, (r(3), r(3, 4), r(4)), 3 * 4),
    (aten.mv.default, (r(3, 4), r(4)), 3 * 4),
    (aten.dot.default, (r(4), r(4)), 4),
    (aten.bilinear.default, (r(2, 4), r(2, 3), r(5, 4, 3)), 2 * 5 * 4 * 3),
    (aten.scaled_dot_product_attention.default, (r(1, 2, 3, 4), r(1, 2, 5, 4), r(1, 2, 5, 4)), 2 * 3 * 5 * (4 + 4)),
    (aten.cdist.default, (r(2, 3, 4), r(5, 4)), 2 * 3 * 5 * 4),
    (aten.relu.default, (r(2, 4),), 0),
    (aten.layer_norm.default, (r(2, 4), [4]), 0),
]


def counted(target: Any, args: tuple[Any, ...]) -> int:
    graph, values = fx.Graph(), {}

    def operand(a: Any) -> Any:
        if isinstance(a, list) and a and isinstance(a[0], torch.Tensor):
            return [operand(v) for v in a]
        if not isinstance(a, torch.Tensor):
            return a
        node = graph.placeholder("x")
        values[node] = a
        return node

    node = graph.call_function(target, tuple(map(operand, args)))
    values[node] = target(*args)
    return node_macs(node, lambda n: tuple(values[n].shape))


@pytest.mark.parametrize(("target", "args"), COUNTED, ids=[str(t) for t, _ in COUNTED])
def test_as_many_as_pytorch_counts(target: Any, args: tuple[Any, ...]) -> None:
    with FlopCounterMode(display=False) as counter:
        target(*args)
    want = counter.get_total_flops() / 2
    assert counted(target, args) == want


@pytest.mark.parametrize(("target", "args", "want"), BY_HAND, ids=[str(t) for t, *_ in BY_HAND])
def test_as_many_as_by_hand(target: Any, args: tuple[Any, ...], want: int) -> None:
    assert counted(target, args) == want


def test_a_recurrent_layer_multiplies_every_matrix_at_every_step() -> None:
    captured = capture(nn.LSTM(4, 3, batch_first=True, bidirectional=True), (r(2, 7, 4),), dynamic_batch=False)
    assert count_macs(captured.program) == 7 * 2 * 4 * 3 * (4 + 3)


def test_every_count_is_tried_above() -> None:
    tried = {t._schema.name.split("::")[1] for t, *_ in (*COUNTED, *BY_HAND)} | {"lstm"}
    assert {c.macs for c in CARDS.values()} == {CARDS[n].macs for n in tried if n in CARDS} | {None}
