"""The table of the solver, row by row, on relations stated by hand."""

from __future__ import annotations

import numpy as np
import pytest
from torch import fx

from pipeline.channels.coupling.solve import Solution, solve
from pipeline.channels.operators.trace import Policy, Trace

NODE = fx.Graph().placeholder("somewhere")


@pytest.fixture
def t() -> Trace:
    return Trace(Policy(), size_of=int)


def classes(solution: Solution, atoms: np.ndarray) -> list[int]:
    return solution.class_of[atoms].tolist()


def stays(solution: Solution, atoms: np.ndarray) -> list[bool]:
    return (solution.reason_of[solution.class_of[atoms]] >= 0).tolist()


def reasons(solution: Solution, atoms: np.ndarray) -> set[str]:
    return {solution.why(solution.class_of[atoms[k : k + 1]])[2] for k in range(len(atoms))}


def test_ties_join_index_by_index_and_through_others(t: Trace) -> None:
    a, b, c = t.fresh(3), t.fresh(3), t.fresh(3)
    t.tie(a, b, NODE)
    t.tie(b, c[::-1], NODE)
    found = solve(t)
    assert classes(found, a) == classes(found, b) == classes(found, c)[::-1]
    assert len(set(classes(found, a))) == 3 and not any(stays(found, a))


def test_a_pin_holds_whatever_is_tied_to_it_and_the_first_reason_is_told(t: Trace) -> None:
    a, b = t.fresh(3), t.fresh(3)
    t.tie(a, b, NODE)
    t.pin(b[1:2], NODE, "first")
    t.pin(a[1:2], NODE, "second")
    found = solve(t)
    assert stays(found, a) == [False, True, False]
    assert reasons(found, a[1:2]) == {"first"}


def test_tied_to_a_fixed_dimension_is_pinned(t: Trace) -> None:
    a = t.fresh(2)
    t.tie(a, None, NODE)
    assert stays(solve(t), a) == [True, True]


def product(t: Trace, *sizes: int) -> tuple[np.ndarray, list[np.ndarray]]:
    flat, factors = t.fresh(int(np.prod(sizes))), [t.fresh(n) for n in sizes]
    t.product(NODE, flat, factors, sizes)
    return flat, factors


def test_every_factor_pinned_pins_the_flat_dimension(t: Trace) -> None:
    flat, factors = product(t, 2, 3)
    for factor in factors:
        t.pin(factor, NODE, "fixed")
    found = solve(t)
    assert all(stays(found, flat)) and reasons(found, flat) == {"fixed"}


def test_a_flat_index_that_stays_keeps_its_place_along_every_factor(t: Trace) -> None:
    flat, (outer, inner) = product(t, 2, 3)
    t.pin(flat[4:5], NODE, "fixed")  # place (1, 1)
    t.role("position", inner)  # so that the outer factor is the one that may go
    found = solve(t)
    assert stays(found, outer) == [False, True]
    assert stays(found, inner) == [True, True, True]
    assert stays(found, flat) == [False] * 3 + [True] * 3


def test_a_factor_all_of_whose_places_are_held_leaves_the_other_free(t: Trace) -> None:
    flat, (outer, inner) = product(t, 2, 3)
    t.pin(flat[:3], NODE, "fixed")  # each place of the inner factor once, at the first place of the outer one
    found = solve(t)
    assert stays(found, inner) == [True] * 3 and stays(found, outer) == [True, False]
    assert stays(found, flat) == [True] * 3 + [False] * 3


def test_the_only_free_factor_takes_the_flat_dimension_along(t: Trace) -> None:
    flat, (outer, inner) = product(t, 2, 3)
    t.pin(outer, NODE, "fixed")
    found = solve(t)
    assert classes(found, flat) == classes(found, inner) * 2
    assert not any(stays(found, flat))


def test_places_that_differ_along_one_factor_only_are_tied_in_it(t: Trace) -> None:
    flat, (outer, inner) = product(t, 2, 3)
    t.tie(flat[0:1], flat[2:3], NODE)  # (0, 0) and (0, 2)
    t.pin(outer, NODE, "fixed")
    found = solve(t)
    one, two, three = classes(found, inner)
    assert one == three != two


def test_a_factor_whose_places_are_all_tied_cannot_shrink(t: Trace) -> None:
    flat, (outer, inner) = product(t, 2, 2)
    t.tie(inner[:1], inner[1:], NODE)
    found = solve(t)
    assert all(stays(found, inner)) and reasons(found, inner) == {"its places are tied to one another"}
    assert classes(found, flat) == [c for c in classes(found, outer) for _ in range(2)]


@pytest.mark.parametrize(
    ("policy", "head_goes", "position_goes"),
    [(Policy(), True, False), (Policy(heads=False), False, True), (Policy(heads=False, head_positions=False), 0, 0)],
)
def test_of_heads_and_positions_the_policy_chooses(policy: Policy, head_goes: bool, position_goes: bool) -> None:
    t = Trace(policy, size_of=int)
    _, (heads, positions) = product(t, 2, 5)
    t.role("head", heads)
    t.role("position", positions)
    found = solve(t)
    assert stays(found, heads) == [not head_goes] * 2
    assert stays(found, positions) == [not position_goes] * 5


def test_without_roles_the_factor_of_most_classes_goes(t: Trace) -> None:
    _, (outer, inner) = product(t, 2, 5)
    found = solve(t)
    assert all(stays(found, outer)) and not any(stays(found, inner))
    assert reasons(found, outer) == {"the other factor of the view goes instead"}


def test_products_that_touch_are_chosen_one_by_one_and_others_at_once(t: Trace) -> None:
    flat, (outer, _) = product(t, 2, 5)
    again = [t.fresh(5), t.fresh(2)]
    t.product(NODE, flat, again, (5, 2))  # the same ten indices, cut the other way round
    apart, (_, free) = product(t, 2, 5)
    found = solve(t)
    assert all(stays(found, outer)) and not any(stays(found, free)) and not any(stays(found, apart))
    # The first choice ties places five apart, the second one neighbours: all ten go together, or none.
    assert len(set(classes(found, flat))) == 1
