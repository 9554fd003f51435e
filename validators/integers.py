"""Whole numbers that a model may be fed with: token ids, masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

A = TypeVar("A")
"""An array or a tensor."""


class Whole(NamedTuple):
    """Whole numbers from `low` to below `high`; `last` ends every row, and stands nowhere else in it: some models look
    for the one token that ends a sentence.
    """

    low: int
    high: int
    last: int | None = None

    @property
    def others(self) -> int:
        """How many there are to draw from: all, or all but `last`, one at least."""
        count = self.high - self.low
        return count if self.last is None else max(1, count - 1)

    def placed(self, drawn: A) -> A:
        """Numbers from 0 to below `others` as these: `last` at the end of each row alone."""
        made: Any = drawn
        made = made + self.low
        if self.last is not None and self.high - self.low > 1:
            made += made >= self.last
        placed: A = self.ended(made)
        return placed

    def ended(self, rows: A) -> A:
        """`rows` with `last` at the end of each."""
        places: Any = rows
        if self.last is not None and places.ndim:
            places[..., -1] = self.last
        return rows


Ranges = Mapping[str, tuple[int, int] | Whole]
"""Inputs that are whole numbers -> their values, half open."""
