"""The relations that one walk over the graph collects: ties, pins, products, contractions, roles.

A card's `relate` is handed the trace and a node, and states relations only; nothing is solved or decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx

from pipeline.channels.operators.values import PINNED, Atoms, Flags, Value, opaque

SPACE, ROWS = "space", "rows are looked up by index"
"""Reasons that hold in every model, and tell less than any other."""

Role = Literal["head", "position", "residual"]


@dataclass(frozen=True)
class Policy:
    """Which kinds of groups may go.

    Where a view merges heads with positions within heads, only one of the two can go: heads when both are allowed.
    `residual`: streams whose removal needs a norm rewritten with its original count.
    """

    channels: bool = True
    neurons: bool = True
    heads: bool = True
    head_positions: bool = True
    residual: bool = True


@dataclass(frozen=True, eq=False)
class Pin:
    """Atoms that have to stay, and why."""

    atoms: Atoms
    node: fx.Node
    reason: str


@dataclass(frozen=True, eq=False)
class Product:
    """A flat dimension that is the row-major product of `factors` (None = pinned), as a view makes it."""

    node: fx.Node
    flat: Atoms
    factors: tuple[Atoms | None, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Contraction:
    """A sum over a dimension: an index may go only where one of `sides` (node, dim) is exactly zero there."""

    node: fx.Node
    sides: tuple[tuple[fx.Node, int], ...]
    atoms: Atoms


class NoRule(Exception):  # noqa: N818  # not an error: the node's channels are pinned, and the report says why
    """Raised by a card's `relate` for a form of its operator that it does not cover."""


