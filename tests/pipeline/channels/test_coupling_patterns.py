"""One tiny net per way in which channels can be tied; each loses half of what it has and gives the same output.

Each entry: the net, its inputs, and the clusters that must be there as {kind: how many groups in all}.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foundation.errors import LeanortError, RefusedError
from pipeline.channels import Policy, analyse, capture, prove, shrink, small
from pipeline.channels.operators import CARDS, TAGGED, Card
from pipeline.channels.operators.values import Value

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], dict[str, int]]] = {}
IMAGE = (torch.randn(2, 3, 8, 8),)
TOKENS = (torch.randn(2, 6, 12),)


def case(inputs: tuple[Tensor, ...], **kinds: int) -> Callable[[type[nn.Module]], type[nn.Module]]:
    def register(net: type[nn.Module]) -> type[nn.Module]:
        CASES[net.__name__] = (net, inputs, kinds)
        return net

    return register


class Ends(nn.Module):
    """stem -> body -> head over images; what the body ties is what the test is about."""

    def __init__(self, width: int = 8, out: int | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.head = nn.Conv2d(out or width, 5, 1)


@case(IMAGE, channel=16)
class ConvNormAct(Ends):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.norm(self.conv(F.relu(self.stem(x))))))


@case(IMAGE, channel=16)
class Residual(Ends):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.b(F.relu(self.a(x))))


@case(IMAGE, channel=14)
class Concat(Ends):
    def __init__(self) -> None:
        super().__init__(8, out=14)
        self.branch = nn.Conv2d(8, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(torch.cat([x, F.gelu(self.branch(x))], 1))


@case(IMAGE, channel=8)
class Depthwise(Ends):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu6(self.depthwise(F.hardswish(self.stem(x)))))


@case(IMAGE, channel=8)
class DepthwiseMultiplier(Ends):
    def __init__(self) -> None:
        super().__init__(8, out=16)
        self.depthwise = nn.Conv2d(8, 16, 3, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.depthwise(self.stem(x)))


@case(TOKENS, neuron=8)
class PooledOverTokensAlone(nn.Module):
    """Tokens are pooled in an image's form, by windows one channel wide."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.into(x))[:, None]
        return self.out(F.avg_pool2d(x, (2, 1), ceil_mode=True) + F.max_pool2d(x, (2, 1)))


@case(TOKENS, neuron=7)
class PooledWithIndices(nn.Module):
    """The same windows, but where the largest was is counted through the channels too: they stay."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.hidden, self.out = nn.Linear(12, 8), nn.Linear(8, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        largest, at = F.max_pool2d(self.into(x)[:, None], (2, 1), return_indices=True)
        return self.out(torch.relu(self.hidden(largest + 0.1 * at)))


@case(TOKENS, head_position=16)
class BiasZeroedInPart(nn.Module):
    """Keys without a bias: the middle of a packed one is cleared at run time, as Swin V2 does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(24, 12)), nn.Parameter(torch.randn(24))
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.clone()
        bias[8:16].zero_()
        q, k, v = F.linear(x, self.weight, bias).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v))


