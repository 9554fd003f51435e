"""Whole numbers taken from a fraction."""

import torch
from torch import nn


class Inverted(nn.Module):
    """A mask of whole numbers taken from one, as encoders do."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return self.fc(x) + (1.0 - (x > 0).long()) * -3.5


def test_whole_numbers_taken_from_a_fraction(program_of, check, tmp_path):
    program = program_of(Inverted(), torch.randn(4, 6))
    check(program, tmp_path / "inverted.onnx", (torch.randn(3, 6),))