@dataclass
class Trace:
    """Everything the cards said about one graph."""

    policy: Policy
    size_of: Callable[[Any], int]
    values: dict[fx.Node, Any] = field(default_factory=dict)
    static: dict[fx.Node, Any] = field(default_factory=dict)
    left: list[Atoms] = field(default_factory=list)
    right: list[Atoms] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    roles: list[tuple[Role, Atoms]] = field(default_factory=list)
    reads: list[Atoms] = field(default_factory=list)
    linear_only: dict[fx.Node, bool] = field(default_factory=dict)
    frozen: set[fx.Node] = field(default_factory=set)
    notes: dict[fx.Node, object] = field(default_factory=dict)  # what a card's relate leaves for its edit
    unknown: dict[fx.Node, str] = field(default_factory=dict)
    count: int = 1

    # -- what cards read -------------------------------------------------------------------------------------------

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Sizes of the node's tensor at the example's batch."""
        return self.shape_of(node.meta["val"])

    def shape_of(self, val: Any) -> tuple[int, ...]:
        """Sizes of a fake tensor at the example's batch."""
        return tuple(self.size_of(s) for s in val.shape)

    def left_of(self, node: fx.Node, kept: Callable[[Atoms], int]) -> tuple[int, ...]:
        """`shape` once so many indices of each labelled dimension are `kept`."""
        value = self.values.get(node)
        if not isinstance(value, Value):
            return self.shape(node)
        return tuple(n if a is None else kept(a) for a, n in zip(value.atoms, value.shape, strict=True))

    def value(self, node: Any) -> Value:
        """The value of a tensor argument; a constant computed from nothing gets free atoms on first use."""
        value = self.values.get(node)
        if value is None:
            value = self._constant(node) if node in self.static else opaque(self.shape(node))
            self.values[node] = value
        if not isinstance(value, Value):
            raise TypeError(f"{node} holds several tensors")
        return value

    def _constant(self, node: fx.Node) -> Value:
        tensor = self.static[node]
        shape = tuple(tensor.shape)
        atoms = tuple(self.fresh(n) if n > 1 else None for n in shape)
        zero = (tensor == 0) if not tensor.dtype.is_complex else torch.zeros(shape, dtype=torch.bool)
        zeros = tuple(
            zero.movedim(d, 0).reshape(n, -1).all(dim=1).numpy() if n > 1 else None for d, n in enumerate(shape)
        )
        return Value(shape, atoms, zeros, derived=True)

    # -- what cards state ------------------------------------------------------------------------------------------

    def fresh(self, size: int) -> Atoms:
        """New atoms, tied to nothing yet."""
        self.count += size
        return np.arange(self.count - size, self.count, dtype=np.int64)

    def tie(self, a: Atoms | None, b: Atoms | None, node: fx.Node, reason: str = "tied to a fixed dimension") -> None:
        """Index i of `a` goes with index i of `b`."""
        if a is b:
            return
        if a is None or b is None:
            self.pin(a if b is None else b, node, reason)
            return
        if a.shape != b.shape:
            raise ValueError(f"{node}: cannot tie {a.shape[0]} to {b.shape[0]} indices")
        fixed_a, fixed_b = a == PINNED, b == PINNED
        if fixed_a.any() or fixed_b.any():
            self.pin(b[fixed_a], node, reason)
            self.pin(a[fixed_b], node, reason)
            free = ~(fixed_a | fixed_b)
            a, b = a[free], b[free]
        self.left.append(a)
        self.right.append(b)

    def pin(self, atoms: Atoms | None, node: fx.Node, reason: str) -> None:
        """These indices have to stay."""
        if atoms is not None and atoms.size:
            self.pins.append(Pin(atoms, node, reason))

    def pin_value(self, value: Value, node: fx.Node, reason: str, dims: Sequence[int] | None = None) -> None:
        """Every index of `dims` (all by default) has to stay."""
        for d in range(len(value.shape)) if dims is None else dims:
            self.pin(value.atoms[d], node, reason)

    def product(self, node: fx.Node, flat: Atoms, factors: Sequence[Atoms | None], sizes: Sequence[int]) -> None:
        """`flat` is the row-major product of `factors`."""
        self.products.append(Product(node, flat, tuple(factors), tuple(sizes)))

    def role(self, role: Role, atoms: Atoms | None) -> None:
        """What kind of group these indices make."""
        if atoms is not None:
            self.roles.append((role, atoms))

    def contract(self, node: fx.Node, sides: Sequence[tuple[fx.Node, int]], reason: str = "") -> None:
        """The sides are multiplied and summed over these dimensions: tie them, and one of them must be zero."""
        values = [(self.value(n), d) for n, d in sides]
        first, first_dim = values[0]
        reference = first.atoms[first_dim]
        for value, dim in values[1:]:
            self.tie(reference, value.atoms[dim], node)
        if any(value.atoms[dim] is None for value, dim in values) or reference is None:
            return
        zero: Flags = np.zeros(reference.shape, dtype=np.bool_)
        for value, dim in values:
            flags = value.zeros[dim]
            if flags is not None:
                zero |= flags
        if not zero.all():
            self.pin(reference[~zero], node, reason or "what is removed would not be zero where it is summed")
        self.contractions.append(Contraction(node, tuple(sides), reference))

    def reading(self, atoms: Atoms | None) -> None:
        """These atoms belong to a parameter dimension that reads channels."""
        if atoms is not None:
            self.reads.append(atoms)

    def give_up(self, node: fx.Node, reason: str) -> Any:
        """No card covers this node: all that it touches stays."""
        self.unknown[node] = reason
        for source in node.all_input_nodes:
            if source in self.static and source not in self.values and isinstance(self.static[source], Tensor):
                self.values[source] = opaque(tuple(self.static[source].shape))
            value = self.values.get(source)
            for v in value if isinstance(value, tuple) else (value,):
                if isinstance(v, Value):
                    self.pin_value(v, node, reason)
        return self.opaque_like(node)

    def opaque_like(self, node: fx.Node) -> Any:
        """The node's output(s), pinned."""
        val = node.meta.get("val")
        if isinstance(val, Tensor):
            return opaque(self.shape_of(val))
        if isinstance(val, (tuple, list)):
            return tuple(opaque(self.shape_of(v)) if isinstance(v, Tensor) else None for v in val)
        return None