@case(TOKENS, neuron=16)
class LayerOnATable(nn.Module):
    """Relative positions as DeBERTa has them: a normalised table of parameters goes through a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Parameter(torch.randn(6, 8)), nn.LayerNorm(8)
        self.into, self.place, self.out = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.into(x)) + self.place(self.norm(self.table)))


@case(IMAGE, channel=8)
class MultipliersInBranches(Ends):
    """The second pair reads groups that the first has tied in twos."""

    def __init__(self) -> None:
        super().__init__(8, out=32)
        self.a, self.b = nn.Conv2d(8, 16, 3, groups=8, padding=1), nn.Conv2d(8, 16, 1, groups=8)
        self.c, self.d = nn.Conv2d(16, 32, 3, groups=16, padding=1), nn.Conv2d(16, 32, 1, groups=16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.a(x) + self.b(x))
        return self.head(self.c(x) + self.d(x))


@case(IMAGE, channel=4)
class Grouped(Ends):
    def __init__(self) -> None:
        super().__init__(8, out=12)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.grouped(self.stem(x))))


@case(IMAGE, channel=14)
class Transposed(Ends):
    def __init__(self) -> None:
        super().__init__(8, out=6)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.up(F.relu(self.stem(x)))))


@case(IMAGE, channel=4)
class GroupedTransposed(Ends):
    def __init__(self) -> None:
        super().__init__(8, out=12)
        self.up = nn.ConvTranspose2d(8, 12, 2, stride=2, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.stem(x)))


@case((torch.randn(2, 3, 20),), channel=14)
class Conv1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 6, 3), nn.Linear(6, 4)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.adaptive_avg_pool1d(self.b(F.elu(self.norm(self.a(x)))), 1).squeeze())


@case((torch.randn(2, 3, 4, 8, 8),), channel=8)
class Conv3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), nn.Conv3d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.max_pool3d(F.relu(self.norm(self.a(x))), 2))


@case(IMAGE, channel=12)
class SqueezeExcite(Ends):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True))))))


@case(IMAGE, channel=8)
class ChannelShuffle(Ends):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, h, w = x.shape
        return self.head(x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w))


@case(TOKENS, neuron=12)
class SizesOfAnother(nn.Module):
    """A view that takes its sizes from another tensor: the two lose the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x).flatten(1).view_as(torch.sigmoid(self.b(x))))


@case(TOKENS, neuron=12)
class BestTokens(nn.Module):
    """The tokens with the highest scores are looked up, as a detector picks its queries, all channels of each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.score, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 1), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        best = self.score(x).squeeze(-1).topk(3, dim=1).indices.unsqueeze(-1)
        y = self.a(x)
        y = y.gather(1, best.repeat(1, 1, y.shape[-1])) + self.b(x).gather(1, best.expand(-1, -1, 12)).relu()
        return self.head(y)


@case(TOKENS, neuron=12)
class FirstChannelsOfBestTokens(nn.Module):
    """Of the tokens looked up, the first seven channels only: the index is shorter than what it looks up in."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.score, self.head, self.rest = (
            nn.Linear(12, 12),
            nn.Linear(12, 1),
            nn.Linear(7, 4),
            nn.Linear(12, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        best = self.score(x).squeeze(-1).topk(3, dim=1).indices.unsqueeze(-1)
        y = self.a(x)
        return self.head(y.gather(1, best.expand(-1, -1, 7))) + self.rest(y)[:, :3]


@case(IMAGE, channel=10)
class PixelShuffle(Ends):
    def __init__(self) -> None:
        super().__init__(8, out=32)
        self.up = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_shuffle(self.up(F.relu(self.stem(x))), 2)
        return self.head(torch.cat([F.pixel_unshuffle(x, 2), self.pad(x)], 1))

    def pad(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(F.pixel_unshuffle(F.relu(x), 2), 1).repeat(1, 3, 1, 1)


@case(IMAGE, channel=8, neuron=16)
class FlattenToLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Linear(8 * 9, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(torch.flatten(F.max_pool2d(self.conv(x), 2), 1))))


@case(TOKENS, neuron=20)
class GatedUnit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 40), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


@case(TOKENS, neuron=10)
class Glu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(10, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.glu(self.up(x), -1))


@case((torch.randint(0, 11, (2, 6)),), residual=12)
class WeightTying(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(11, 12), nn.LayerNorm(12), nn.Linear(12, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(ids)))


class Attention(nn.Module):
    def __init__(self, heads: int = 3, size: int = 4) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.qkv, self.proj = nn.Linear(12, 3 * heads * size), nn.Linear(heads * size, 12)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def merge(self, x: Tensor) -> Tensor:
        return self.proj(x.transpose(1, 2).flatten(2))


@case(TOKENS, head=3)
class FusedAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return self.merge(F.scaled_dot_product_attention(*self.split(x)))


