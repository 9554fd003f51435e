"""Groups one after another, held against the least squares problem of all that are gone, solved anew."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.selection import elimination
from pipeline.selection.elimination import Reading, eliminated, factored, together

RIDGE = 0.01


def reading(columns, outputs=3, seed=0, rows=60, mix=None):
    """A random reading with dependent columns, and the rows and weight that it was made of."""
    draw = torch.Generator().manual_seed(seed)
    width = len(columns)
    x = torch.randn(rows, width, generator=draw, dtype=torch.float64)
    x = x @ (torch.eye(width, dtype=torch.float64) if mix is None else mix)
    weight = torch.randn(outputs, width, generator=draw, dtype=torch.float64)
    gram = x.mT @ x / rows
    return Reading(weight, gram, torch.tensor(columns), RIDGE), x, weight


def lost(x, weight, columns, gone):
    """What the best refit of the columns that stay leaves when groups `gone` go: least squares, the ridge as rows."""
    rows = torch.cat([x / len(x) ** 0.5, RIDGE**0.5 * torch.eye(x.shape[1], dtype=torch.float64)])
    out = torch.tensor([c in gone for c in columns])
    wanted = rows[:, out] @ weight[:, out].T
    if bool(out.all()):
        return float(wanted.square().sum())
    refit = torch.linalg.lstsq(rows[:, ~out], wanted, driver="gelsd").solution
    return float((wanted - rows[:, ~out] @ refit).square().sum())


def mixing(width, seed):
    return torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seed=st.integers(0, 10_000), size=st.integers(1, 7), each=st.integers(1, 3), other=st.integers(0, 2))
@settings(max_examples=40, deadline=None)
def test_scores_are_what_the_best_refit_leaves_and_each_step_is_the_cheapest(seed, size, each, other):
    """With columns of no group, several columns to a group, and two readers of the same groups."""
    columns = [g for g in range(size) for _ in range(each)] + [-1] * other
    one = reading(columns, seed=seed, mix=mixing(len(columns), seed))
    two = reading(list(range(size)), outputs=2, seed=seed + 1, mix=mixing(size, seed + 1))

    def both(gone):
        return lost(one[1], one[2], columns, gone) + lost(two[1], two[2], list(range(size)), gone)

    scores = eliminated([one[0], two[0]], size)
    gone: set[int] = set()
    for group in np.argsort(scores, kind="stable").tolist():
        left = set(range(size)) - gone
        cheapest = min(both(gone | {g}) for g in left)
        assert both(gone | {group}) == pytest.approx(cheapest, rel=1e-6)
        gone.add(group)
        assert scores[group] == pytest.approx(both(gone), rel=1e-6)
    alone = together([one[0], two[0]], size)
    assert alone == pytest.approx([both({g}) for g in range(size)], rel=1e-6)


def test_of_two_that_are_alike_one_stays():
    """Each of them alone could go for nothing: by that, both would be the first to go."""
    half = torch.randn(100, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = torch.cat([half, half], 1)
    weight = torch.ones(2, 8, dtype=torch.float64)
    weight[:, 3] = weight[:, 7] = 9.0  # what matters most, held by two channels that are alike
    seen = Reading(weight, x.mT @ x / 100, torch.arange(8), 1e-9)
    scores = eliminated([seen], 8)
    first = set(np.argsort(scores)[:4].tolist())
    assert {g % 4 for g in first} == {0, 1, 2, 3}
    assert (together([seen], 8) < 1e-6).all()


def test_columns_of_which_only_squares_are_known_go_by_themselves():
    seen = Reading(torch.tensor([[1.0, 2.0, 3.0]]).double(), torch.tensor([4.0, 1.0, 1.0]).double(),
                   torch.tensor([1, 0, 0]), 0.0)  # fmt: skip
    assert together([seen], 2).tolist() == [13.0, 4.0]
    assert eliminated([seen], 2).tolist() == [17.0, 4.0]


def test_many_groups_go_in_rounds_and_hardly_worse(monkeypatch):
    size = 200
    seen, x, weight = reading(list(range(size)), rows=150, mix=mixing(size, 3))
    rounds = eliminated([seen], size)
    assert len(np.unique(rounds)) == size
    monkeypatch.setattr(elimination, "ROUND", 0.0)
    single = eliminated([seen], size)
    for half in (rounds, single):
        gone = set(np.argsort(half)[: size // 2].tolist())
        assert lost(x, weight, list(range(size)), gone) <= 1.05 * np.sort(single)[size // 2 - 1]


def test_nothing_reads_nothing_lost():
    assert eliminated([], 3).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("scores", [eliminated, together])
def test_a_gram_matrix_that_rounding_left_without_a_factor_is_loaded_until_it_has_one(scores):
    one, _, _ = reading([0, 1, 2, 3])
    rounded = one.gram.clone()
    rounded[0, 1] = rounded[1, 0] = 3 * rounded.diagonal().max()  # no two columns are so alike
    least = float(torch.linalg.eigvalsh(rounded).min())
    enough = next(RIDGE * 10**power for power in range(9) if RIDGE * 10**power > -least)
    assert enough > RIDGE
    factor = factored(rounded, RIDGE)
    assert torch.allclose(factor @ factor.mT, rounded + enough * torch.eye(4, dtype=torch.float64))
    found, wanted = (scores([replace(one, gram=rounded, ridge=ridge)], 4) for ridge in (RIDGE, enough))
    assert found == pytest.approx(wanted)
