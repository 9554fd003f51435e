"""Files by PyTorch's two exporters: the net read back computes the same, and has the same channels to remove."""

import contextlib
import io
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto
from torch import Tensor, nn
from torch.export import Dim

from foundation.errors import ModelError
from pipeline import models
from pipeline.channels.coupling.analyse import analyse
from pipeline.channels.program.capture import capture
from tests.pipeline.models.onnx_files import saved
from validators.runners import OrtRunner


class Residual(nn.Module):
    """Convolutions with a shortcut, BatchNorm, GroupNorm, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(), nn.MaxPool2d(2))
        self.a = nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(3, 12)
        self.b = nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.b(F.silu(self.norm(self.a(x))))).mean((2, 3)))


class UNet(nn.Module):
    """Skips, a transposed convolution, an upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 10, 3, 2, 1), nn.Conv2d(10, 12, 3, 2, 1)
        self.up = nn.ConvTranspose2d(12, 10, 2, 2)
        self.d, self.e = nn.Conv2d(20, 6, 3, padding=1), nn.Conv2d(12, 2, 1)

    def forward(self, x):
        a = self.a(x).relu()
        b = self.b(a).relu()
        d = self.d(torch.cat([self.up(self.c(b).relu()), b], 1)).relu()
        return self.e(torch.cat([F.interpolate(d, scale_factor=2, mode="bilinear"), a], 1))


