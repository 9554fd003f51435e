"""Residual streams stored centred: the same function, one operator per norm, by every way of writing and reading."""

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from exporters import to_onnx
from foundation.errors import RefusedError
from pipeline.channels import centre, prove, small
from pipeline.channels.centring import streams as found
from pipeline.channels.removal.verify import difference


class PreNorm(nn.Module):
    """Patches by a convolution, class token, position table, layer scale, attention, feed-forward, last norm, head."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads = heads
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 5, width))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width, bias=False)
        self.scale = nn.Parameter(torch.randn(width))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)) * self.scale
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.norm3(x)[:, 0])


class RawReaders(nn.Module):
    """The stream is read without a norm: by a linear layer, by a depthwise convolution, by a mean over channels."""

    def __init__(self, width=16):
        super().__init__()
        self.embed = nn.Linear(6, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.raw = nn.Linear(width, 5)
        self.depthwise = nn.Conv1d(width, width, 3, padding=1, groups=width)
        self.point = nn.Linear(width, 5)

    def forward(self, x):
        x = self.embed(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.raw(x) + self.point(self.depthwise(x.transpose(1, 2)).transpose(1, 2)) + x.mean(-1, keepdim=True)


class Windows(nn.Module):
    """Norms whose output is rolled and cut into windows before the linear layer; no affine part in one of them."""

    def __init__(self, width=12):
        super().__init__()
        self.embed = nn.Linear(5, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width, elementwise_affine=False)
        self.mix, self.back, self.last = nn.Linear(width, 8), nn.Linear(8, width), nn.Linear(width, 3, bias=False)

    def forward(self, x):
        x = self.embed(x)
        b, h, w, c = x.shape
        y = torch.roll(self.first(x), (1, 1), (1, 2)).view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5)
        y = self.back(torch.relu(self.mix(y))).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return self.last(self.second(x + y).flatten(1, 2).mean(1))


class ComputedWriter(nn.Module):
    """A writer that takes no weights (a gate's product): T is put in as operators where enough norms gain by it."""

    def __init__(self, width=12, depth=4):
        super().__init__()
        self.a, self.b = nn.Linear(6, width), nn.Linear(6, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, 3)
        self.last = nn.LayerNorm(width)

    def forward(self, x):
        x = torch.tanh(self.a(x)) * self.b(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.head(self.last(x))


class Tied(nn.Module):
    """One embedding table for two streams' worth of uses, and one linear layer used twice."""

    def __init__(self, width=12):
        super().__init__()
        self.table = nn.Embedding(9, width)
        self.shared = nn.Linear(width, width)
        self.first, self.second, self.last = (nn.LayerNorm(width) for _ in range(3))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.table(x)
        x = x + self.shared(self.first(x))
        x = x + self.shared(self.second(x))
        return self.head(self.last(x)).mean(1)


class PostNorm(nn.Module):
    """The stream is a norm's own output: what could be gained is lost on putting T in, so nothing is changed."""

    def __init__(self, width=12):
        super().__init__()
        self.embed = nn.Conv1d(6, width, 1, groups=1)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.layer, self.head = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x):
        x = self.first(torch.relu(self.embed(x)).transpose(1, 2))
        return self.head(self.second(x + self.layer(x)))


class Scaled(nn.Module):
    """A number is multiplied into the stream; behind a norm that changes its shift, as a sum of tokens does."""

    def __init__(self, width=12):
        super().__init__()
        self.embed = nn.Linear(6, width)
        self.first, self.second, self.last = (nn.LayerNorm(width) for _ in range(3))
        self.layer, self.mix, self.head = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x):
        x = self.embed(x) * 2
        x = x + self.layer(self.first(x) * 0.5)
        x = x + self.mix(self.second(x).sum(1, keepdim=True))
        return self.head(self.last(x).mean(1))


class OtherWriters(nn.Module):
    """A transposed convolution writes the stream, and a table of embeddings behind a layer scale."""

    def __init__(self, width=12):
        super().__init__()
        self.up = nn.ConvTranspose1d(6, width, 2, 2)
        self.table = nn.Embedding(14, width)
        self.scale = nn.Parameter(torch.randn(width))
        self.first, self.last = nn.LayerNorm(width), nn.LayerNorm(width)
        self.layer, self.head = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x):
        y = self.up(x.transpose(1, 2)).transpose(1, 2)
        y = y + self.table(torch.arange(14)[: x.shape[1] * 2]) * self.scale
        y = y + self.layer(self.first(y))
        return self.head(self.last(y))


class NormAdded(nn.Module):
    """A norm's output is added to the stream that it reads, and a linear layer reads it too."""

    def __init__(self, width=12):
        super().__init__()
        self.embed, self.head = nn.Linear(6, width), nn.Linear(width, 3)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        x = self.embed(x)
        x = x + self.layers[0](self.norms[0](x))
        y = self.norms[1](x)
        x = x + y + self.layers[1](y)
        x = x + self.layers[2](self.norms[2](x))
        return self.head(self.norms[3](x))


class SizesOfAnother(nn.Module):
    """A view takes its sizes from a tensor that is not of the stream."""

    def __init__(self, width=12):
        super().__init__()
        self.embed, self.other = nn.Linear(6, width), nn.Linear(6, width)
        self.first, self.second, self.last = (nn.LayerNorm(width) for _ in range(3))
        self.layer, self.mix, self.head = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x):
        y = self.embed(x)
        y = y + self.layer(self.first(y))
        y = y + self.mix(self.second(y))
        return self.head(self.last(y)) + y.view_as(torch.sigmoid(self.other(x))).square().mean(-1, True)


