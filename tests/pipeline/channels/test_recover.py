"""A shrunk program can be trained: running statistics move, gradients reach every parameter, eval gives the program
back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.channels import Trainable, with_weights


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.a(x))).mean((2, 3))
        return self.b(F.dropout(x, 0.5, self.training))


def test_training_moves_weights_and_statistics_and_comes_back(experiment: Callable[..., Any]) -> None:
    found = experiment(Net(), torch.randn(2, 3, 8, 8))
    x = torch.randn(4, 3, 8, 8)
    module = Trainable(found.shrunk.program)
    torch.testing.assert_close(module(x), found.shrunk(x))
    module.train()
    assert not torch.equal(module(x), module(x)), "dropout is off"
    before = module.weights()["norm.running_mean"].clone()
    module(x).square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    assert not torch.equal(before, module.weights()["norm.running_mean"])
    torch.optim.SGD(module.parameters(), 0.1).step()
    module.eval()
    torch.testing.assert_close(with_weights(found.shrunk, module.weights())(x), module(x))