class Transformer(nn.Module):
    """Patches, a class token, positions, attention, LayerNorm, GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 17, 16))
        self.first, self.second, self.last = nn.LayerNorm(16), nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        q, k, v = self.qkv(self.first(x)).reshape(-1, 17, 3, 2, 8).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 17, 16))
        x = x + self.down(F.gelu(self.up(self.second(x))))
        return self.head(self.last(x)[:, 0])


class Depthwise(nn.Module):
    """Depthwise convolutions, a gate, channels cut and shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.deep = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.squeeze, self.excite = nn.Conv2d(12, 6, 1), nn.Conv2d(6, 12, 1)
        self.b = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = F.hardswish(self.deep(self.a(x)))
        x = x * self.excite(self.squeeze(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()
        left, right = x.chunk(2, 1)
        x = torch.cat([left, self.b(right)], 1).reshape(-1, 2, 6, 16, 16).transpose(1, 2).reshape(-1, 12, 16, 16)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Recurrent(nn.Module):
    """An LSTM in two directions over a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.lstm = nn.GRU(3, 6, batch_first=True), nn.LSTM(6, 5, batch_first=True, bidirectional=True)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        return self.head(self.lstm(self.gru(x)[0])[0][:, -1])


class Words(nn.Module):
    """A table of words under a mask, tied to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 8)
        self.up, self.down, self.norm = nn.Linear(8, 20), nn.Linear(20, 8), nn.LayerNorm(8)

    def forward(self, words, mask):
        x = self.table(words)
        x = self.norm(x + self.down(F.gelu(self.up(x), approximate="tanh"))) * mask.unsqueeze(-1).to(x.dtype)
        return F.linear(x, self.table.weight)


IMAGE = (torch.randn(2, 3, 16, 16),)
NETS = {
    "residual": (Residual, IMAGE),
    "u-net": (UNet, IMAGE),
    "transformer": (Transformer, IMAGE),
    "depthwise": (Depthwise, IMAGE),
    "recurrent": (Recurrent, (torch.randn(2, 7, 3),)),
    "words": (Words, (torch.randint(0, 30, (2, 9)), torch.ones(2, 9, dtype=torch.int64))),
}


def built(case: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The net with weights as after training: no two alike, statistics that are not the first ones."""
    make, sample = NETS[case]
    torch.manual_seed(0)
    net = make()
    with torch.no_grad():
        for value in net.parameters():
            value.add_(0.1 * torch.randn_like(value))
        for name, value in net.named_buffers():
            if value.is_floating_point():
                value.add_(torch.rand_like(value) if "var" in name else torch.randn_like(value) * 0.1)
    return net.eval(), sample


def exported(net: nn.Module, sample: tuple[Tensor, ...], path: Path, *, opset: int, dynamo: bool, free: bool = True):
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        if dynamo:
            shapes = tuple({0: Dim.DYNAMIC} for _ in sample)
            torch.onnx.export(net, sample, path, dynamo=True, opset_version=opset, dynamic_shapes=shapes, verbose=False)
        else:
            names = [f"in{at}" for at in range(len(sample))]
            axes = {name: {0: "batch"} for name in names} if free else None
            torch.onnx.export(
                net, sample, str(path), dynamo=False, opset_version=opset, input_names=names, dynamic_axes=axes
            )
    return path


WAYS = [(True, 18), (True, 23), (False, 11), (False, 17)]


@pytest.mark.examples
@pytest.mark.slow
@pytest.mark.parametrize("case", NETS)
@pytest.mark.parametrize(("dynamo", "opset"), WAYS)
def test_a_net_read_back_is_the_same_function_with_the_same_channels(tmp_path, case, dynamo, opset):
    net, sample = built(case)
    if case == "transformer" and not dynamo and opset < 14:
        pytest.skip("the exporter has no attention there")
    if case == "recurrent" and opset == 23:
        pytest.skip("as at 18, and slow to export")
    source = models.load(f"onnx:{exported(net, sample, tmp_path / 'net.onnx', opset=opset, dynamo=dynamo)}")
    back = source.build()
    assert [one.shape for one in source.inputs] == [tuple(x.shape[1:]) for x in sample]
    # Without its name, nothing says that what is multiplied with floats is a mask.
    kinds = ["tokens", "mask" if dynamo else "tokens"] if case == "words" else ["float"]
    assert [one.kind for one in source.inputs] == kinds
    longer = tuple(torch.cat([x, x.flip(0), x])[:5] for x in sample)
    with torch.no_grad():
        torch.testing.assert_close(back(*longer), net(*longer), rtol=1e-4, atol=1e-5)
    mine, theirs = (analyse(capture(one, sample)) for one in (net, back))
    assert abs(len(theirs.clusters) - len(mine.clusters)) <= (1 if case == "depthwise" else 0)
    assert abs(theirs.removable_share - mine.removable_share) < 0.05
    count = sum(value.numel() for value in net.parameters())
    # An exporter folds a BatchNorm into the convolution before it.
    folded = 16 if case == "residual" else 0
    assert sum(value.numel() for value in back.parameters()) in (count, count - folded)
    assert all(value.requires_grad for value in back.parameters())


def test_weights_keep_their_names(tmp_path):
    net, sample = built("transformer")
    source = models.load(f"onnx:{exported(net, sample, tmp_path / 'net.onnx', opset=20, dynamo=True)}")
    back = source.build()
    mine, theirs = dict(net.named_parameters()), dict(back.named_parameters())
    assert {"patch.weight", "up.weight", "up.bias", "token", "position", "first.weight"} <= set(theirs) <= set(mine)
    assert all(torch.equal(value, mine[name]) for name, value in theirs.items())
    assert [one.name for one in source.inputs] == ["x"]


def test_tied_weights_stay_tied(tmp_path):
    net, sample = built("words")
    for dynamo in (True, False):
        path = exported(net, sample, tmp_path / "net.onnx", opset=18 if dynamo else 14, dynamo=dynamo)
        back = models.load(f"onnx:{path}").build()
        assert [name for name, value in back.named_parameters() if value.shape == (30, 8)] == ["table.weight"]


@pytest.mark.parametrize("case", ["residual", "u-net", "transformer", "depthwise", "recurrent"])
def test_a_batch_of_one_is_freed(tmp_path, case):
    net, sample = built(case)
    path = exported(net, tuple(x[:1] for x in sample), tmp_path / "net.onnx", opset=17, dynamo=False, free=False)
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    back = models.load(f"onnx:{path}").build()
    longer = tuple(torch.cat([x, x.flip(0), x])[:5] for x in sample)
    with torch.no_grad():
        torch.testing.assert_close(back(*longer), net(*longer), rtol=1e-4, atol=1e-5)
    assert capture(back, sample).dynamic_batch


@pytest.mark.parametrize("case", NETS)
def test_a_net_read_back_learns_and_can_be_copied(tmp_path, case):
    net, sample = built(case)
    source = models.load(f"onnx:{exported(net, sample, tmp_path / 'net.onnx', opset=17, dynamo=False)}")
    back = source.build().train()
    before = {name: value.clone() for name, value in back.state_dict().items()}
    optimizer = torch.optim.SGD(back.parameters(), lr=0.1)
    back(*sample).square().mean().backward()
    optimizer.step()
    moved = [name for name, value in back.named_parameters() if not torch.equal(value, before[name])]
    assert len(moved) > 0.7 * len(list(back.parameters()))
    assert all(torch.equal(value, before[name]) for name, value in source.build().state_dict().items())
    other = models.load(back.eval(), input_size=tuple(sample[0].shape[1:])).build()
    with torch.no_grad():
        torch.testing.assert_close(other(*sample), back(*sample))


def test_equal_weights_that_an_exporter_stored_once_are_of_their_layers_again(tmp_path):
    """A fresh network's ones and zeros: tied, they would tie the channels of all layers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6))
    for layer in net:
        nn.init.zeros_(layer.bias)
    sample = (torch.randn(2, 6),)
    path = exported(net.eval(), sample, tmp_path / "net.onnx", opset=18, dynamo=True)
    assert len(onnx.load(path).graph.initializer) < 8
    back = models.load(f"onnx:{path}").build()
    assert len(analyse(capture(back, sample)).clusters) == len(analyse(capture(net, sample)).clusters)


def test_free_sizes_are_those_that_are_given(tmp_path):
    net, sample = built("u-net")
    path = tmp_path / "net.onnx"
    dims = {0: Dim.DYNAMIC, 2: 4 * Dim("h", min=2, max=200), 3: 4 * Dim("w", min=2, max=200)}
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(net, sample, path, dynamo=True, opset_version=18, dynamic_shapes=(dims,), verbose=False)
    assert models.load(f"onnx:{path}").inputs[0].shape == (3, 224, 224)
    source = models.load(f"onnx:{path}", input_size=(3, 32, 24))
    assert source.inputs[0].shape == (3, 32, 24)
    x = torch.randn(2, 3, 32, 24)
    with torch.no_grad():
        torch.testing.assert_close(source.build()(x), net(x), rtol=1e-4, atol=1e-5)


TENSORFLOW = """t = Transpose <perm=[0,3,1,2]> (x) c = Conv <auto_pad="SAME_UPPER", strides=[2,2]> (t, w)
    n = BatchNormalization <epsilon=0.001> (c, g, s, m, var) r = Relu (n) k = Pad (r, pads) d = Conv <group=6> (k, v)
    u = Transpose <perm=[0,2,3,1]> (d) e = ReduceMean <axes=[1,2], keepdims=0> (u) f = Reshape (e, rows)
    h = MatMul (f, a) b2 = Add (h, b) y = Softmax (b2)"""
WEIGHTS = {
    "w": (6, 3, 3, 3), "g": (6,), "s": (6,), "m": (6,), "var": (6,), "v": (6, 1, 3, 3), "a": (6, 4), "b": (4,),
}  # fmt: skip


@pytest.mark.parametrize("batch", ["unk__1", None, 1])
def test_images_with_the_channels_last_are_taken_with_the_channels_first(tmp_path, batch):
    values = {"pads": np.asarray([0, 0, 1, 1, 0, 0, 1, 1]), "rows": np.asarray([-1, 6])}
    path = saved(tmp_path, TENSORFLOW, opset=13, x=(batch, 9, 8, 3), weights=WEIGHTS, values=values)
    source = models.load(f"onnx:{path}", input_size=(3, 9, 8))
    assert source.inputs[0].shape == (3, 9, 8)
    assert "channels last" in source.origin.note
    net = source.build()
    x = torch.randn(1, 3, 9, 8)
    wanted = OrtRunner(path, threads=1).infer({"x": x.permute(0, 2, 3, 1).contiguous().numpy()})["y"]
    with torch.no_grad():
        np.testing.assert_allclose(net(x).numpy(), wanted, rtol=1e-4, atol=1e-6)
    # The last layer's outputs stay; what is before it can go, and no channel waits at the file's transposes.
    assert [cluster.size for cluster in analyse(capture(net, (x,))).clusters] == [6]


@pytest.mark.parametrize("shape", [("n", "c", "h", "w"), (None, 3, None, None), (None, 3, "h", "h")])
def test_sizes_without_names_are_free_too(tmp_path, shape):
    path = saved(tmp_path, "y = GlobalAveragePool (x)", opset=13, x=shape)
    assert models.load(f"onnx:{path}").inputs[0].shape == (3, 224, 224)
    assert models.load(f"onnx:{path}", input_size=(3, 16, 16)).inputs[0].shape == (3, 16, 16)


def test_whole_numbers_are_never_made_of_floats(tmp_path):
    path = saved(tmp_path, "y = Gather (w, x)", opset=13, x=("n", 4), weights={"w": (9, 3)}, kind=TensorProto.INT64)
    source = models.load(f"onnx:{path}")
    with pytest.raises(ModelError, match="x takes whole numbers, not float32"):
        models.check(source.build(), (torch.rand(2, 4),))
