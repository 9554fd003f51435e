"""One mask of keys for all queries."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F


class MaskedKeys(nn.Module):
    """One mask of keys for all queries."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(12, 36)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(x[..., 0] > -1)[:, None, None])


@pytest.mark.parametrize("opset", [20, 23])
def test_one_mask_of_keys_for_all_queries(program_of, check, opset, tmp_path):
    program = program_of(MaskedKeys(), torch.randn(4, 6, 12))
    check(program, tmp_path / "masked.onnx", (torch.randn(3, 6, 12),), opset=opset)
