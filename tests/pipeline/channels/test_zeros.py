"""Zeros read off the bits, and products that leave them out, against the plain way."""

import pytest
import torch
from torch import fx, nn

from pipeline.channels.operators.table import find
from pipeline.channels.program import zeros
from pipeline.channels.program.zeros import masked, without_zeros, zero_slices

aten = torch.ops.aten


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
)
@pytest.mark.parametrize("shape", [(5,), (5, 4), (3, 4, 5), (2, 3, 2, 4)], ids=str)
def test_zero_slices_are_those_whose_elements_are_all_zero(dtype, shape):
    x = (torch.randn(shape) * 3).to(dtype)
    for dim in range(len(shape)):
        gone = x.clone().index_fill_(dim, torch.tensor([1]), 0)
        want = [not bool(gone.select(dim, k).any()) for k in range(shape[dim])]
        assert zero_slices(gone, dim).tolist() == want
        assert zero_slices(gone.transpose(0, -1), -1 - dim if dim in (0, len(shape) - 1) else dim).tolist() == want


def test_minus_zero_is_zero_and_nan_is_not():
    x = torch.tensor([[-0.0, 0.0], [float("nan"), 0.0], [0.0, 1e-45], [0.0, -1e-45]])
    assert zero_slices(x, 0).tolist() == [True, False, False, False]


def test_slices_of_nothing_are_zero():
    assert zero_slices(torch.zeros(3, 0), 0).tolist() == [True] * 3


def test_a_mask_takes_what_is_not_a_number_too():
    x = torch.tensor([1.5, float("nan"), float("inf"), -2.0])
    assert masked(x, torch.tensor([True, False, False, True]).numpy()).tolist() == [1.5, 0.0, 0.0, -2.0]
    assert masked(x.half(), torch.tensor([False, False, False, True]).numpy()).dtype == torch.float16


def call(target, *args):
    """A node of `target` over placeholders, and the values it is given."""
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{k}") if isinstance(a, torch.Tensor) else a for k, a in enumerate(args)]
    return graph.call_function(target, tuple(nodes)), args


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("target", "x", "weight", "rest"),
    [
        (aten.linear.default, (3, 7, 512), (640, 512), ()),
        (aten.conv1d.default, (2, 256, 9), (192, 256, 3), ([2], [1])),
        (aten.conv2d.default, (2, 128, 6, 5), (160, 128, 3, 3), ([1, 2], [1, 1], [1, 1], 1)),
        (aten.conv2d.padding, (2, 128, 6, 5), (160, 128, 3, 3), ([1, 1], "same", [1, 1], 1)),
        (aten.conv3d.default, (1, 128, 3, 4, 4), (64, 128, 3, 3, 3), ()),
    ],
    ids=["linear", "conv1d", "conv2d", "same", "conv3d"],
)
def test_the_same_values_without_the_zeros(target, x, weight, rest, bias, monkeypatch):
    w = torch.randn(weight).index_fill_(0, torch.arange(0, weight[0], 2), 0).index_fill_(1, torch.arange(0, 64), 0)
    args = (torch.randn(x), w, torch.randn(weight[0]) if bias else None, *rest)
    node, args = call(target, *args)
    looked = []
    node.target = lambda a, b, *more: looked.append(b.numel()) or target(a, b, *more)
    node.target._schema = target._schema
    monkeypatch.setattr(zeros, "find", lambda _: find(target))
    got, want = without_zeros(node, args, {}), target(*args)
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)
    assert looked[0] < 0.5 * w.numel()
    zero = zero_slices(want, -1 if target is aten.linear.default else 1)
    assert zero.any() != bias
    assert (zero_slices(got, -1 if target is aten.linear.default else 1) == zero).all()


def test_grouped_full_and_empty_weights_are_taken_as_they_are():
    grouped = torch.randn(256, 64, 3, 3).index_fill_(0, torch.arange(200), 0)
    x = torch.randn(1, 256, 4, 4)
    node, args = call(aten.conv2d.default, x, grouped, None, [1, 1], [0, 0], [1, 1], 4)
    assert torch.equal(without_zeros(node, args, {}), aten.conv2d.default(*args))
    layer = nn.Linear(512, 512)
    for weight in (layer.weight.detach(), torch.zeros(512, 512)):
        node, args = call(aten.linear.default, torch.randn(4, 512), weight, layer.bias.detach())
        assert torch.equal(without_zeros(node, args, {}), aten.linear.default(*args))
