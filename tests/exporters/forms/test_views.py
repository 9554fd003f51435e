"""A view becomes a reshape, and nothing else changes."""

import torch
from torch import nn

from exporters.translatable import translatable


class Flattened(nn.Module):
    """A view of what no attention gives."""

    def forward(self, x):
        return x.relu().view(-1, 6)


def test_a_view_becomes_a_reshape_and_needs_no_copy(program_of, check, tmp_path):
    x = torch.randn(4, 2, 3)
    program = program_of(Flattened(), x)
    kinds = [[n.target for n in one.graph.nodes] for one in (program, translatable(program))]
    assert [torch.ops.aten.view.default in nodes for nodes in kinds] == [True, False]
    assert [torch.ops.aten.reshape.default in nodes for nodes in kinds] == [False, True]
    assert torch.ops.aten.clone.default not in kinds[1]
    check(program, tmp_path / "model.onnx", [x[:3]])
