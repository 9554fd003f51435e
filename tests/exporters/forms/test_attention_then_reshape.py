"""Attention's output put in order before it is reshaped."""

import torch
from torch import nn
from torch.nn import functional as F

from exporters.translatable import translatable


class Viewed(nn.Module):
    """A view that holds only by the layout that one kernel of attention writes."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(12, 36)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        mask = (x.sum(-1) > 0)[:, None, None] | torch.eye(6, dtype=torch.bool)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).view(-1, 6, 12)


def test_a_view_that_holds_by_its_strides(program_of, check, tmp_path):
    x = torch.randn(4, 6, 12)
    program = program_of(Viewed(), x)
    check(program, tmp_path / "model.onnx", [x[:3]])
    kinds = [[n.target for n in one.graph.nodes] for one in (program, translatable(program))]
    assert [torch.ops.aten.view.default in nodes for nodes in kinds] == [True, False]
    assert [torch.ops.aten.clone.default in nodes for nodes in kinds] == [False, True]
