"""One walk over a graph: what is refused and why, and that a mistake in a card is not taken for a refusal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.channels import Policy, analyse, capture
from pipeline.channels.coupling.walk import walk
from pipeline.channels.operators import CARDS, TAGGED, Card
from pipeline.channels.operators.strict import strictly
from pipeline.channels.operators.trace import NoRule


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.a(x)))


X = torch.randn(2, 4)


def fails(error: Exception) -> Any:
    def relate(t: Any, node: Any) -> Any:
        raise error

    return relate


def broken(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    card = TAGGED[torch.Tag.pointwise]
    monkeypatch.setitem(TAGGED, torch.Tag.pointwise, replace(card, relate=fails(error)))


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), AttributeError("x"), ValueError("x")])
def test_a_mistake_in_a_card_is_raised_here(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, error)
    with pytest.raises(type(error)):
        analyse(capture(Net(), (X,)))


def test_and_is_a_refusal_for_users(lenient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, KeyError("x"))
    analysis = analyse(capture(Net(), (X,)))
    assert analysis.clusters == ()
    assert list(analysis.trace.unknown.values()) == ["no rule for this form of gelu"]


def test_a_refusal_that_is_meant_is_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, NoRule("not this one"))
    analysis = analyse(capture(Net(), (X,)))
    assert [(n.name, r) for n, r in analysis.trace.unknown.items()] == [("gelu", "not this one")]
    assert {b.reason for b in analysis.blocked} >= {"not this one"}


def test_an_operator_without_a_card_pins_what_it_touches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CARDS, "gelu", Card("pointwise"))
    analysis = analyse(capture(Net(), (X,)))
    assert list(analysis.trace.unknown.values()) == ["no rule for gelu"] and not analysis.clusters


def test_a_bias_that_is_not_zero_ends_a_zero() -> None:
    captured = capture(Net(), (X,))
    trace, slots = walk(captured, Policy())
    assert {(s.name, s.dim): len(s.atoms) for s in slots} == {
        ("a.weight", 0): 6, ("a.weight", 1): 4, ("a.bias", 0): 6,
        ("b.weight", 0): 3, ("b.weight", 1): 6, ("b.bias", 0): 3,
    }  # fmt: skip
    rows = torch.tensor([True, False, True, False, False, False]).numpy()
    bias = torch.tensor([True, True, False, False, False, False]).numpy()
    now, _ = walk(captured, Policy(), {("a.weight", 0): rows, ("a.bias", 0): bias})
    (gelu,) = (n for n in now.values if n.name == "gelu")
    assert now.value(gelu).zeros[1].tolist() == [True, False, False, False, False, False]
    assert trace.value(gelu).zeros[1].all()


class OneLength(nn.Module):
    """A weight of one length in all (`weight_norm` with dim=None)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.utils.parametrizations.weight_norm(nn.Linear(12, 8), dim=None), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


def test_a_weight_of_one_length_is_kept_for_that_reason() -> None:
    with strictly():
        analysis = analyse(capture(OneLength().eval(), (torch.randn(2, 12),)))
    assert not analysis.trace.unknown
    assert "normalised over" in {b.reason for b in analysis.blocked}
