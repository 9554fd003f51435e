"""What the analysis knows of a tensor: for every dimension, one *atom* per index.

An atom is a number that stands for "this index"; equal atoms go or stay together. Atom 0 is pinned: it never goes.
A dimension without an array (None) is pinned as a whole (batch, tokens, space, length one).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Atoms = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]

PINNED = 0


@dataclass(frozen=True, slots=True)
class Value:
    """One tensor of the graph.

    `shape`: sizes at the example's batch. `atoms[d]`: int array of length `shape[d]`, or None = pinned.
    `zeros[d][i]`: True where the slice at index i of dimension d is exactly zero once the parameters of its class are
    zero; None = nowhere. `derived`: computed from parameters alone, no input has a part in it.
    """

    shape: tuple[int, ...]
    atoms: tuple[Atoms | None, ...]
    zeros: tuple[Flags | None, ...]
    derived: bool = False

    @property
    def labelled(self) -> bool:
        """Whether any dimension could lose an index."""
        return any(a is not None for a in self.atoms)

    def pick(self, dims: list[int], shape: tuple[int, ...] | None = None) -> Value:
        """The value whose dimension k is this one's dimension dims[k] (−1: a new dimension of length one)."""
        return Value(
            shape if shape is not None else tuple(1 if d < 0 else self.shape[d] for d in dims),
            tuple(None if d < 0 else self.atoms[d] for d in dims),
            tuple(None if d < 0 else self.zeros[d] for d in dims),
            self.derived,
        )

    def replace_dim(self, dim: int, atoms: Atoms | None, zeros: Flags | None, size: int) -> Value:
        """The same value with another dimension `dim`."""
        swap: Any = lambda seq, new: tuple(new if d == dim else old for d, old in enumerate(seq))  # noqa: E731
        return Value(swap(self.shape, size), swap(self.atoms, atoms), swap(self.zeros, zeros), self.derived)


def opaque(shape: tuple[int, ...], derived: bool = False) -> Value:
    """A tensor that cannot lose anything."""
    return Value(shape, (None,) * len(shape), (None,) * len(shape), derived)


def either(a: Flags | None, b: Flags | None) -> Flags | None:
    """Zero when one of two factors is zero."""
    if a is None or b is None:
        return b if a is None else a
    return a | b


def both(a: Flags | None, b: Flags | None) -> Flags | None:
    """Zero when both are zero."""
    return None if a is None or b is None else a & b
