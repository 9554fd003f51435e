"""Distances between all pairs of two sets of vectors."""

import pytest
import torch
from torch import nn


class Distances(nn.Module):
    def __init__(self, entries, **options):
        super().__init__()
        self.table, self.options = nn.Parameter(torch.randn(entries, 6)), options

    def forward(self, x):
        return torch.cdist(x, self.table, **self.options)


@pytest.mark.parametrize(
    ("entries", "options"),
    [
        (5, {}), (40, {}), (5, {"p": 1.0}), (40, {"p": float("inf")}), (40, {"p": 3.0}),
        (5, {"compute_mode": "use_mm_for_euclid_dist"}), (40, {"compute_mode": "donot_use_mm_for_euclid_dist"}),
    ],
)  # fmt: skip
def test_distances_are_written_out(program_of, check, entries, options, tmp_path):
    program = program_of(Distances(entries, **options), torch.randn(4, 7, 6))
    check(program, tmp_path / "m.onnx", *[(torch.randn(batch, 7, 6),) for batch in (1, 3)])
