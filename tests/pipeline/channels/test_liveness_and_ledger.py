"""What is dead is found from weights alone; what was done is written down and can be done again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.channels import Ledger, Policy, analyse, capture, dead_groups, prove, shrink, small
from pipeline.errors import CaptureError, WeightsError


class Net(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)
        self.c, self.act = nn.Conv2d(6, 4, 1), act

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.b(self.act(self.norm(self.a(x))))))


IMAGE = torch.randn(2, 3, 8, 8)


def test_dead_groups_are_those_that_were_masked(experiment: Callable[..., Any]) -> None:
    found = experiment(Net(), IMAGE)
    dead = dead_groups(found.analysis, found.folded.state)
    assert {n: f.tolist() for n, f in dead.items()} == {n: f.tolist() for n, f in found.removed.items()}
    assert dead_groups(found.analysis, found.captured.state) == {}


def test_a_channel_that_nothing_reads_dies_and_takes_what_fed_it_along(experiment: Callable[..., Any]) -> None:
    found = experiment(Net(), IMAGE)
    state = {n: v.detach().clone() for n, v in found.captured.state.items()}
    state["c.weight"][:, 2] = 0  # nobody reads b[2]
    state["b.weight"][[0, 1, 3, 4, 5], 5] = 0  # only b[2] read a[5]
    dead = dead_groups(found.analysis, state)
    assert dead["b"].tolist() == [False, False, True, False, False, False]
    assert np.flatnonzero(dead["a"]).tolist() == [5]
    folded = found.captured.with_state(state)
    prove(folded, shrink(folded, found.analysis, dead), [small(folded)])


def test_rows_alone_are_not_dead_while_the_norm_still_shifts(experiment: Callable[..., Any]) -> None:
    found = experiment(Net(), IMAGE)
    state = {n: v.detach().clone() for n, v in found.captured.state.items()}
    state["a.weight"][0] = 0
    state["a.bias"][0] = 0
    assert "a" not in dead_groups(found.analysis, state)
    shrunk = shrink(found.captured.with_state(state), found.analysis, {"a": np.arange(8) == 0})
    assert [r.groups for r in shrunk.refused] == [(0,)], "the zero check keeps it, with the reason"
    assert shrunk.ledger.groups == {}


def test_sigmoid_does_not_keep_zero(experiment: Callable[..., Any]) -> None:
    found = experiment(Net(torch.sigmoid), IMAGE)
    state = {n: v.detach().clone() for n, v in found.captured.state.items()}
    for name in ("b.weight", "b.bias"):
        state[name][1] = 0
    assert shrink(found.captured.with_state(state), found.analysis, {"b": np.arange(6) == 1}).refused


def test_the_ledger_repeats_and_reverses_a_removal(experiment: Callable[..., Any]) -> None:
    found = experiment(Net(), IMAGE)
    ledger = Ledger.from_json(found.shrunk.ledger.to_json())
    assert ledger == found.shrunk.ledger
    again = ledger.shrink_state(found.folded.state)
    assert all(torch.equal(again[n], v) for n, v in found.shrunk.program.state_dict.items())
    dense = ledger.restore_state(again)
    assert torch.equal(dense["b.weight"], found.folded.state["b.weight"])
    gone = np.flatnonzero(found.removed["b"]).tolist()
    assert ledger.why("b")["removed"]["b.weight[0]"] == gone
    with pytest.raises(WeightsError):
        ledger.shrink_state({**found.folded.state, "b.weight": torch.zeros(1)})
    with pytest.raises(WeightsError):
        Ledger.from_json("{}")


def test_the_policy_decides_what_may_go(experiment: Callable[..., Any]) -> None:
    layer = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True)
    captured = capture(nn.Sequential(nn.Linear(12, 12), layer, nn.Linear(12, 2)), (torch.randn(2, 5, 12),))
    assert {c.kind for c in analyse(captured).clusters} == {"residual", "head", "neuron"}
    assert {c.kind for c in analyse(captured, Policy(residual=False)).clusters} == {"head", "neuron"}
    positions = analyse(captured, Policy(heads=False, residual=False, neurons=False))
    assert {c.kind for c in positions.clusters} == {"head_position"}
    assert not analyse(captured, Policy(False, False, False, False, False)).clusters


def test_what_cannot_be_captured_is_refused_with_the_reason() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(CaptureError, match="cannot capture"):
        capture(Branches(), (IMAGE,))
    with pytest.raises(CaptureError, match="TorchScript"):
        capture(torch.jit.script(nn.Linear(2, 2)), (IMAGE,))
    with pytest.raises(CaptureError, match="not a torch.nn.Module"):
        capture(object(), (IMAGE,))  # type: ignore[arg-type]
