"""Where a constant channel can go into a bias, what it amounts to there, and why it cannot elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.channels import analyse, capture
from pipeline.channels.dead import constants
from pipeline.channels.dead.constants import readers, survey

C = 0.5  # what channel 1 holds


class Net(nn.Module):
    """Four channels, of which channel 1 is the constant C; `reader` reads them."""

    def __init__(self, reader: nn.Module, image: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1) if image else nn.Linear(3, 4)
        self.reader = reader
        with torch.no_grad():
            self.stem.weight[1], self.stem.bias[1] = 0, C

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(self.stem(x))


class Of(nn.Module):
    def __init__(self, form: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.form, self.weight = form, nn.Parameter(torch.randn(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, self.weight)


def judged(reader: nn.Module, image: bool = True) -> tuple[list[bool], list[str], Any, Any]:
    """What `judge` says of the reader's contraction, and the reader with its survey."""
    shape = (2, 3, 5, 5) if image else (2, 6, 3)
    torch.manual_seed(0)
    captured = capture(Net(reader, image).eval(), (torch.randn(shape),))
    analysis = analyse(captured)
    contractions = analysis.trace.contractions
    found = survey(captured, analysis.trace, analysis.solution.class_of, contractions)
    at = contractions[0]  # the stem has none: the inputs of a model stay
    able, _, reasons = found.judge(at)
    return able.tolist(), reasons, found, readers(at, analysis.trace)[0]


ONE = [False, True, False, False]


@pytest.mark.parametrize(
    ("reader", "image"),
    [
        (nn.Conv2d(4, 5, 3), True),
        (nn.Conv2d(4, 6, 3, groups=1, stride=2, bias=False), True),
        (nn.ConvTranspose2d(4, 5, 1), True),
        (nn.Linear(4, 5), False),
        (Of(lambda x, w: x @ w, 4, 5), False),
        (Of(lambda x, w: w @ x.transpose(1, 2), 5, 4), False),
    ],
    ids=lambda r: type(r).__name__,
)
def test_what_a_bias_takes_is_what_the_channel_gave(reader: nn.Module, image: bool) -> None:
    able, _, found, one = judged(reader, image)
    assert able == ONE
    shift = found.shift(one, torch.tensor(ONE).numpy())
    assert shift is not None and shift.constants.tolist() == [0, C, 0, 0]
    x = torch.zeros(1, 4, 3, 3) if image else torch.zeros(1, 6, 4)
    with_it = x.clone()
    with_it.select(1 if image else 2, 1).fill_(C)
    given = (reader(with_it) - reader(x)).double()
    dim = 1 if image else -2 if shift.rows else -1
    torch.testing.assert_close(given.movedim(dim, 0).flatten(1)[:, 0], shift.amount, rtol=1e-5, atol=1e-6)


def test_a_grouped_reader_takes_a_place_only_if_all_its_groups_do() -> None:
    able, _, found, one = judged(nn.Conv2d(4, 4, 3, groups=2))
    assert able == [False, False], "place 1 holds a constant in the first group, not in the second"
    shift = found.shift(one, torch.tensor(ONE).numpy())
    assert shift is not None and (shift.amount[2:] == 0).all() and (shift.amount[:2] != 0).all()


@pytest.mark.parametrize(
    ("reader", "image", "reason"),
    [
        (nn.Conv2d(4, 5, 3, padding=1), True, constants.BORDER),
        (nn.Conv2d(4, 5, 3, padding="same"), True, constants.BORDER),
        (nn.ConvTranspose2d(4, 5, 2), True, constants.TAPS),
        (nn.ConvTranspose2d(4, 5, 1, stride=2), True, constants.TAPS),
        (Of(lambda x, w: F.conv2d(F.pad(x, (1, 1, 1, 1)), w), 5, 4, 3, 3), True, constants.PLACES),
        (Of(lambda x, w: torch.bmm(x, x.transpose(1, 2)) * w, 1), False, constants.MEETS),
        (nn.LayerNorm(4), False, constants.AMONG),
    ],
    ids=lambda r: type(r).__name__ if isinstance(r, nn.Module) else None,
)
def test_what_cannot_take_it_says_why(reader: nn.Module, image: bool, reason: str) -> None:
    able, reasons, *_ = judged(reader, image)
    assert not any(able) and reasons == ["", reason, "", ""]


@pytest.mark.parametrize(("tap", "takes"), [((1, 1), True), *[(at, False) for at in ((0, 1), (1, 0), (2, 1), (1, 2))]])
def test_a_kernel_that_is_zero_where_it_meets_the_padding_takes_it(tap: tuple[int, int], takes: bool) -> None:
    reader = nn.Conv2d(4, 5, 3, padding=1)
    with torch.no_grad():
        reader.weight[:, 1] = 0
        reader.weight[:, 1, tap[0], tap[1]] = 1.0
    able, *_ = judged(reader)
    assert able == (ONE if takes else [False] * 4)
