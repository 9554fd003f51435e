"""What a card's `depends` is handed: values of one run, and which elements of them an input has a part in.

Beside every value two masks are carried: `depends` (an input has a part in this element) and `nonzero` (it depends, or
is not zero). A product depends only where one factor depends and the other is not exactly zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx


class NoAnswer(Exception):  # noqa: N818  # not an error: everything is taken to depend
    """No sharper answer than "everything depends"."""


@dataclass
class Masks:
    """Node -> its value (float64), its `depends` and its `nonzero` masks; tuples where it has several outputs."""

    values: dict[Any, Any] = field(default_factory=dict)
    depends: dict[Any, Any] = field(default_factory=dict)
    nonzero: dict[Any, Any] = field(default_factory=dict)

    def store(self, node: fx.Node, value: Any, depends: Any) -> None:
        """Keep what is known of a node."""
        self.values[node] = value
        self.depends[node] = depends
        whole = isinstance(value, Tensor) and isinstance(depends, Tensor)
        self.nonzero[node] = depends | (value != 0) if whole else None

    def forget(self, node: fx.Node) -> None:
        """Drop what nobody asks for any more."""
        for held in (self.values, self.depends, self.nonzero):
            held.pop(node, None)

    def any(self, node: Any) -> bool:
        """Whether anything of the node depends."""
        return any(isinstance(d, Tensor) and bool(d.any()) for d in parts(self.depends.get(node)))

    def mask(self, node: Any) -> Tensor:
        """What depends in a tensor argument. Raises NoAnswer where it is not one tensor."""
        found = self.depends.get(node)
        if not isinstance(found, Tensor):
            raise NoAnswer
        return found

    def filled(self, node: Any) -> Tensor:
        """What depends or is not zero in a tensor argument. Raises NoAnswer where it is not one tensor."""
        found = self.nonzero.get(node)
        if not isinstance(found, Tensor):
            raise NoAnswer
        return found

    def fixed(self, node: Any) -> bool:
        """Whether nothing of an argument depends."""
        return not isinstance(node, fx.Node) or not self.any(node)

    def ask(self, *nodes: Any) -> None:
        """Raises NoAnswer unless nothing of these arguments depends."""
        if not all(self.fixed(n) for n in nodes):
            raise NoAnswer

    def run(self, node: fx.Node, replace: dict[fx.Node, Tensor]) -> Any:
        """The operator itself, with other values in the place of some operands."""

        def swap(n: fx.Node) -> Any:
            return replace[n] if n in replace else self.values[n]

        return node.target(*fx.node.map_arg(node.args, swap), **fx.node.map_arg(node.kwargs, swap))  # type: ignore[operator]


def parts(value: Any) -> tuple[Any, ...]:
    """One output or several as a tuple."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def alike(value: Any, fill: bool) -> Any:
    """Masks of the shape of a node's value, all `fill`."""
    if isinstance(value, (tuple, list)):
        return tuple(alike(v, fill) for v in value)
    return torch.full(value.shape, fill) if isinstance(value, Tensor) else None


def number(mask: Tensor) -> Tensor:
    """A mask as zeros and ones that can be added up."""
    return mask.to(torch.float32)


def spread(mask: Tensor, dims: list[int]) -> Tensor:
    """Over `dims` every element has a part in every other."""
    return mask.to(torch.uint8).amax(dim=dims, keepdim=True).expand(mask.shape) != 0


def per_channel(m: Masks, scale: Any, mask: Tensor, dim: int) -> Tensor:
    """`mask` where the scale of its channel is not zero."""
    if scale is None:
        return mask
    m.ask(scale)
    shape = [1] * mask.dim()
    shape[dim] = -1
    values: Tensor = m.values[scale]
    return mask & (values != 0).reshape(shape)


def same(m: Masks, node: fx.Node, value: Any) -> Tensor:
    """The elements of the first operand in their places."""
    return m.mask(node.args[0])
