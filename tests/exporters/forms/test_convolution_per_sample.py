"""Convolutions whose weights are mixed for every sample."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F


class PerSample(nn.Module):
    """The batch is folded into the groups."""

    def __init__(self, outputs, kernel, **options):
        super().__init__()
        self.groups = options.pop("groups", 1)
        self.experts = nn.Parameter(torch.randn(3, outputs * (4 // self.groups) * kernel**2))
        self.biases = nn.Parameter(torch.randn(3, outputs))
        self.kernel, self.outputs, self.options = kernel, outputs, options

    def forward(self, x):
        batch, channels, *space = x.shape
        mix = x.mean((2, 3))[:, :3].softmax(1)
        weight = (mix @ self.experts).view(batch * self.outputs, -1, self.kernel, self.kernel)
        bias = (mix @ self.biases).view(batch * self.outputs)
        x = x.reshape(1, batch * channels, *space)
        y = F.conv2d(x, weight, bias, groups=batch * self.groups, **self.options)
        return y.view(batch, self.outputs, *y.shape[2:])


@pytest.mark.parametrize(
    ("outputs", "kernel", "options"),
    [
        (6, 1, {}), (6, 3, {"padding": 1, "stride": 2}), (8, 3, {"groups": 4, "padding": 2, "dilation": 2}),
        (6, 3, {"groups": 2}),
    ],
)  # fmt: skip
def test_the_batch_is_a_dimension_again(program_of, check, outputs, kernel, options, tmp_path):
    program = program_of(PerSample(outputs, kernel, **options), torch.randn(4, 4, 8, 7))
    check(program, tmp_path / "m.onnx", *[(torch.randn(batch, 4, 8, 7),) for batch in (1, 3)])
