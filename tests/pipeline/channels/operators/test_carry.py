"""A dimension that is carried whole: what is scaled index by index before the operator is scaled alike after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from pipeline.channels.operators import CARDS
from pipeline.channels.operators.carry import carried, keeps_constants

aten = torch.ops.aten
X = torch.randn(2, 3, 4, dtype=torch.float64)

# (operator, arguments after the first, where each of the three dimensions goes)
WHERE: list[tuple[Any, tuple[Any, ...], list[int | None]]] = [
    (aten.clone.default, (), [0, 1, 2]),
    (aten.dropout.default, (0.5, False), [0, 1, 2]),
    (aten.permute.default, ([2, 0, 1],), [1, 2, 0]),
    (aten.transpose.int, (1, -1), [0, 2, 1]),
    (aten.view.default, ([6, 4],), [None, None, 1]),
    (aten.reshape.default, ([2, 1, 3, 2, 2],), [0, 2, None]),
    (aten.flatten.using_ints, (1,), [0, None, None]),
    (aten.unflatten.int, (2, [2, 2]), [0, 1, None]),
    (aten.slice.Tensor, (1, 0, 2), [0, None, 2]),
    (aten.select.int, (1, 2), [0, None, 1]),
    (aten.index_select.default, (0, torch.tensor([1, 0])), [None, 1, 2]),
    (aten.flip.default, ([-1],), [0, 1, None]),
    (aten.roll.default, ([1], [1]), [0, None, 2]),
    (aten.unsqueeze.default, (1,), [0, 2, 3]),
    (aten.squeeze.dims, ([1],), [0, None, 2]),
    (aten.expand.default, ([5, 2, 3, 4],), [1, 2, 3]),
    (aten.mean.dim, ([1],), [0, None, 1]),
    (aten.mean.dim, ([1], True), [0, None, 2]),
    (aten.sum.dim_IntList, ([0, 2],), [None, 0, None]),
    (aten.mul.Tensor, (3.0,), [0, 1, 2]),
    (aten.div.Tensor, (3.0,), [0, 1, 2]),
    (aten.relu.default, (), [None, None, None]),
    (aten.softmax.int, (-1,), [None, None, None]),
    (aten.mul.Tensor, (X + 1,), [None, None, None]),
]


def call(x: torch.Tensor, target: Any, rest: tuple[Any, ...]) -> fx.Node:
    """A node of `target` on `x` and `rest` that knows its value."""
    graph = fx.Graph()

    def operand(a: Any) -> Any:
        if not isinstance(a, torch.Tensor):
            return a
        node = graph.placeholder("x")
        node.meta["val"] = a
        return node

    node = graph.call_function(target, tuple(map(operand, (x, *rest))))
    node.meta["val"] = target(x, *rest)
    return node


@pytest.mark.parametrize(("target", "rest", "where"), WHERE, ids=[f"{t}{k}" for k, (t, *_) in enumerate(WHERE)])
def test_a_dimension_is_where_the_card_says(target: Any, rest: tuple[Any, ...], where: list[int | None]) -> None:
    node = call(X, target, rest)
    assert [carried(node, d) for d in range(3)] == where
    for dim, to in enumerate(where):
        if to is not None:
            scale = torch.rand(X.shape[dim], dtype=torch.float64) + 1
            before = target(X * scale.view([-1 if d == dim else 1 for d in range(3)]), *rest)
            after = target(X, *rest)
            torch.testing.assert_close(before, after * scale.view([-1 if d == to else 1 for d in range(after.dim())]))


def test_every_fact_of_this_kind_is_tried_above() -> None:
    tried = {t._schema.name.split("::")[1] for t, _, _ in WHERE}
    assert {c.carries for c in CARDS.values()} == {CARDS[n].carries for n in tried if n in CARDS} | {None}


def test_a_squeeze_that_drops_some_of_its_dimensions_is_not_followed() -> None:
    assert carried(call(X[:1], aten.squeeze.dims, ([0, 1],)), 2) is None
    assert carried(call(X[:1, :1], aten.squeeze.dims, ([0, 1],)), 2) == 0


def test_a_quotient_that_is_rounded_is_not_followed() -> None:
    node = call(X, aten.div.Tensor, (3.0,))
    node.target, node.kwargs = aten.div.Tensor_mode, {"rounding_mode": "floor"}
    assert carried(node, 0) is None


@pytest.mark.parametrize(("target", "rest", "where"), WHERE, ids=[f"{t}{k}" for k, (t, *_) in enumerate(WHERE)])
def test_a_number_that_is_added_before_is_added_after(target: Any, rest: tuple[Any, ...], where: Any) -> None:
    if not any(to is not None for to in where):
        return
    added = torch.allclose(target(X + 2, *rest), target(X, *rest) + 2)
    assert keeps_constants(call(X, target, rest)) == added
