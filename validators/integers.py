"""Whole numbers that a model may be fed with: token ids, masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Whole(NamedTuple):
    """Whole numbers from `low` to below `high`; `last` ends every row, and stands nowhere else in it: some models look
    for the one token that ends a sentence.
    """

    low: int
    high: int
    last: int | None = None

    def drawn(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """Uniform ones."""
        if self.last is None or not shape:
            return np.asarray(rng.integers(self.low, self.high, shape))  # of a scalar numpy makes no array
        if self.high - self.low < 2:
            return np.full(shape, self.last)
        made = rng.integers(self.low, self.high - 1, shape)
        return self.ended(made + (made >= self.last))

    def ended(self, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """`rows` with `last` at the end of each."""
        if self.last is not None and rows.ndim:
            rows[..., -1] = self.last
        return rows


Ranges = Mapping[str, tuple[int, int] | Whole]
"""Inputs that are whole numbers -> their values, half open."""
