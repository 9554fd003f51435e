"""What is refused before anything is captured, and what a refusal says."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from foundation.errors import CaptureError
from pipeline.channels import capture


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_by_that_name(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).to(dtype)
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(CaptureError, match=rf"half precision .*'0\.weight' in {kind}.*model\.float\(\)"):
        capture(model, (torch.randn(2, 3, 4, 4, dtype=dtype),))


def test_one_half_layer_is_enough() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).half())
    with pytest.raises(CaptureError, match=r"2 of its 4 tensors, first '1\.weight'"):
        capture(model, (torch.randn(2, 3),))


class Keyed(nn.Module):
    def __init__(self, key: str) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({key: nn.Linear(3, 4)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


@pytest.mark.parametrize("key", ["a b", "a/b", "größe"])
def test_a_name_that_no_stored_program_may_have_is_refused_at_once(key: str) -> None:
    with pytest.raises(CaptureError, match=rf"calls a tensor 'layers\.{key}\.weight'") as refused:
        capture(Keyed(key), (torch.randn(2, 3),))
    assert "key of a ModuleDict" in refused.value.hint
    assert capture(Keyed("a-b_1"), (torch.randn(2, 3),))


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("The library of custom operators is not there.")


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_a_model_that_fails_by_itself_is_not_told_of_control_flow() -> None:
    with pytest.raises(CaptureError, match=r"custom operators is not there\)\. Look at test_capture\.py") as refused:
        capture(Broken(), (torch.randn(2, 3),))
    assert "control flow" not in str(refused.value)
    with pytest.raises(CaptureError, match="control flow"):
        capture(Branching(), (torch.randn(2, 3),))


class Caching(nn.Module):
    """Keeps a table of positions from call to call, anew for another size: so do detectors with their anchors."""

    size = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.size != x.shape[1]:
            self.size, self.positions = x.shape[1], torch.arange(x.shape[1]).float()
        return x * self.positions


def test_what_a_forward_keeps_from_call_to_call_is_not_that_of_the_capture() -> None:
    model = nn.Sequential(nn.Linear(3, 4), Caching())
    capture(model, (torch.randn(2, 3),))
    assert not hasattr(model[1], "positions")
    copy.deepcopy(model)(torch.randn(2, 3))
    model(torch.randn(5, 3))
    kept = model[1].positions
    assert torch.isfinite(capture(model, (torch.randn(2, 3),)).program.module()(torch.randn(3, 3))).all()
    assert model[1].positions is kept
