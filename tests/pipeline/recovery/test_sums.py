"""Sums in float32 against float64, of numbers that float32 cannot square, of none, and of what is no number."""

import math

import pytest
import torch

from pipeline.recovery import sums


@pytest.mark.parametrize("shape", [(1, 20000, 12), (40, 5000, 1), (3, 7, 4000), (5,), (2, 0, 3), (0,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_they_are_those_of_float64(shape, dtype):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 3.0).to(dtype)
    for turned in (x, x.movedim(0, -1).contiguous().movedim(-1, 0), torch.cat([x, x], -1)[..., : x.shape[-1]]):
        assert sums.squares(turned) == pytest.approx(float(x.double().square().sum()), rel=1e-6)
        for keepdim in (True, False):
            found = sums.over(turned, list(range(x.dim()))[:-1] or 0, keepdim=keepdim)
            assert found.dtype == torch.float64
            want = x.double().sum(list(range(x.dim()))[:-1] or 0, keepdim=keepdim)
            torch.testing.assert_close(found, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1e25, 1e-25])
def test_squares_beyond_float32_are_summed(size):
    x = torch.full((100, 10), size)
    assert sums.squares(x) == pytest.approx(1000 * size**2, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_squares_of_what_is_no_number_are_none(bad):
    x = torch.ones(4, 5)
    x[2, 3] = bad
    assert sums.squares(x) == pytest.approx(bad, nan_ok=True)


def test_finite_numbers_are_told_from_others_even_where_their_sum_is_none():
    x = torch.full((100, 10), 1e38)
    assert not bool(x.sum().isfinite())
    assert sums.finite(x)
    assert sums.finite(torch.zeros(0))
    for bad in (math.nan, math.inf, -math.inf):
        spoilt = x.clone()
        spoilt[3, 3] = bad
        assert not sums.finite(spoilt)
    assert not sums.finite(torch.tensor([math.inf, -math.inf]))


@pytest.mark.parametrize(
    ("groups", "rows", "columns"), [(1, 40_000, 24), (3, 1_500, 7), (2, 10, 4), (1, 3_000, 1_200), (1, 60_000, 18)]
)
def test_products_over_many_rows_are_rounded_no_more_than_over_a_few(groups, rows, columns):
    """A system of equations with weak columns shows a thousand times what is rounded off here."""
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.rand(groups, rows, count, generator=draw) + 1 for count in (columns, 5))
    want = x.double().mT @ y.double()
    torch.testing.assert_close(sums.products(x, y), want, rtol=3e-6, atol=0.0)
