"""One weight of several readers: the fit finds what explains all of them, and weighs them alike."""

import pytest
import torch

from pipeline.recovery.tied import Lookups, Rows, fit


def rows(weight, turned=False, count=400, noise=0.0, shift=None, offset=0.0, seed=0):
    draw = torch.Generator().manual_seed(seed)
    value = weight.mT if turned else weight
    x = torch.randn(count, value.shape[1], generator=draw) + offset
    y = x @ value.mT + noise * torch.randn(count, value.shape[0], generator=draw)
    return Rows(x, y, torch.arange(count) % 5 == 0, turned, shift)


@pytest.fixture
def weights():
    draw = torch.Generator().manual_seed(7)
    true = torch.randn(8, 6, generator=draw)
    return true, true + 0.3 * torch.randn(8, 6, generator=draw)


@pytest.mark.parametrize("kinds", [(False, False), (False, True), (True, True)])
def test_what_explains_all_readers_is_found(weights, kinds):
    true, old = weights
    made = fit([rows(true, turned, seed=at) for at, turned in enumerate(kinds)], [], old)
    assert (made.weight - true).norm() < 0.01 * (old - true).norm()
    assert made.error_after < 1e-4 < made.error_before


def test_the_normal_equations_of_straight_and_turned_readers_hold(weights):
    true, old = weights
    other = true + 1.0  # the readers disagree
    parts = [rows(true, seed=1), rows(other, turned=True, seed=2, count=900)]
    made = fit(parts, [], old)
    new = made.weight.double().requires_grad_()
    shares = [1 / part.y.double().square().sum() for part in parts]
    load = sum(s * p.x.double().square().sum() / p.x.shape[1] for s, p in zip(shares, parts, strict=True))
    loss = made.strength * load * (new - old).square().sum()
    for part, share in zip(parts, shares, strict=True):
        loss = loss + share * (part.y - part.x.double() @ (new if part.turned else new.mT)).square().sum()
    (slope,) = torch.autograd.grad(loss, new)
    assert float(slope.abs().max()) < 1e-5


def test_rows_that_are_looked_up_often_hold(weights):
    true, old = weights
    counts = torch.tensor([1000, 0, 0, 0, 0, 0, 0, 0])
    made = fit([rows(true, noise=0.1)], [Lookups(counts, counts, old)], old)
    moved = (made.weight - old).norm(dim=1)
    assert float(moved[0]) < 0.6 * float((true - old)[0].norm())
    assert torch.allclose(made.weight[1:], true[1:], atol=0.05)


def test_readers_with_one_shift_find_it_and_others_do_without(weights):
    true, old = weights
    shift = torch.arange(8.0)
    parts = [rows(true, shift="b", offset=2.0, seed=at) for at in range(2)]
    parts = [Rows(p.x, p.y + shift, p.held, p.turned, p.shift) for p in parts]
    made = fit([*parts, rows(true, seed=5)], [], old)
    assert torch.allclose(made.shifts["b"], shift, atol=0.05)
    assert set(made.shifts) == {"b"}


def test_the_old_weights_stay_where_nothing_is_better(weights):
    true, _ = weights
    made = fit([rows(true, noise=1.0, count=30), rows(true, True, noise=1.0, count=30, seed=3)], [], true)
    assert made.error_after <= made.error_before


def test_rows_that_say_nothing_are_refused(weights):
    true, old = weights
    good = rows(true)
    with pytest.raises(ValueError, match="held back"):
        fit([Rows(good.x, good.y, torch.ones(400, dtype=torch.bool), False)], [], old)
    with pytest.raises(ValueError, match="finite"):
        fit([Rows(good.x * float("nan"), good.y, good.held, False)], [], old)
    zero = fit([Rows(0 * good.x, 0 * good.y, good.held, False), Rows(0 * good.y, 0 * good.x, good.held, True)], [], old)
    assert torch.equal(zero.weight, old)
