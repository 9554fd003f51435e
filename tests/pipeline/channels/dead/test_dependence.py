"""Which elements depend on an input, along a whole graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.channels import capture
from pipeline.channels.dead.dependence import follow
from pipeline.channels.operators import CARDS


class Net(nn.Module):
    """Four channels, of which the first is cut off by a scale of zero."""

    def __init__(self, form: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.form = form
        self.scale = nn.Parameter(torch.tensor([0.0, 1.0, 2.0, 3.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x * self.scale)


def depends(form: Callable[[Tensor], Tensor]) -> list[bool]:
    """For each index of the last dimension of `form`'s result, whether it depends on the input."""
    captured = capture(Net(form), (torch.randn(2, 4),))
    found: dict[str, Tensor] = {}
    follow(captured, lambda node, value, mask: found.update({node.name: mask}))
    (last,) = next(n for n in captured.program.graph.nodes if n.op == "output").args[0]
    mask = found[last.name]
    return mask.reshape(-1, mask.shape[-1]).any(0).tolist()


def written(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 1:] = x[:, 1:]
    return y


CUT, ALL = [False, True, True, True], [True] * 4


@pytest.mark.parametrize(
    ("form", "want"),
    [
        (lambda x: F.gelu(x) + 1, CUT),
        (lambda x: x.flip(1), CUT[::-1]),
        (lambda x: x.clone().mul_(2), CUT),
        (lambda x: torch.stack(x.split(2, 1)).amax(0), [True, True]),
        (lambda x: x.softmax(1), ALL),
        (lambda x: x + torch.rand_like(x), ALL),  # nobody knows what is drawn
        (lambda x: torch.cat([torch.ones(1, 4), x])[:1], [False] * 4),
        (lambda x: torch.zeros_like(x).add_(x), ALL),  # the card of zeros_like does not say
        (written, ALL),  # it writes into a view: the whole graph is given up
    ],
)
def test_a_zero_scale_cuts_a_channel_off_as_long_as_it_stays_by_itself(form: Any, want: list[bool]) -> None:
    assert depends(form) == want


def test_a_mistake_in_a_card_is_raised_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(m: Any, node: Any, value: Any) -> Any:
        raise AttributeError("ours")

    monkeypatch.setitem(CARDS, "mul", replace(CARDS["mul"], depends=wrong))
    with pytest.raises(AttributeError, match="ours"):
        depends(lambda x: x + 0)


def test_and_means_that_everything_depends_for_users(lenient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(m: Any, node: Any, value: Any) -> Any:
        raise AttributeError("ours")

    monkeypatch.setitem(CARDS, "mul", replace(CARDS["mul"], depends=wrong))
    assert depends(lambda x: x + 0) == ALL


def test_a_mask_of_another_shape_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CARDS, "mul", replace(CARDS["mul"], depends=lambda m, n, v: torch.zeros(3, dtype=torch.bool)))
    assert depends(lambda x: x + 0) == ALL