@case(TOKENS, head=3)
class WrittenOutAttention(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(11, 3))
        self.register_buffer("index", torch.arange(6)[:, None] - torch.arange(6)[None] + 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        bias = self.table[self.index.view(-1)].view(6, 6, 3).permute(2, 0, 1)
        attention = (q @ k.transpose(-2, -1) / math.sqrt(self.size) + bias.unsqueeze(0)).softmax(-1)
        return self.merge(attention @ v)


@case(TOKENS, head_position=4)
class OneHead(Attention):
    def __init__(self) -> None:
        super().__init__(heads=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(F.scaled_dot_product_attention(*self.split(x)))


@case(TOKENS, head=3, neuron=3)
class TalkingHeads(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        a = self.before((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
        a = self.after(a.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.merge(a @ v)


@case(TOKENS, head=2)
class GroupedQuery(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(12, 24), nn.Linear(12, 2 * 2 * 4), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 6, 4).transpose(1, 2)
        k, v = self.kv(x).view(b, n, 2, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        k = k[:, :, None].expand(b, 2, 3, n, 4).reshape(b, 6, n, 4)
        v = v.repeat_interleave(3, dim=1)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, 24))


@case(TOKENS, head=3)
class Rotary(Attention):
    def __init__(self) -> None:
        super().__init__()
        angle = torch.arange(6)[:, None] / torch.tensor([1.0, 100.0])[None]
        self.register_buffer("angle", torch.cat([angle, angle], -1), persistent=False)

    def turn(self, x: Tensor) -> Tensor:
        half = torch.cat([-x[..., 2:], x[..., :2]], -1)
        return x * self.angle.cos() + half * self.angle.sin()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return self.merge(F.scaled_dot_product_attention(self.turn(q), self.turn(k), v))


@case((torch.randn(2, 6, 12), torch.randn(2, 5, 12)), head=3)
class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.attention(x, y, y, need_weights=False)[0]


@case(TOKENS, residual=12, neuron=16, head=3)
class TransformerLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 12)
        self.position = nn.Parameter(torch.randn(1, 6, 12))
        self.layer = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layer(self.embed(x) + self.position)).mean(1))


@case((torch.randn(2, 3, 8, 8),), residual=8, neuron=16)
class ConvNextBlock(Ends):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.LayerNorm(8)
        self.up, self.down, self.gamma = nn.Linear(8, 16), nn.Linear(16, 8), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return self.head(x + (self.gamma * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2))


@case(IMAGE, channel=4)
class GroupNormGroups(Ends):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.stem(x))))


@case(IMAGE, residual=8)
class GroupNormOne(Ends):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.stem(x))))


@case(IMAGE, channel=8)
class InstanceNorm(Ends):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(8, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.leaky_relu(self.norm(self.stem(x)), inplace=True))


@case(TOKENS, residual=16)
class RmsNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(12, 16), nn.RMSNorm(16), nn.Linear(16, 3)
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale  # as transformers writes it
        return self.head(self.norm(x) + y)


@case(TOKENS, residual=16)
class Variance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x) / x.std(-1, keepdim=True) + x.var(-1, keepdim=True, unbiased=False)


@case(TOKENS, neuron=10)
class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(12, 10, bidirectional=True, batch_first=True), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x, (torch.zeros(2, x.shape[0], 10), torch.zeros(2, x.shape[0], 10)))[0])


@case(TOKENS, neuron=10)
class Gru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(12, 10, batch_first=True), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


