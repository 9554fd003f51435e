"""What a card's `edit` is handed: which indices stay, the old node, and the new graph to change."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, fx

from foundation.editor import Editor, argument
from pipeline.channels.ledger import Rewrite
from pipeline.channels.operators.values import Atoms, Flags, Indices, Value

aten = torch.ops.aten
N = TypeVar("N")


@dataclass
class Cut:
    """One removal in progress."""

    gone: Flags  # atom -> True = goes
    values: dict[fx.Node, Any]
    notes: Mapping[fx.Node, object]
    editor: Editor
    new_of: dict[fx.Node, fx.Node]
    rewrites: list[Rewrite] = field(default_factory=list)
    _kept: dict[int, tuple[Atoms, Flags | None]] = field(default_factory=dict)

    def keep(self, atoms: Atoms | None) -> Flags | None:
        """Which indices stay; None where all do."""
        if atoms is None:
            return None
        known = self._kept.get(id(atoms))
        if known is None:
            gone = self.gone[atoms]
            known = self._kept[id(atoms)] = atoms, ~gone if gone.any() else None
        return known[1]

    def count(self, atoms: Atoms | None, size: int) -> int:
        """How many of `size` indices stay."""
        keep = self.keep(atoms)
        return size if keep is None else int(keep.sum())

    def shape(self, value: Value) -> tuple[int, ...]:
        """The value's sizes afterwards."""
        return tuple(self.count(a, n) for a, n in zip(value.atoms, value.shape, strict=True))

    def touched(self, value: Any) -> bool:
        """Whether anything of the value goes."""
        if isinstance(value, tuple):
            return any(self.touched(v) for v in value)
        return isinstance(value, Value) and any(self.keep(a) is not None for a in value.atoms)

    def value(self, node: Any) -> Value:
        """The value of a tensor node of the old graph."""
        value = self.values[node]
        assert isinstance(value, Value)
        return value

    def note(self, node: fx.Node, kind: type[N]) -> N | None:
        """What the card's `relate` left for its `edit`, if it is a `kind`."""
        found = self.notes.get(node)
        return found if isinstance(found, kind) else None

    # -- changing the new graph ------------------------------------------------------------------------------------

    def set(self, node: fx.Node, **arguments: Any) -> None:
        """Set arguments of `node`'s new twin by their schema names."""
        new = self.new_of[node]
        for name, value in arguments.items():
            before = argument(new, name)
            if before != value:
                self.rewrites.append(Rewrite(node.name, str(new.target), name, _plain(before), _plain(value)))
        self.editor.set_arguments(new, **arguments)

    def retarget(self, node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
        """Make `node`'s new twin another operator."""
        new = self.new_of[node]
        self.rewrites.append(Rewrite(node.name, str(new.target), "operator", str(new.target), str(target)))
        self.editor.retarget(new, target, *args)

    def pick(self, node: fx.Node, source: Any, dim: int, picked: Indices) -> None:
        """Make `node`'s new twin an index_select: what is left of the places `picked` in `dim` of the old `source`."""
        index = self.editor.constant(f"{node.name}_index", self.moved(self.value(source).atoms[dim], picked))
        self.retarget(node, aten.index_select.default, (self.new_of[source], dim, index))

    def moved(self, atoms: Atoms | None, picked: Indices) -> Tensor:
        """The places `picked` without those that go, counted among what stays."""
        keep = self.keep(atoms)
        if keep is None:
            return torch.from_numpy(picked.copy())
        return torch.from_numpy((np.cumsum(keep) - 1)[picked[keep[picked]]])

    def twin(self, entry: Any) -> Any:
        """An argument in the new graph: a node's twin, anything else as it is."""
        return self.new_of[entry] if isinstance(entry, fx.Node) else entry

    def size(self, entry: Any, kept: int, before: int) -> Any:
        """A size argument that was `entry` (an int, −1, or a symbolic size of `before`) for `kept` indices."""
        if kept == before or (isinstance(entry, int) and entry == -1):
            return entry
        if isinstance(entry, int):
            return kept
        return self.call(operator.floordiv, self.call(operator.mul, entry, kept), before)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node at the insertion point."""
        return self.editor.call(target, *args, **kwargs)

    def replace(self, node: fx.Node, build: Callable[[fx.Node], fx.Node], note: str) -> None:
        """Put `build(new twin)`'s result where the twin was used; the twin itself may be among its inputs."""
        new = self.new_of[node]
        with self.editor.after(new):
            result = build(new)
        self.editor.replace(new, result)
        self.new_of[node] = result
        self.rewrites.append(Rewrite(node.name, str(node.target), "operator", str(node.target), note))

    def indices(self, name: str, keep: Flags) -> fx.Node:
        """A constant that lists the kept indices."""
        return self.editor.constant(name, torch.from_numpy(np.flatnonzero(keep)))


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it."""
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)
