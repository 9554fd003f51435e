"""What the last layer of a residual branch has to give: what makes the *sum* come right, and not its own side of it.

What the other side of an addition has lost is lost for all that follows, unless the branch beside it makes up for it
(He et al. 2017, arXiv:1707.06168, section 3.3). So its last layer is fitted to what it gave plus what the other side
lacks, taken back through what lies between the two: norms with fixed statistics, scales, dimensions in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pipeline.channels.dead.branches import ADDITIONS
from pipeline.channels.operators.table import gives_operand
from pipeline.recovery.networks import Networks
from pipeline.recovery.shelf import Shelf

aten = torch.ops.aten

_RESHAPED = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
             aten.unflatten.int)  # fmt: skip
LEAST_SCALE = 1e-3
"""Of the largest scale of a norm: through a smaller one nothing that the sum lacks can be given."""

Back = Callable[[Tensor], Tensor]
"""From a difference in what an operator gives to the difference in what it reads."""


def wanted(node: fx.Node, dense: list[Any], networks: Networks) -> Sequence[Any]:
    """By chunk, what `node` has to give, where `dense` is what it gives in the dense network: the same, but for the
    last layer of a residual branch whose other side is known by now, and differs.
    """
    back: list[Back] = []
    for user, at, step in onward(node, networks):
        if user.target in ADDITIONS:
            other = other_side(user, at)
            # What is written in place is a node of its own. Of two sides the later one makes up for both.
            if other is None or other not in networks.values:
                return dense
            sides = networks.values[other]
            if sides[0] is sides[1] or not _alike(sides[0], at, dense, back):
                return dense
            return _Corrected(dense, sides, tuple(back), networks.shelf)
        if step is None:
            return dense
        back.insert(0, step)
    return dense


def onward(node: fx.Node, networks: Networks) -> Iterator[tuple[fx.Node, fx.Node, Back | None]]:
    """(the reader, what it reads, how a difference goes back through it or None), from `node` on as long as what is
    read has no other reader.
    """
    while len(node.users) == 1:
        (user,) = node.users
        yield user, node, step_back(user, node, networks)
        node = user


def other_side(addition: fx.Node, side: fx.Node) -> fx.Node | None:
    """The other operand of an addition that takes both as they are."""
    if len(addition.args) != 2 or addition.kwargs.get("alpha", 1) != 1:
        return None
    first, second = addition.args
    other = second if first is side else first
    return other if isinstance(other, fx.Node) and other is not side else None


def step_back(node: fx.Node, read: fx.Node, networks: Networks) -> Back | None:
    """How a difference goes back through `node`, None where it does not."""
    fixed = networks.fixed
    given: Any = node.args
    if gives_operand(node):
        return lambda value: value
    if node.target in _RESHAPED:
        return _shaped(read)
    if node.target is aten.slice.Tensor and shape_of(node) == shape_of(read):  # windows that needed no padding
        return lambda value: value
    if node.target is aten.permute.default:
        order = [d % len(given[1]) for d in given[1]]
        back = [order.index(d) for d in range(len(order))]
        return lambda value: value.permute(back)
    if node.target is aten.transpose.int:
        return lambda value: value.transpose(given[1], given[2])
    if node.target is aten.roll.default and len(given) == 3:
        return lambda value: value.roll([-n for n in given[1]], given[2])
    if node.target in (aten.mul.Tensor, aten.mul_.Tensor):
        scale = given[1] if given[0] is read else given[0]
        if scale in fixed and isinstance(fixed[scale][1], Tensor):
            inverse = _inverse(fixed[scale][1])
            return lambda value: value * inverse
    if node.target is aten.batch_norm.default:
        _, weight, _, _, variance, training, _, eps, *_ = given
        if training or variance not in fixed or (weight is not None and weight not in fixed):
            return None
        scale = (fixed[variance][1] + eps).rsqrt() * (1.0 if weight is None else fixed[weight][1])
        inverse = _inverse(scale)
        return lambda value: value * inverse.reshape(-1, *[1] * (value.dim() - 2))
    return None


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """Sizes of the tensor that `node` gives; those that follow the batch are symbols."""
    return tuple(node.meta["val"].shape)


def _shaped(read: fx.Node) -> Back | None:
    """Back to the dimensions that `read` has, of which one may follow the batch."""
    sizes = [size if isinstance(size, int) else -1 for size in shape_of(read)]
    if sizes.count(-1) > 1:
        return None
    return lambda value: value.reshape(sizes)


def _inverse(scale: Tensor) -> Tensor:
    """Of each scale, 0 where it is next to nothing."""
    size = scale.abs()
    enough = size > LEAST_SCALE * size.max()
    return torch.where(enough, 1 / torch.where(enough, scale, 1.0), 0.0)


def _alike(sides: list[Any], at: fx.Node, dense: list[Any], back: Sequence[Back]) -> bool:
    """Whether what the other side lacks has, once it is taken back, the shape of what the layer gives."""
    first, own = sides[0], dense[0]
    if not isinstance(first, Tensor) or not isinstance(own, Tensor) or first.dtype != own.dtype:
        return False
    try:
        for one in back:
            first = one(first)
    except RuntimeError:
        return False
    return first.shape == own.shape


class _Corrected(Sequence[Tensor]):
    """Chunks that are computed when they are asked for: all of them at once would be one more activation to hold."""

    def __init__(self, dense: list[Any], sides: list[list[Any]], back: Sequence[Back], shelf: Shelf) -> None:
        self.dense, self.sides, self.back, self.shelf = dense, sides, back, shelf

    def __len__(self) -> int:
        return len(self.dense)

    def __getitem__(self, at: Any) -> Any:
        whole, left = (side[at] for side in self.sides)
        lack = whole - left
        for value in (whole, left):
            self.shelf.rest(value)
        for one in self.back:
            lack = one(lack)
        return self.dense[at] + lack