@case(TOKENS, neuron=10)
class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(12, 10)), nn.Parameter(torch.randn(10, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bnc,cd->bnd", F.relu(torch.einsum("...c,ch->...h", x, self.a)), self.b)


@case((torch.randn(2, 12),), neuron=10)
class Addmm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias, self.a, self.b = (nn.Parameter(torch.randn(*s)) for s in ((10,), (12, 10), (10, 4)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.a).tanh() @ self.b


@case(IMAGE, channel=16)
class WeightStandardised(Ends):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias, self.gain = (nn.Parameter(torch.randn(*s)) for s in ((8, 8, 3, 3), (8,), (8,)))

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, 8, -1)
        weight = F.batch_norm(flat, None, None, weight=self.gain, training=True).reshape_as(self.weight)
        return self.head(F.silu(F.conv2d(F.relu(self.stem(x)), weight, self.bias)))


@case(TOKENS, neuron=10)
class WeightNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(nn.Linear(12, 10))
        self.b = nn.utils.parametrizations.weight_norm(nn.Linear(10, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


@case(IMAGE, channel=8)
class Unfold(Ends):
    def __init__(self) -> None:
        super().__init__(8, out=72)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.unfold(self.stem(x), 3, padding=1).view(-1, 72, 8, 8))


@case(IMAGE, channel=8)
class Resized(Ends):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear") + F.interpolate(x, size=(8, 8))
        return self.head(F.adaptive_max_pool2d(F.pad(x, (1, 1, 1, 1)), 4))


@case(IMAGE, channel=8)
class PaddedShortcut(Ends):
    def __init__(self) -> None:
        super().__init__(4, out=8)
        self.body = nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.body(x) + F.pad(x, (0, 0, 0, 0, 2, 2)))


@case(IMAGE, channel=8)
class Prelu(Ends):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.PReLU(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.stem(x)))


@case((torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)), channel=8)
class TwoInputsTwoOutputs(Ends):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.stem(x), self.stem(y)
        return self.head(x * y), self.head(x - y).mean((2, 3))


@case(IMAGE, channel=8)
class Split(Ends):
    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(self.stem(x), [3, 5], 1)
        return self.head(torch.cat([F.relu(b), torch.tanh(a)], 1).flip(1))


@case(IMAGE, channel=8)
class StridedSlice(Ends):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.cat([x[:, ::2], x[:, 1::2]], 1))


@case(IMAGE, channel=8)
class IndexedChannels(Ends):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor([3, 1, 4, 0, 5, 7, 2, 6]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x[:, self.order] + torch.index_select(x, 1, self.order))


@case(IMAGE, channel=8)
class WrittenInPlace(Ends):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = torch.zeros_like(x)
        y[:, :, 1:] = x[:, :, :-1]
        return self.head(y.add_(x).relu_())


@case(IMAGE, residual=8)
class GlobalResponse(Ends):
    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.randn(1, 8, 1, 1)), nn.Parameter(torch.randn(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x))
        norm = x.norm(p=2, dim=(2, 3), keepdim=True)
        return self.head(x + self.gamma * x * (norm / (norm.mean(1, keepdim=True) + 1e-6)) + self.beta)


