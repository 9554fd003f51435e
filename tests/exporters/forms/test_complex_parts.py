"""Complex numbers written into a part of a tensor."""

import torch
from torch import nn


class LowFrequencies(nn.Module):
    """Only the lowest frequencies pass, as in a neural operator."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, dtype=torch.complex64))

    def forward(self, x):
        spectrum = torch.fft.rfft(x, dim=1)
        out = torch.zeros(x.shape[0], 5, 6, dtype=torch.complex64)
        out = torch.slice_scatter(out, spectrum[:, :3] * self.weight, 1, 0, 3)
        out = torch.select_scatter(out, spectrum[:, None].squeeze(-3)[:, 4], 1, -1)
        return torch.fft.irfft(out, n=8, dim=1)


def test_a_part_is_written(program_of, check, tmp_path):
    with torch.no_grad():  # PyTorch itself has no gradient for it
        program = program_of(LowFrequencies(), torch.randn(4, 8, 6))
        check(program, tmp_path / "m.onnx", *[(torch.randn(batch, 8, 6),) for batch in (1, 3)])
