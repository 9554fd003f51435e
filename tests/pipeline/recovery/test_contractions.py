"""Every contraction: rows times matrix is what the operator gives, anywhere, and matrices go back to weights."""

import pytest
import torch
from torch import nn

from pipeline.channels.program.capture import capture
from pipeline.channels.program.execute import execute, feeds_of
from pipeline.recovery.contractions import contraction, weight_of


class Product(nn.Module):
    """x · W, by the operator given."""

    def __init__(self, operator, *size):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*size))
        self.operator = operator

    def forward(self, x):
        return self.operator(x, self.weight)


class Conv1D(nn.Module):
    """GPT-2's layer: a weight of (inputs, outputs) and addmm."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, 6), self.weight).view(*x.shape[:-1], 4)


CASES = {
    "linear of 2 dimensions": (nn.Linear(6, 4), (6,)),
    "linear of 3 dimensions": (nn.Linear(6, 4, bias=False), (7, 6)),
    "linear of 4 dimensions": (nn.Linear(6, 4), (3, 7, 6)),
    "addmm": (Conv1D(), (7, 6)),
    "mm": (Product(torch.mm, 6, 4), (6,)),
    "matmul": (Product(torch.matmul, 6, 4), (3, 7, 6)),
    "conv1d": (nn.Conv1d(6, 4, 3, stride=2, dilation=2, padding=1), (6, 11)),
    "conv1d same, even kernel": (nn.Conv1d(6, 4, 4, padding="same"), (6, 11)),
    "conv2d": (nn.Conv2d(6, 4, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(2, 1)), (6, 9, 8)),
    "conv2d same": (nn.Conv2d(6, 4, (4, 3), dilation=(1, 2), padding="same"), (6, 9, 8)),
    "conv2d valid": (nn.Conv2d(6, 4, 3, padding="valid"), (6, 9, 8)),
    "conv2d grouped": (nn.Conv2d(6, 9, 3, groups=3, bias=False), (6, 9, 8)),
    "conv2d depthwise": (nn.Conv2d(6, 6, 3, groups=6, padding=1), (6, 9, 8)),
    "conv2d depthwise with multiplier": (nn.Conv2d(6, 12, (1, 3), groups=6, padding=1, stride=2), (6, 9, 8)),
    "conv3d": (nn.Conv3d(4, 6, (1, 3, 2), stride=(1, 2, 1), padding=(1, 0, 1), groups=2), (4, 4, 5, 6)),
    "conv3d same": (nn.Conv3d(4, 6, (2, 3, 1), padding="same"), (4, 4, 5, 6)),
    "transposed 1d": (nn.ConvTranspose1d(6, 4, 3, stride=2, output_padding=1, padding=1), (6, 7)),
    "transposed 2d": (nn.ConvTranspose2d(6, 4, (3, 2), stride=(2, 3), dilation=(2, 1), bias=False), (6, 5, 4)),
    "transposed 2d, much padding": (nn.ConvTranspose2d(6, 4, 2, stride=2, padding=2), (6, 5, 4)),
    "transposed 2d grouped": (nn.ConvTranspose2d(6, 9, 3, stride=2, groups=3, output_padding=(1, 0)), (6, 5, 4)),
    "transposed 2d depthwise": (nn.ConvTranspose2d(6, 6, 4, stride=2, padding=1, groups=6), (6, 5, 4)),
    "transposed 3d": (nn.ConvTranspose3d(4, 6, (1, 2, 3), stride=(1, 2, 2), groups=2, padding=(0, 1, 1)), (4, 2, 3, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_times_matrix_is_the_output(name):
    torch.manual_seed(0)
    model, size = CASES[name]
    captured = capture(model, (torch.randn(2, *size),))
    feeds = {}
    inputs = (torch.randn(3, *size),)
    execute(
        captured.program.graph,
        feeds_of(captured.program, inputs),
        watch=lambda node, value: feeds.update({node: value}),
    )
    node = next(n for n in feeds if weight_of(n) is not None)
    weight = feeds[weight_of(node)]
    found = contraction(node, weight)
    x, y = feeds[found.x], feeds[node]
    matrix = found.to_matrix(weight)
    assert torch.equal(found.from_matrix(matrix), weight)
    assert found.from_matrix(matrix).is_contiguous()
    count = found.count(y)
    assert count == y[0].numel() // matrix.shape[:2].numel()
    for positions in (torch.arange(count), torch.randperm(count)[: max(1, count // 3)]):
        rows, targets = found.rows(x, positions), found.targets(y, positions)
        assert rows.shape == (len(x), len(positions), matrix.shape[0], matrix.shape[2])
        got = torch.einsum("bpgc,goc->bpgo", rows, matrix)
        if found.bias is not None:
            got = got + feeds[found.bias].reshape(matrix.shape[:2])
        torch.testing.assert_close(got, targets, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        Product(lambda x, w: torch.matmul(w, x.mT).mT, 4, 6),
        Product(lambda x, w: torch.addmm(torch.zeros(4), x[:, 0], w, alpha=2.0), 6, 4),
        Product(lambda x, w: torch.matmul(x.unsqueeze(2), w), 7, 6, 4),
        Product(lambda x, w: x * w, 7, 6),
    ],
    ids=["weight on the left", "scaled addmm", "batched weight", "product of elements"],
)
def test_what_is_no_plain_contraction_has_no_rule(model):
    captured = capture(model, (torch.randn(2, 7, 6),))
    held = {s.arg.name: captured.state.get(s.target) for s in captured.program.graph_signature.input_specs}
    for node in captured.program.graph.nodes:
        weight = weight_of(node)
        assert weight is None or contraction(node, held.get(weight.name)) is None
