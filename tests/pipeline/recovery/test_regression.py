"""Ridge regression against numpy, and on data that are no good."""

import numpy as np
import pytest
import torch

from pipeline.recovery import regression
from pipeline.recovery.regression import STRENGTHS, fit
from pipeline.recovery.shown import Cut


def drawn(rows, columns, outputs, groups=1, noise=0.1, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, groups, columns, generator=draw) + 0.5
    weight = torch.randn(groups, outputs, columns, generator=draw)
    y = torch.einsum("rgc,goc->rgo", x, weight) + 3.0 + noise * torch.randn(rows, groups, outputs, generator=draw)
    old = weight + 0.3 * torch.randn(weight.shape, generator=draw)
    held = torch.zeros(rows, dtype=torch.bool)
    held[torch.randperm(rows, generator=draw)[: rows // 5]] = True
    return x, y, old, held


def direct(x, y, old, strength, intercept):
    """(weight, bias) of one group by numpy's least squares, the pull written as further rows."""
    x, y, old = (v.double().numpy() for v in (x, y, old))
    mean_x, mean_y = (x.mean(0), y.mean(0)) if intercept else (np.zeros(x.shape[1]), np.zeros(y.shape[1]))
    xs, ys = x - mean_x, y - mean_y
    pull = np.sqrt(strength * (xs**2).sum() / xs.shape[1])
    stacked = np.concatenate([xs, pull * np.eye(xs.shape[1])]), np.concatenate([ys, pull * old.T])
    weight = np.linalg.lstsq(*stacked, rcond=None)[0].T
    return weight, mean_y - weight @ mean_x


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(200, 12), (30, 80)], ids=["more rows", "more columns"])
def test_it_solves_what_numpy_solves(rows, columns, intercept):
    x, y, old, held = drawn(rows, columns, 5, groups=2)
    made = fit(x, y, old, held, intercept=intercept)
    assert made.strength in STRENGTHS
    for group in range(2):
        weight, bias = direct(x[:, group], y[:, group], old[group], made.strength, intercept)
        np.testing.assert_allclose(made.weight[group].numpy(), weight, rtol=2e-3, atol=2e-4)
        if intercept:
            np.testing.assert_allclose(made.bias[group].numpy(), bias, rtol=2e-3, atol=2e-3)
        else:
            assert made.bias is None


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("rows", [400, 15])
def test_single_weights_that_are_zero_stay_so_and_the_rest_is_what_each_output_alone_would_get(rows, intercept):
    x, y, old, held = drawn(rows, 20, 6, groups=2)
    kept = torch.rand(old.shape, generator=torch.Generator().manual_seed(5)) > 0.5
    kept[0, 0] = False  # an output of which nothing is left
    made = fit(x, y, old * kept, held, intercept=intercept, kept=kept)
    assert made.strength
    assert not bool(made.weight[~kept].any())
    for group in range(2):
        every = x[:, group].double() - (x[:, group].double().mean(0) if intercept else 0)
        pull = made.strength * float(every.square().sum()) / 20
        for output in range(1, 6):
            columns = kept[group, output]
            part, target = every[:, columns], y[:, group, output].double()
            target = target - (target.mean() if intercept else 0)
            start = old[group, output, columns].double()
            loaded = part.T @ part + pull * torch.eye(part.shape[1], dtype=torch.float64)
            wanted = start + torch.linalg.solve(loaded, part.T @ (target - part @ start))
            torch.testing.assert_close(made.weight[group, output, columns].double(), wanted, rtol=0.01, atol=2e-3)


