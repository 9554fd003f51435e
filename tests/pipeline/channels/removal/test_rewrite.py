"""The cut of a graph: a mistake in a card's edit is not taken for a property of the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foundation.errors import RefusedError
from pipeline.channels import Shrunk, analyse, capture, shrink
from pipeline.channels.operators import CARDS


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)).view(-1, 6))


def cut(monkeypatch: pytest.MonkeyPatch, error: Exception) -> Shrunk:
    """Half of the neurons gone, where the view's edit raises `error`."""

    def fails(c: Any, node: Any) -> None:
        raise error

    monkeypatch.setitem(CARDS, "view", replace(CARDS["view"], edit=fails))
    analysis = analyse(capture(Net(), (torch.randn(5, 4),)))
    (cluster,) = analysis.clusters
    removed = {cluster.name: torch.arange(cluster.size).numpy() < 3}
    return shrink(analysis.captured.fold(analysis.masks(removed)), analysis, removed)


@pytest.mark.parametrize(
    "error", [KeyError("x"), TypeError("x"), AttributeError("x"), ValueError("x"), StopIteration()]
)
def test_a_mistake_in_an_edit_is_raised_here(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(type(error)):
        cut(monkeypatch, error)


def test_and_is_a_refusal_for_users(lenient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RefusedError, match="'view' cannot be rewritten"):
        cut(monkeypatch, KeyError("x"))


def test_what_torch_says_is_raised_as_it_is(lenient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        cut(monkeypatch, RuntimeError("out of memory"))
