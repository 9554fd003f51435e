"""Norms over channels that lose some: the same function in float64, float32, onnxruntime and training.

Nothing here knows which operators a rewritten norm consists of.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from exporters import to_onnx
from pipeline.channels import Trainable, count_macs, small
from pipeline.channels.removal.verify import difference
from validators import OrtRunner

WIDTH = 16
NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(WIDTH),
    "layer without shift": lambda: nn.LayerNorm(WIDTH, bias=False),
    "layer without affine": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
    "layer, large eps": lambda: nn.LayerNorm(WIDTH, eps=0.5),
    "layer over tokens too": lambda: nn.LayerNorm((5, WIDTH)),
    "rms": lambda: nn.RMSNorm(WIDTH),
    "rms, large eps": lambda: nn.RMSNorm(WIDTH, eps=0.5),
    "group of all": lambda: OverDim1(nn.GroupNorm(1, WIDTH)),
    "group of all, large eps": lambda: OverDim1(nn.GroupNorm(1, WIDTH, eps=0.5)),
    "groups": lambda: OverDim1(nn.GroupNorm(4, WIDTH)),
    "written out, pow": lambda: WrittenOut("pow"),
    "written out, product": lambda: WrittenOut("product"),
    "written out over tokens too": lambda: WrittenOut("square"),
}


class WrittenOut(nn.Module):
    """LayerNorm as people write it: squared deviations from the mean, in one of the usual ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "pow":
            away = x - x.mean(-1, keepdim=True)
            var = away.pow(2).mean(-1, keepdim=True)
        elif self.way == "product":
            away = x - x.mean(-1).unsqueeze(-1)
            var = (away * away).mean(-1).unsqueeze(-1)
        else:
            away = x - x.mean((1, 2), keepdim=True)
            var = torch.square(away).mean((1, 2), keepdim=True)
        return away / torch.sqrt(var + 1e-5) * self.weight + self.bias


class OverDim1(nn.Module):
    """A norm that wants channels in dimension 1, on channels in the last."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class PreNorm(nn.Module):
    """A residual stream that every branch reads through a norm, and the last layer raw."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(6, WIDTH), nn.Parameter(torch.randn(1, 5, WIDTH))
        self.norms = nn.ModuleList(make() for _ in range(2))
        self.branches = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        for norm, branch in zip(self.norms, self.branches, strict=True):
            x = x + torch.tanh(branch(norm(x)))
        return self.head(x)


class PostNorm(PreNorm):
    """The stream itself is normalised: what leaves the norm is added to."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        for norm, branch in zip(self.norms, self.branches, strict=True):
            x = norm(x + torch.tanh(branch(x)))
        return self.head(x)


PRE = ("layer without shift", "layer without affine", "layer, large eps", "layer over tokens too", "rms, large eps",
       "group of all, large eps", "written out, product", "written out over tokens too")  # fmt: skip
POST = ("layer", "rms", "groups", "written out, pow")
CASES = [*((PreNorm, name) for name in PRE), *((PostNorm, name) for name in POST)]
X = torch.randn(2, 5, 6)


@pytest.mark.parametrize(("net", "name"), CASES)
def test_a_norm_keeps_its_original_count(
    net: type[PreNorm], name: str, experiment: Callable[..., Any], tmp_path: Path
) -> None:
    e = experiment(net(NORMS[name]), X)
    assert not e.shrunk.refused
    assert e.shrunk.program.state_dict["embed.weight"].shape[0] < WIDTH
    assert e.proof.max_abs_diff_float64 is not None
    assert e.proof.max_abs_diff_float64 <= 1e-10 * max(1.0, e.proof.output_scale)
    assert e.control > 1e3 * e.proof.max_abs_diff
    assert count_macs(e.shrunk.program) == e.analysis.estimate(e.removed).macs
    opset = 20 if net is PreNorm else 23
    to_onnx(e.shrunk.program, tmp_path / "m.onnx", example=(), opset=opset, metadata={})
    runner = OrtRunner(tmp_path / "m.onnx", threads=1)
    for batch in (1, 3):
        (x,) = small(e.captured, batch=batch, seed=batch)
        expected = e.folded(x).detach().numpy()
        (found,) = runner.infer({"input": x.numpy()}).values()
        assert found.shape == expected.shape
        assert abs(found - expected).max() <= 1e-5 * max(1.0, abs(expected).max())


def test_a_channel_that_a_norm_without_scale_moves_off_zero_stays(experiment: Callable[..., Any]) -> None:
    # (0 − mean)/σ is not zero, and it is added to the stream and read raw.
    e = experiment(PostNorm(NORMS["layer without affine"]), X)
    assert e.shrunk.program.state_dict["embed.weight"].shape[0] == WIDTH


@pytest.mark.parametrize("name", ["layer", "group of all"])
def test_a_mean_far_above_the_spread_costs_no_more_digits_than_before(
    name: str, experiment: Callable[..., Any]
) -> None:
    e = experiment(PreNorm(NORMS[name]), X)
    far = [(1e3 * torch.ones(2, 5, 6) + torch.randn(2, 5, 6),)]
    (feed,) = far
    exact = e.folded(*feed, dtype=torch.float64)
    before = float((e.folded(*feed) - exact).abs().max())
    after = float((e.shrunk(*feed) - exact).abs().max())
    assert after <= 4 * before + 1e-5 * max(1.0, float(exact.abs().max()))
    worst, scale, _ = difference(e.folded, e.shrunk, far, torch.float64)
    assert worst <= 1e-10 * max(1.0, scale)


@pytest.mark.parametrize("name", ["layer", "rms", "group of all"])
def test_training_goes_the_way_it_would_have_gone_under_masks(name: str, experiment: Callable[..., Any]) -> None:
    e = experiment(PreNorm(NORMS[name]), X)
    after = Trainable(e.shrunk.program)
    after(X).square().mean().backward()
    found = {n: p.grad for n, p in after.named_parameters()}
    before = e.folded.program.module(check_guards=False)
    before.load_state_dict(e.folded.state)
    before(X).square().mean().backward()
    compared = 0
    for n, p in before.named_parameters():
        expected = p.grad
        for dim, indices in e.shrunk.ledger.kept.get(n, {}).items():
            expected = expected.index_select(dim, torch.tensor(indices))
        assert torch.allclose(found[n], expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
        compared += 1
    assert compared == len(found) >= 9