def test_both_spaces_give_the_same():
    draw = torch.Generator().manual_seed(1)
    x, rest = torch.randn(1, 20, 20, generator=draw), torch.randn(1, 20, 3, generator=draw)
    primal = regression._Solver(x, rest)
    dual = regression._Solver(x[:, :19], rest[:, :19])
    assert dual.dual and not primal.dual
    gram = x[:, :19].double().mT @ x[:, :19].double()
    loaded = gram + 0.1 * float(gram[0].diag().mean()) * torch.eye(20, dtype=torch.float64)
    want = torch.linalg.solve(loaded, x[:, :19].double().mT @ rest[:, :19].double()).mT
    torch.testing.assert_close(dual.solve(0.1), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("centre", [False, True])
def test_what_is_added_to_the_targets_counts_the_same_in_both_spaces(centre):
    draw = torch.Generator().manual_seed(2)
    x, rest = torch.randn(1, 12, 20, generator=draw) + 1, torch.randn(1, 12, 3, generator=draw)
    more = torch.rand(1, 12, 3, generator=draw) + 2  # with a mean that is far from 0
    last = torch.arange(12) >= 9
    dual = regression._Solver(x[:, ~last], rest[:, ~last]).joined(x, rest, last, centre=centre)
    assert dual.dual
    rows, target = x[0].double(), (rest + more)[0].double()
    if centre:
        rows, target = rows - rows.mean(0), target - target.mean(0)
    gram = rows.mT @ rows
    loaded = gram + 0.1 * float(gram.diag().mean()) * torch.eye(20, dtype=torch.float64)
    want = torch.linalg.solve(loaded, rows.mT @ target).mT
    given = dual.solve(0.1, more)
    torch.testing.assert_close(given[0], want, rtol=1e-4, atol=1e-5)


def test_the_strength_is_the_one_that_leaves_least_on_rows_held_back():
    few = fit(*drawn(60, 20, 2, noise=1.0), intercept=True)
    many = fit(*drawn(3000, 20, 2, noise=0.01), intercept=True)
    assert few.strength > many.strength == min(STRENGTHS)
    assert many.error_after < 0.01 * many.error_before


@pytest.mark.parametrize("cut", [False, True])
def test_old_weights_that_are_right_are_not_fitted_to_rounding(cut):
    x, _, old, held = drawn(300, 12, 5)
    off = 5e-7 * torch.randn(old.shape, generator=torch.Generator().manual_seed(1))
    y = torch.einsum("rgc,goc->rgo", x.double(), (old + off).double()).float()
    made = fit(x, y, old, held, intercept=True, shown=Cut.of(torch.zeros_like(y)) if cut else None)
    assert made.strength == 0
    assert torch.equal(made.weight, old)


def test_old_weights_stay_where_nothing_is_better():
    x, _, old, held = drawn(40, 10, 3)
    y = torch.einsum("rgc,goc->rgo", x, old) + 2.0
    made = fit(x, y, old, held, intercept=True)
    torch.testing.assert_close(made.weight, old, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.bias, torch.full((1, 3), 2.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x[:, :, :1].expand_as(x).clone(),
        lambda x: torch.full_like(x, 1234.5678),
        lambda x: torch.zeros_like(x),
        lambda x: x[:1].expand_as(x).clone(),
        lambda x: x * 1e-20,
        lambda x: x * 1e15,
    ],
    ids=["rank one", "constant", "zero", "repeated", "tiny", "huge"],
)
@pytest.mark.parametrize("rows", [12, 100])
def test_poor_data_give_sane_weights(spoil, rows, intercept):
    x, y, old, held = drawn(rows, 30, 4)
    made = fit(spoil(x), y, old, held, intercept=intercept)
    assert bool(made.weight.isfinite().all())
    assert made.bias is None or bool(made.bias.isfinite().all())
    assert made.error_after <= made.error_before
    if float(spoil(x).std()) == 0.0 and intercept:
        assert torch.equal(made.weight, old)  # a constant says nothing about a weight


@pytest.mark.parametrize("rows", [1, 4])
def test_too_few_rows_are_refused(rows):
    x, y, old, held = drawn(rows, 3, 2)
    with pytest.raises(ValueError, match="held back"):
        fit(x, y, old, held, intercept=True)


def test_two_rows_are_enough_for_a_mean():
    x, y, old, _ = drawn(2, 3, 2)
    made = fit(x, y, old, torch.tensor([True, False]), intercept=True)
    assert bool(made.weight.isfinite().all() and made.bias.isfinite().all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_values_that_are_not_finite_are_refused(which, bad):
    given = list(drawn(40, 6, 2))
    given[which].view(-1)[3] = bad
    with pytest.raises(ValueError, match="finite"):
        fit(*given, intercept=True)


def test_it_is_deterministic_and_keeps_the_type():
    x, y, old, held = drawn(60, 10, 3)
    a, b = (fit(x, y, old.double(), held, intercept=True) for _ in range(2))
    assert torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias)
    assert a.weight.dtype == a.bias.dtype == torch.float64