NETS = {
    "pre-norm": (PreNorm(), torch.randn(2, 3, 8, 8), 3),
    "raw readers": (RawReaders(), torch.randn(2, 7, 6), 4),
    "windows": (Windows(), torch.randn(2, 4, 4, 5), 2),
    "computed writer": (ComputedWriter(), torch.randn(2, 7, 6), 5),
    "tied": (Tied(), torch.randint(0, 9, (2, 7)), 3),
    "scaled": (Scaled(), torch.randn(2, 7, 6), 3),
    "other writers": (OtherWriters(), torch.randn(2, 7, 6), 2),
    "norm added": (NormAdded(), torch.randn(2, 7, 6), 4),
    "sizes of another": (SizesOfAnother(), torch.randn(2, 7, 6), 3),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_centred_program_is_the_same_function(experiment, name, seed):
    model, x, norms = NETS[name]
    e = experiment(model, x, seed=seed)
    done = centre(e.shrunk.program)
    assert done.norms == norms
    ops = [str(n.target) for n in done.program.graph.nodes]
    assert sum("rms_norm" in op for op in ops) == norms
    assert not any("layer_norm" in op for op in ops)
    feeds = [small(e.captured, batch=b, seed=b) for b in (1, 3)]
    prove(e.folded, done, feeds, rounded=True)
    worst, scale, compared = difference(e.folded, done, feeds, torch.float64)
    assert compared
    assert worst <= 1e-6 * max(1.0, scale)  # weights are stored in float32, all else is exact


def test_shifts_and_means_go_into_the_weights_around(experiment):
    """In the pre-norm model nothing is left of the norms but one operator each."""
    done = centre(experiment(NETS["pre-norm"][0], NETS["pre-norm"][1]).shrunk.program)
    assert (done.widened, done.narrowed) == (0, 0)
    assert not any("constant_pad" in str(n.target) for n in done.program.graph.nodes)
    assert not any("narrow" in n.name or "slice_tensor" in n.name for n in done.program.graph.nodes)


@pytest.mark.parametrize("name", ["scaled", "other writers"])
def test_whatever_has_weights_takes_the_mean_in_them(experiment, name):
    done = centre(experiment(NETS[name][0], NETS[name][1]).shrunk.program)
    assert (done.widened, done.narrowed) == (0, 0)


def test_readers_that_take_no_weights_get_the_plain_stream(experiment):
    done = centre(experiment(NETS["raw readers"][0], NETS["raw readers"][1]).shrunk.program)
    assert done.narrowed == 2  # the depthwise convolution's transpose is linear and belongs to the stream


def test_a_stream_that_would_not_gain_stays_as_it_is(experiment):
    e = experiment(PostNorm(), torch.randn(2, 6, 7))
    done = centre(e.shrunk.program)
    assert done.norms == 0
    assert done.program is e.shrunk.program
    assert any("layer_norm" in str(n.target) for n in done.program.graph.nodes)


def test_the_shrunk_program_is_left_alone(experiment):
    e = experiment(NETS["pre-norm"][0], NETS["pre-norm"][1])
    before = {n: v.clone() for n, v in e.shrunk.program.state_dict.items()}
    code = e.shrunk.program.graph_module.code
    centre(e.shrunk.program)
    assert e.shrunk.program.graph_module.code == code
    assert all(torch.equal(v, before[n]) for n, v in e.shrunk.program.state_dict.items())
    (x,) = (n for n in e.shrunk.program.graph.nodes if n.name == "x")
    assert not isinstance(x.meta["val"].shape[0], int)  # the batch is still free


class Builtin(nn.Module):
    """Its input is called like a builtin of Python, which a copied graph would rename."""

    def __init__(self):
        super().__init__()
        self.net = PreNorm()

    def forward(self, input):
        return self.net(input)


def test_an_input_called_after_a_builtin_keeps_its_name(experiment):
    e = experiment(Builtin(), torch.randn(2, 3, 8, 8))
    done = centre(e.shrunk.program)
    assert done.norms == 3
    assert done.program.graph_signature.user_inputs == ("input",)
    prove(e.folded, done, [small(e.captured, batch=3)], rounded=True)


@pytest.mark.parametrize("name", ["pre-norm", "windows"])
def test_onnxruntime_runs_it_with_a_dynamic_batch(experiment, name, tmp_path):
    model, x, norms = NETS[name]
    e = experiment(model, x)
    made = to_onnx(centre(e.shrunk.program).program, tmp_path / "m.onnx", example=(x,), opset=23, metadata={})
    assert made.summary.operators["RMSNormalization"] == norms
    session = onnxruntime.InferenceSession(made.path, providers=["CPUExecutionProvider"])
    for batch in (1, 4):
        (feed,) = small(e.captured, batch=batch, seed=batch)
        (found_y,) = session.run(None, {session.get_inputs()[0].name: feed.numpy()})
        np.testing.assert_allclose(found_y, e.folded(feed).numpy(), atol=1e-5)


@pytest.mark.parametrize("broken", ["mean", "share", "epsilon"])
def test_a_wrong_formula_is_seen(experiment, monkeypatch, broken):
    """The comparison above fails for a stream centred without the lost channels, and for a wrong count or epsilon."""
    e = experiment(NETS["pre-norm"][0], NETS["pre-norm"][1])
    streams = found.find_streams

    def wrong(norms, held):
        result = streams(norms, held)
        for stream in result:
            if broken == "mean":
                stream.full = stream.kept + 1
            elif broken == "share":
                stream.full += 3
            else:
                stream.norms = [found.Norm(**{**vars(n), "eps": n.eps + 0.01}) for n in stream.norms]
        return result

    monkeypatch.setitem(vars(__import__("sys").modules["pipeline.channels.centring.centre"]), "find_streams", wrong)
    with pytest.raises(RefusedError):
        prove(e.folded, centre(e.shrunk.program), [small(e.captured, batch=3)], rounded=True)