@case(IMAGE, channel=4, residual=8, head=2)
class WindowAttention(Ends):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.last = nn.Conv2d(5, 4, 1)
        self.end = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        y = self.norm(x).view(b, 2, 4, 2, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        q, k, v = self.qkv(y).reshape(-1, 16, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = self.proj(((q * 0.5) @ k.transpose(-2, -1)).softmax(-1).matmul(v).transpose(1, 2).reshape(-1, 16, c))
        y = y.view(b, 2, 2, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return self.end(F.relu(self.last(self.head((x + y).permute(0, 3, 1, 2)).softmax(1))))


@case(IMAGE, residual=8)
class Rolled(Ends):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.roll(self.stem(x), (1, 2), (2, 3))
        return self.head(x + self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


@case(IMAGE, channel=8)
class Summed(Ends):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x / (1 + x.square().sum(1, keepdim=True)))


@case(IMAGE, channel=8)
class UnequalChunks(Ends):
    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).chunk(2, 1)
        return self.head(torch.cat([F.relu(b), torch.tanh(a)], 1))


@case(IMAGE, channel=8)
class BroadcastRepeat(Ends):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.one(x).repeat(1, 8, 1, 1) * self.stem(x))


@case((torch.randn(2, 6, 12), torch.randn(2, 5, 12)), head_position=12)
class CrossAttentionPositions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 1, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.attention(x, y, y, need_weights=False)[0]


@case(IMAGE, channel=8)
class Reordered(Ends):
    """Dimensions moved, matrices transposed, tensors stacked and expanded to one another."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x)).movedim(1, -1).mT.mT.movedim(-1, 1)
        y = torch.tanh(self.other(x))
        x = torch.stack([x, y], 2).sum(2)
        x = F.channel_shuffle(x, 2)
        return self.head(x * x.mean((2, 3), keepdim=True).expand_as(x))


@case(IMAGE, channel=8)
class Blocks(Ends):
    """Windows cut out and put together again, extremes and spreads over space, samples on a grid."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = F.fold(F.unfold(x, 2, stride=2), (8, 8), 2, stride=2)
        x = x.unfold(2, 3, 1).mean(-1)
        x = x * x.amax((2, 3), keepdim=True) * x.std((2, 3), keepdim=True)
        at = torch.linspace(-0.9, 0.9, 4)
        grid = torch.stack(torch.meshgrid(at, at, indexing="ij"), -1).expand(x.shape[0], 4, 4, 2)
        return self.head(F.grid_sample(x, grid, align_corners=False))


@case(IMAGE, channel=8)
class Spectrum(Ends):
    """A filter in the frequency domain, its complex weight kept as pairs of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(8, 8, 5, 2))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(torch.tanh(self.stem(x))) * torch.view_as_complex(self.filter)
        return self.head(torch.fft.irfft2(spectrum, s=(8, 8)))


@case((torch.randn(2, 12), torch.randn(2, 10)), channel=21)
class TwoFactors(nn.Module):
    """A bilinear form of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 8), nn.Linear(10, 6)
        self.both, self.head = nn.Bilinear(8, 6, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(torch.relu(self.both(torch.tanh(self.a(x)), torch.tanh(self.b(y)))))


@case(IMAGE, channel=7)
class Selected(Ends):
    """One channel picked by its place."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(x) * x.select(1, 5).unsqueeze(1)


@case(IMAGE, channel=2)
class Squeezed(nn.Module):
    """A squeeze of all dimensions of length one, of which the removal makes one more."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 2, 1), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(torch.tanh(self.stem(x)), 1).squeeze())


@case(TOKENS, neuron=22)
class ProjectedLstm(nn.Module):
    """An LSTM that hands on a projection of its units."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(12, 9)
        self.rnn = nn.LSTM(9, 8, 2, proj_size=5, bidirectional=True, batch_first=True)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(torch.tanh(self.into(x)))[0])


@case(IMAGE, channel=22)
class Interleaved(Ends):
    """Two convolutions' channels in turn, written through strided views."""

    def __init__(self) -> None:
        super().__init__(8, out=14)
        self.a, self.b = nn.Conv2d(8, 7, 1), nn.Conv2d(8, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        y = x.new_zeros(x.shape[0], 14, 8, 8)
        y[:, ::2], y[:, 1::2] = self.a(x), self.b(x)
        return self.head(torch.relu(y))


@case(IMAGE, channel=6)
class OnePlaceWritten(Ends):
    """One channel is written by its place."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x[:, 5] = x[:, 2] * 2
        return self.head(x)


@case(IMAGE, channel=7)
class ListsWritten(Ends):
    """Channels at lists of places are written to, in one way and the other."""

    def __init__(self) -> None:
        super().__init__(10)
        self.a = nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x[:, [1, 8, 3, 6]] = self.a(x)
        return self.head(x.index_copy(1, torch.tensor([0, 9, 5]), x[:, 2:5]))


@case(TOKENS, neuron=12)
class TokensScattered(nn.Module):
    """Tokens go back to the places where they were found, all channels of each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.score, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 1), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        best = self.score(x).squeeze(-1).topk(3, dim=1).indices.unsqueeze(-1)
        y = torch.tanh(self.a(x))
        found = y.gather(1, best.expand(-1, -1, 12)) * 2
        return self.head(self.b(x).scatter(1, best.repeat(1, 1, y.shape[-1]), found))


@case(TOKENS, neuron=15)
class Distances(nn.Module):
    """Distances to the entries of a table, which are channels in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.table, self.head = nn.Linear(12, 8), nn.Parameter(torch.randn(7, 8)), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.exp(-torch.cdist(self.into(x), self.table)))


@case(TOKENS, neuron=14)
class Similar(nn.Module):
    """Tokens beside each other are compared, channel by channel of a second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(6, 4)
        self.mix = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        one, other = (torch.tanh(f(x)).mT for f in (self.a, self.b))
        return self.head(F.cosine_similarity(self.mix(one), self.mix(other), dim=1))


@case(IMAGE, channel=14)
class ComplexWeights(Ends):
    """A linear layer over channels in the frequency domain, with complex weights, read as two real halves."""

    def __init__(self) -> None:
        super().__init__(8, out=12)
        self.weight = nn.Parameter(torch.randn(8, 6, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bixy,io->boxy", torch.fft.rfft2(torch.tanh(self.stem(x))), self.weight)
        return self.head(torch.cat([y.real, y.imag], 1))


class ConvPerSample(nn.Conv2d):
    """A convolution whose weights are mixed for every sample: the batch is folded into the groups."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options, bias=False)
        self.weight = nn.Parameter(torch.randn(3, self.weight.numel()))

    def forward(self, x: Tensor, mix: Tensor) -> Tensor:  # type: ignore[override]
        b, c, h, w = x.shape
        weight = torch.matmul(mix, self.weight).view(b * self.out_channels, c // self.groups, *self.kernel_size)
        x = F.conv2d(x.reshape(1, b * c, h, w), weight, None, self.stride, self.padding, 1, self.groups * b)
        return x.permute(1, 0, 2, 3).view(b, self.out_channels, x.shape[-2], x.shape[-1])


@case(IMAGE, channel=4, neuron=3)
class MixedPerSample(Ends):
    """Wider, depthwise, narrower, each mixed for every sample by one routing."""

    def __init__(self) -> None:
        super().__init__()
        self.route = nn.Linear(8, 3)
        self.wide, self.deep = ConvPerSample(8, 12, 1), ConvPerSample(12, 12, 3, padding=1, groups=12)
        self.grouped = ConvPerSample(12, 8, 3, stride=2, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        mix = torch.sigmoid(self.route(x.mean((2, 3))))
        return self.head(self.grouped(F.relu(self.deep(F.relu(self.wide(x, mix)), mix)), mix))


@case(TOKENS, neuron=8)
class Splines(nn.Module):
    """Basis functions of degree zero, as masks of intervals put together by `&` and `|`."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(12, 8), nn.Linear(8, 4)
        self.register_buffer("grid", torch.linspace(-1, 1, 6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        y, grid = x.unsqueeze(-1), self.grid
        inside = (y >= grid[:-1]) & (y < grid[1:]) | (y > 2)
        return self.out(inside.to(x.dtype).sum(-1) * x)


def check(name: str, experiment: Callable[..., Any]) -> None:
    """Everything that has to hold for one pattern."""
    build, inputs, kinds = CASES[name]
    torch.manual_seed(0)
    found = experiment(build(), *inputs)
    have: Counter[str] = Counter()
    for cluster in found.analysis.clusters:
        have[cluster.kind] += cluster.size
    assert dict(have) == kinds
    assert not found.shrunk.refused
    assert found.proof.max_abs_diff <= found.proof.tolerance
    assert found.proof.max_abs_diff_float64 is not None
    assert found.control > 100 * found.proof.tolerance, "the comparison could not have failed"


@pytest.mark.parametrize("name", CASES)
def test_half_of_everything_goes_and_the_output_stays(name: str, experiment: Callable[..., Any]) -> None:
    check(name, experiment)


# operator -> a pattern that depends on its card. Breaking the card must break the pattern's test.
USED_BY = {
    "a pointwise one": "ConvNormAct", "mul": "GatedUnit", "_weight_norm": "WeightNorm",
    "adaptive_avg_pool1d": "Conv1d", "addmm": "Addmm",
    "batch_norm": "ConvNormAct", "cat": "Concat", "chunk": "GatedUnit", "conv1d": "Conv1d", "conv2d": "Residual",
    "conv3d": "Conv3d", "conv_transpose2d": "Transposed", "dropout": "TransformerLayer", "einsum": "Einsum",
    "embedding": "WeightTying", "expand": "GroupedQuery", "flatten": "FlattenToLinear", "flip": "Split", "glu": "Glu",
    "group_norm": "GroupNormGroups", "gru": "Gru", "im2col": "Unfold", "index": "IndexedChannels",
    "index_select": "IndexedChannels", "instance_norm": "InstanceNorm", "layer_norm": "WeightTying", "linear":
    "GatedUnit", "linalg_vector_norm": "GlobalResponse", "lstm": "Lstm", "matmul": "WrittenOutAttention",
    "max_pool2d": "FlattenToLinear", "max_pool3d": "Conv3d", "mean": "SqueezeExcite", "pad": "PaddedShortcut",
    "permute": "ConvNextBlock", "pixel_shuffle": "PixelShuffle", "pixel_unshuffle": "PixelShuffle", "prelu":
    "Prelu", "repeat": "PixelShuffle", "repeat_interleave": "GroupedQuery", "reshape": "FusedAttention",
    "rms_norm": "RmsNorms", "roll": "Rolled", "scaled_dot_product_attention": "FusedAttention", "select":
    "CrossAttention", "slice": "StridedSlice", "softmax": "WrittenOutAttention", "split_with_sizes": "Split",
    "squeeze": "Conv1d", "transpose": "WrittenOutAttention", "unbind": "FusedAttention", "unflatten":
    "CrossAttention", "unsqueeze": "WrittenOutAttention", "upsample_bilinear2d": "Resized", "view": "Unfold",
    "zeros_like": "WrittenInPlace", "mT": "Reordered", "movedim": "Reordered", "stack": "Reordered",
    "channel_shuffle": "Reordered", "expand_as": "Reordered", "col2im": "Blocks", "unfold": "Blocks", "amax": "Blocks",
    "std": "Blocks", "grid_sampler": "Blocks", "fft_rfft2": "Spectrum", "view_as_complex": "Spectrum",
    "bilinear": "TwoFactors", "gather": "BestTokens", "slice_scatter": "Interleaved",
    "select_scatter": "OnePlaceWritten", "index_put": "ListsWritten", "index_copy": "ListsWritten",
    "scatter": "TokensScattered", "cdist": "Distances", "__and__": "Splines",
    "cosine_similarity": "Similar",
}  # fmt: skip
NO_ORDER = {"counted", "created"}  # cards whose indices are tied to nothing: there is no order to get wrong


def card_of(name: str) -> Card:
    return TAGGED[torch.Tag.pointwise] if name == "a pointwise one" else CARDS[name]


def give(name: str, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "a pointwise one":
        monkeypatch.setitem(TAGGED, torch.Tag.pointwise, card)
    else:
        monkeypatch.setitem(CARDS, name, card)


def test_every_card_is_broken_once_below() -> None:
    tried = {card_of(name).relate for name in USED_BY}
    left = {c.relate.__name__ for c in CARDS.values() if c.relate is not None and c.relate not in tried}
    assert left == NO_ORDER


def rolled(value: Any) -> Any:
    """The value with every index's atom moved on by one place."""
    if isinstance(value, tuple):
        return tuple(rolled(v) for v in value)
    if not isinstance(value, Value):
        return value
    atoms = tuple(None if a is None else np.roll(a, 1) for a in value.atoms)
    return Value(value.shape, atoms, value.zeros, value.derived)


@pytest.mark.parametrize("name", USED_BY)
def test_a_card_that_relates_the_wrong_indices_is_caught(
    name: str, experiment: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, lenient: None
) -> None:
    right = card_of(name)
    relate = right.relate
    assert relate is not None
    give(name, replace(right, relate=lambda t, node: rolled(relate(t, node))), monkeypatch)
    with pytest.raises((AssertionError, LeanortError, RuntimeError, IndexError)):
        check(USED_BY[name], experiment)


EDITED_IN = {
    "chunk": "UnequalChunks", "conv2d": "Grouped", "expand": "GroupedQuery", "group_norm": "GroupNormGroups",
    "index": "IndexedChannels", "index_select": "IndexedChannels", "layer_norm": "ConvNextBlock", "mean": "RmsNorms",
    "pad": "PaddedShortcut", "repeat": "BroadcastRepeat", "reshape": "ChannelShuffle", "rms_norm": "RmsNorms",
    "scaled_dot_product_attention": "OneHead", "slice": "StridedSlice", "split_with_sizes": "Split", "std": "Variance",
    "unflatten": "CrossAttentionPositions", "var": "Variance", "view": "Unfold", "zeros": "Lstm",
    "channel_shuffle": "Reordered", "select": "Selected", "squeeze": "Squeezed",
    "slice_scatter": "Interleaved", "select_scatter": "OnePlaceWritten", "index_put": "ListsWritten",
}  # fmt: skip


TRIED_ELSEWHERE = {
    "lstm"
}  # see operators/test_projected_lstm.py: a number of units that only one removal in many gives


def test_every_edit_is_left_out_once_below() -> None:
    tried = {CARDS[name].edit for name in (*EDITED_IN, *TRIED_ELSEWHERE)}
    assert not {name for name, c in CARDS.items() if c.edit is not None and c.edit not in tried}


@pytest.mark.parametrize("name", EDITED_IN)
def test_a_constant_that_is_not_rewritten_is_caught(
    name: str, experiment: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, lenient: None
) -> None:
    monkeypatch.setitem(CARDS, name, replace(CARDS[name], edit=None))
    with pytest.raises((AssertionError, LeanortError, RuntimeError, IndexError)):
        check(EDITED_IN[name], experiment)


class Dormant(nn.Module):
    """Channels that are zero for every input of the usual size, and alive far out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        nn.init.constant_(self.a.bias, -5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(F.relu(self.a(x))))


def test_what_is_zero_near_the_origin_only_stays() -> None:
    torch.manual_seed(0)
    captured = capture(Dormant(), (torch.randn(2, 30, 12),))
    analysis = analyse(captured)
    shrunk = shrink(captured, analysis, {"a": np.arange(8) < 4})
    assert [(r.cluster, r.groups) for r in shrunk.refused] == [("a", (0, 1, 2, 3))]


class PositionalGate(Ends):
    """Scores computed from parameters alone, repeated for every sample before they are normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.table.expand(x.shape[0], -1, -1).softmax(1)
        return self.head(torch.tanh(self.stem(x)) * scores.sum(-1)[..., None, None])


def test_what_is_repeated_for_every_sample_is_not_computed_once(experiment: Callable[..., Any]) -> None:
    found = experiment(PositionalGate(), *IMAGE)
    assert found.shrunk.ledger.frozen == {}
    for batch in (1, 4):
        prove(found.folded, found.shrunk, [small(found.captured, batch=batch)])


class Idle(nn.Module):
    """Computes a layer that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.idle = nn.Linear(12, 8), nn.Linear(8, 3), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        self.idle(x)
        return self.b(x)


def test_what_nobody_reads_is_not_counted(experiment: Callable[..., Any]) -> None:
    found = experiment(Idle(), torch.randn(2, 12))
    assert found.analysis.params == 12 * 8 + 8 + 8 * 3 + 3
    assert found.analysis.macs == 12 * 8 + 8 * 3


class ViewedAttention(nn.Module):
    """A view that only holds by the layout that attention's kernel writes."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (3, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).view(-1, 6, 12))


def test_a_view_does_not_count_on_the_layout_of_one_kernel(experiment: Callable[..., Any]) -> None:
    found = experiment(ViewedAttention(), torch.randn(2, 6, 12), policy=Policy(heads=False), ratio=0.5, seed=3)
    targets = [[n.target for n in one.program.graph.nodes] for one in (found.captured, found.shrunk)]
    assert [torch.ops.aten.view.default in nodes for nodes in targets] == [True, False]


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu() + torch.rand_like(x))


def test_a_model_that_draws_random_numbers_is_refused_by_that_name(experiment: Callable[..., Any]) -> None:
    with pytest.raises(RefusedError, match=r"random numbers in evaluation \(aten.rand_like.default at 'rand_like'\)"):
        experiment(Noisy(), torch.randn(2, 6, 12))
