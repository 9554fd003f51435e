"""Pieces of a dimension of no fixed size."""

import pytest
import torch
from torch import nn


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


@pytest.mark.parametrize("split", [False, True], ids=["chunk", "split"])
def test_pieces_of_a_dimension_that_depends_on_the_batch(program_of, check, split, tmp_path):
    program = program_of(Pairs(split), torch.randn(4, 6), torch.randn(4, 6))
    check(program, tmp_path / "pairs.onnx", (torch.randn(3, 6), torch.randn(3, 6)))
