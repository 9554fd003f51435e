"""Products of complex numbers."""

import pytest
import torch
from torch import nn


class Mixed(nn.Module):
    """Frequencies mixed over channels with complex weights."""

    def __init__(self, product):
        super().__init__()
        self.weight, self.product = nn.Parameter(torch.randn(6, 5, dtype=torch.complex64)), product

    def forward(self, x):
        return torch.fft.irfft(self.product(torch.fft.rfft(x, dim=1), self.weight), n=8, dim=1)


@pytest.mark.parametrize("product", [torch.matmul, lambda x, w: torch.einsum("btc,cd->btd", x, w)])
def test_a_product_is_four_of_real_numbers(program_of, check, product, tmp_path):
    program = program_of(Mixed(product), torch.randn(4, 8, 6))
    check(program, tmp_path / "m.onnx", *[(torch.randn(batch, 8, 6),) for batch in (1, 3)])
