"""What may go although its weights alone do not show a zero, and what may not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.channels import analyse, capture
from pipeline.channels.removal.verify import NOT_ZERO, zero_check


class Net(nn.Module):
    def __init__(self, act: Any) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(3, 4), nn.Linear(4, 2), act

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)))


def checked(net: Net) -> tuple[list[bool], list[tuple[tuple[int, ...], str]], int]:
    """(which of four channels may go when the first two are asked to; refusals; readers that take constants)."""
    captured = capture(net.eval(), (torch.randn(2, 3),))
    analysis = analyse(captured)
    removed = {"a": np.array([True, True, False, False])}
    gone, refusals, shifts = zero_check(captured, analysis, analysis.gone(removed), removed)
    going = gone[next(s.atoms for s in analysis.slots if (s.name, s.dim) == ("a.weight", 0))]
    return going.tolist(), [(r.groups, r.reason) for r in refusals], len(shifts)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net(torch.relu)


def test_columns_of_zeros_are_enough(net: Net) -> None:
    with torch.no_grad():
        net.b.weight[:, :2] = 0
    assert checked(net) == ([True, True, False, False], [], 0)


def test_so_is_an_activation_that_is_zero_when_the_graph_runs(net: Net) -> None:
    with torch.no_grad():
        net.a.weight[:2], net.a.bias[:2] = 0, -1.0
    assert checked(net) == ([True, True, False, False], [], 0)


def test_a_constant_goes_into_the_bias(net: Net) -> None:
    with torch.no_grad():
        net.a.weight[:2], net.a.bias[:2] = 0, 1.0
    assert checked(net) == ([True, True, False, False], [], 1)


def test_what_is_alive_stays_with_the_reason() -> None:
    net = Net(torch.tanh)
    with torch.no_grad():
        net.b.weight[:, 0] = 0
    assert checked(net) == ([True, False, False, False], [((1,), NOT_ZERO)], 0)


def test_what_is_zero_only_near_the_origin_stays() -> None:
    net = Net(lambda x: torch.relu(x.abs() - 40.0))
    with torch.no_grad():
        net.a.weight[:2], net.a.bias[:2] = 5.0, 0.0
    going, refusals, _ = checked(net)
    assert going == [False] * 4 and refusals == [((0, 1), NOT_ZERO)]
