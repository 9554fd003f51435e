"""Zeros around a max pooling."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F


class PaddedPool(nn.Module):
    """Zeros around a max pooling of numbers below zero: its own padding would be minus infinity."""

    def __init__(self, pad):
        super().__init__()
        self.conv, self.pad = nn.Conv2d(2, 2, 1), pad

    def forward(self, x):
        return F.max_pool2d(self.pad(-torch.exp(self.conv(x))), 3, stride=2)


@pytest.mark.parametrize(
    "pad", [nn.ZeroPad2d(1), nn.ConstantPad2d(1, 0.0), lambda x: F.pad(x, (1, 1, 1, 1))], ids=["zero", "value", "plain"]
)
def test_zeros_around_a_max_pooling_stay_zeros(program_of, check, pad, tmp_path):
    program = program_of(PaddedPool(pad), torch.randn(4, 2, 8, 8))
    check(program, tmp_path / "pool.onnx", (torch.randn(3, 2, 8, 8),))
