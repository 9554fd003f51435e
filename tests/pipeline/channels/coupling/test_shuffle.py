"""A channel shuffle is one permutation; what only looks like one is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pipeline.channels import capture
from pipeline.channels.coupling.shuffle import find_shuffles


class Net(nn.Module):
    def __init__(self, form: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.form = nn.Conv2d(3, 6, 1), form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self.conv(x))


def shuffles(form: Callable[[Tensor], Tensor]) -> list[tuple[int, list[int]]]:
    captured = capture(Net(form), (torch.randn(2, 3, 4, 4),))
    found, between = find_shuffles(captured.program.graph, lambda n: tuple(
        s if isinstance(s, int) else 5 for s in n.meta["val"].shape))  # fmt: skip
    assert bool(found) == bool(between)
    return [(s.dim, s.order.tolist()) for s in found.values()]


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x.view(-1, 2, 3, 4, 4).transpose(1, 2).reshape(-1, 6, 4, 4),
        lambda x: x.unflatten(1, (2, 3)).permute(0, 2, 1, 3, 4).contiguous().view(-1, 6, 4, 4),
    ],
)
def test_view_permute_view_deals_the_channels_out(form: Callable[[Tensor], Tensor]) -> None:
    want = form(torch.arange(6.0).view(1, 6, 1, 1).expand(1, 6, 4, 4))[0, :, 0, 0].long().tolist()
    assert shuffles(form) == [(1, want)] == [(1, [0, 3, 1, 4, 2, 5])]


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x.view(-1, 2, 3, 4, 4).view(-1, 6, 4, 4),  # nothing moves
        lambda x: x.view(-1, 2, 3, 4, 4).transpose(1, 3).reshape(-1, 6, 4, 4),  # space takes part
        lambda x: x.view(-1, 2, 3, 4, 4).transpose(1, 2).relu().reshape(-1, 6, 4, 4),  # numbers change in between
        lambda x: x.view(-1, 3, 8, 4).transpose(1, 2).reshape(-1, 6, 4, 4),  # it splits more than one dimension
    ],
)
def test_what_only_looks_like_it_is_none(form: Callable[[Tensor], Tensor]) -> None:
    assert shuffles(form) == []


def test_two_permutations_are_taken_one_after_the_other() -> None:
    def form(x: Tensor) -> Tensor:
        x = torch.cat([x, x + 1], 1).view(-1, 2, 3, 2, 4, 4)
        return x.transpose(1, 2).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12, 4, 4)

    numbered = torch.arange(12.0).view(1, 2, 3, 2)
    want = numbered.transpose(1, 2).permute(0, 2, 3, 1).flatten().long().tolist()
    assert shuffles(form) == [(1, want)]
