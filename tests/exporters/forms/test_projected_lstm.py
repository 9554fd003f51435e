"""LSTMs with projections, which ONNX does not have."""

import pytest
import torch
from torch import nn

from exporters.translatable import translatable


class Recurrent(nn.Module):
    """Everything that a projected LSTM gives."""

    def __init__(self, given=False, **options):
        super().__init__()
        self.rnn = nn.LSTM(6, 5, proj_size=3, batch_first=True, **options)
        self.first = nn.Parameter(torch.randn(1, 1, 3)) if given else None

    def forward(self, x):
        start = None
        if self.first is not None:
            start = self.first.expand(-1, x.shape[0], -1), torch.ones(1, x.shape[0], 5)
        every, (last, cells) = self.rnn(x, start)
        return torch.cat([every.flatten(1), last.transpose(0, 1).flatten(1), cells.transpose(0, 1).flatten(1)], 1)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}])
def test_a_projection_stands_behind_a_plain_lstm(program_of, check, options, tmp_path):
    program = program_of(Recurrent(**options), torch.randn(4, 7, 6))
    check(program, tmp_path / "m.onnx", *[(torch.randn(batch, 7, 6),) for batch in (1, 3)])


def test_one_that_starts_from_something_else_is_left(program_of):
    program = program_of(Recurrent(given=True), torch.randn(4, 7, 6))
    assert any(n.target is torch.ops.aten.lstm.input for n in translatable(program).graph.nodes)
