"""Forms that torch.onnx does not take are brought into ones that it does, without a change of the function."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim, export
from torch.nn import functional as F

from exporters import to_onnx
from exporters.translatable import translatable


class Attend(nn.Module):
    """Attention over [batch, *between, tokens, positions]."""

    def __init__(self, masked=False):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.masked = masked

    def forward(self, q, k, v):
        mask = torch.where(q[..., :1] > 0, 0.5, -0.5) * k[..., 0].unsqueeze(-2) if self.masked else None
        return F.scaled_dot_product_attention(q * self.scale, k, v, attn_mask=mask)


class Viewed(nn.Module):
    """A view that holds only by the layout that one kernel of attention writes."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(12, 36)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        mask = (x.sum(-1) > 0)[:, None, None] | torch.eye(6, dtype=torch.bool)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).view(-1, 6, 12)


class Pairs(nn.Module):
    """Two frames go through one layer as one batch, and are taken apart again: sizes that depend on the batch."""

    def __init__(self, split):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.split = split

    def forward(self, a, b):
        both = self.fc(torch.cat([a, b]))
        first, second = both.split(a.shape[0]) if self.split else both.chunk(2)
        return torch.relu(first) - second


class PaddedPool(nn.Module):
    """Zeros around a max pooling of numbers below zero: its own padding would be minus infinity."""

    def __init__(self, pad):
        super().__init__()
        self.conv, self.pad = nn.Conv2d(2, 2, 1), pad

    def forward(self, x):
        return F.max_pool2d(self.pad(-torch.exp(self.conv(x))), 3, stride=2)


class Inverted(nn.Module):
    """A mask of whole numbers taken from one, as encoders do."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return self.fc(x) + (1.0 - (x > 0).long()) * -3.5


class MaskedKeys(nn.Module):
    """One mask of keys for all queries."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(12, 36)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(x[..., 0] > -1)[:, None, None])


class Routed(nn.Module):
    """Samples are sent to one of two layers: how many go where is read off the data."""

    def __init__(self):
        super().__init__()
        self.low, self.high = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        few = (x[:, 0] > 0).sum().item()
        torch._check(few >= 0)
        torch._check(few <= x.shape[0])
        low, high = torch.split(x, [few, x.shape[0] - few])
        return torch.cat([self.low(low), self.high(high)])


def exported(net, *inputs):
    torch.manual_seed(0)
    return export(net.eval(), inputs, dynamic_shapes=tuple({0: Dim.DYNAMIC} for _ in inputs))


def check(program, inputs, path, opset=18):
    """onnxruntime gives the same for other batches."""
    names = [str(name) for name in program.graph_signature.user_inputs]
    to_onnx(program, path, example=(), opset=opset, metadata={}, input_names=names)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    want = program.module()(*inputs).detach().numpy()
    got = session.run(None, dict(zip(names, [x.numpy() for x in inputs], strict=True)))[0]
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("between", [(), (3, 2), (2, 3, 2)], ids=str)
def test_attention_of_any_rank(between, masked, tmp_path):
    draw = [torch.randn(4, *between, 5, 8) for _ in range(3)]
    program = exported(Attend(masked), *draw)
    check(program, [x[:3] for x in draw], tmp_path / "model.onnx")
    inner = translatable(program)
    assert inner is not program
    torch.testing.assert_close(inner.module()(*draw), program.module()(*draw))


@pytest.mark.parametrize("split", [False, True], ids=["chunk", "split"])
def test_pieces_of_a_dimension_that_depends_on_the_batch(split, tmp_path):
    program = exported(Pairs(split), torch.randn(4, 6), torch.randn(4, 6))
    check(program, (torch.randn(3, 6), torch.randn(3, 6)), tmp_path / "pairs.onnx")


def test_sizes_read_off_data_can_be_translated_again(tmp_path):
    program = exported(Routed(), torch.randn(4, 6))
    for opset in (18, 20):
        check(program, (torch.randn(3, 6),), tmp_path / "routed.onnx", opset)


@pytest.mark.parametrize(
    "pad", [nn.ZeroPad2d(1), nn.ConstantPad2d(1, 0.0), lambda x: F.pad(x, (1, 1, 1, 1))], ids=["zero", "value", "plain"]
)
def test_zeros_around_a_max_pooling_stay_zeros(pad, tmp_path):
    program = exported(PaddedPool(pad), torch.randn(4, 2, 8, 8))
    check(program, (torch.randn(3, 2, 8, 8),), tmp_path / "pool.onnx")


def test_whole_numbers_taken_from_a_fraction(tmp_path):
    program = exported(Inverted(), torch.randn(4, 6))
    check(program, (torch.randn(3, 6),), tmp_path / "inverted.onnx")


@pytest.mark.parametrize("opset", [20, 23])
def test_one_mask_of_keys_for_all_queries(opset, tmp_path):
    program = exported(MaskedKeys(), torch.randn(4, 6, 12))
    check(program, (torch.randn(3, 6, 12),), tmp_path / "masked.onnx", opset)


def test_one_head_of_keys_and_values_for_all(tmp_path):
    draw = [torch.randn(4, heads, 5, 8) for heads in (3, 1, 1)]
    program = exported(Attend(), *draw)
    check(program, [x[:3] for x in draw], tmp_path / "model.onnx", opset=23)


def test_four_dimensions_stay_as_they_are():
    program = exported(Attend(), *[torch.randn(4, 3, 5, 8) for _ in range(3)])
    assert translatable(program) is program


def test_a_view_that_holds_by_its_strides(tmp_path):
    x = torch.randn(4, 6, 12)
    program = exported(Viewed(), x)
    check(program, [x[:3]], tmp_path / "model.onnx")
    kinds = [[n.target for n in one.graph.nodes] for one in (program, translatable(program))]
    assert [torch.ops.aten.view.default in nodes for nodes in kinds] == [True, False]
    assert [torch.ops.aten.clone.default in nodes for nodes in kinds] == [False, True]


class Builtin(nn.Module):
    """Its input is called like a builtin of Python, which a copied graph would rename."""

    def forward(self, input):
        return input.view(-1, 6).relu()


def test_an_input_called_after_a_builtin_keeps_its_name():
    x = torch.randn(2, 3, 2)
    program = export(Builtin(), (x,))
    changed = translatable(program)
    assert changed is not program
    assert [n.name for n in changed.graph.nodes] == [n.name for n in program.graph.nodes]
    torch.testing.assert_close(changed.module()(x), Builtin()(x))
