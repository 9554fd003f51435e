"""Which nodes are the same for every input and whatever the weights are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.channels import capture
from pipeline.channels.program.static import static_values


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(4), persistent=False)
        self.register_buffer("stored", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        index = (self.table + 1) % 4  # known
        mask = x.new_zeros(4) + 2.0  # known: only the type of x is used
        noise = torch.rand(4)  # drawn anew each time
        drop = F.dropout(torch.ones(4), 0.5, True)  # so is this
        held = self.stored * 2  # a value of the state, which fine-tuning may change
        filled = torch.zeros(4)
        filled.add_(x[0])  # written to from outside
        return self.fc(x)[:, index] * mask + noise + drop + held + filled


def test_what_depends_on_nothing_has_its_value() -> None:
    captured = capture(Net().eval(), (torch.randn(2, 4),))
    found = {node.name: value for node, value in static_values(captured).items()}
    assert found["remainder"].tolist() == [1, 2, 3, 0]
    by_target = {str(n.target).split(".")[1] for n in static_values(captured) if n.op == "call_function"}
    assert by_target >= {"arange", "remainder", "new_zeros", "ones"} - {"arange"}
    assert not by_target & {"rand", "dropout", "mul", "zeros", "add_", "linear", "index"}
    assert found["add_1"].tolist() == [2.0] * 4


def test_running_it_leaves_the_models_own_tensors_alone() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.zeros(3), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table.clone().add_(1)

    captured = capture(Writing(), (torch.randn(2, 3),))
    static_values(captured)
    assert all((v == 0).all() for v in captured.program.constants.values())
