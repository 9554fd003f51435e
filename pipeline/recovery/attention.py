"""Queries and keys through their product, where positions inside the heads are gone: what has to be kept are scores.

With the keys k' that are left, the queries which give the scores q·k of the dense network best are
q E[k k'ᵀ] E[k' k'ᵀ]⁻¹; the layer behind the queries is fitted to give these. Then the same for the keys with the new
queries, in turns. A softmax over the keys does not see what all scores of a query have in common: keys count by what
they differ from their mean.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from pipeline.channels.operators.table import bind
from pipeline.recovery import sums
from pipeline.recovery.contractions import weight_of
from pipeline.training.devices import ALONE, Together

aten = torch.ops.aten

TURNS = 2
"""Fits of the queries, and of the keys after them."""
PULL = 1e-3
"""Of the mean diagonal of a head's moments: how strongly each position is pulled to what it was."""

_MOVES = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unflatten.int, aten.flatten.using_ints,
    aten.transpose.int, aten.permute.default, aten.t.default, aten.mT.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.default, aten.contiguous.default, aten.clone.default, aten.alias.default, aten.select.int,
    aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int,
    aten.expand.default, aten.repeat_interleave.self_int, operator.getitem,
)  # fmt: skip
"""Operators that give numbers of their first argument, as they are."""
_PARTS = (aten.select.int, operator.getitem)
"""Those that take one part out of several, whose last argument says which."""
_SCALES = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_BEFORE_SOFTMAX = (
    *_SCALES, aten.add.Tensor, aten.sub.Tensor, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.view.default,
    aten.reshape.default, aten.to.dtype, aten._to_copy.default,
)  # fmt: skip
"""What may stand between the product and the softmax."""


@dataclass(frozen=True)
class Path:
    """From the layer `start` to what the scores read: `nodes`, in the order of their execution; `factor`: what they
    multiply its numbers by.
    """

    start: fx.Node
    nodes: tuple[fx.Node, ...]
    factor: float

    @property
    def end(self) -> fx.Node:
        """What the scores read."""
        return self.nodes[-1] if self.nodes else self.start

    def needed(self) -> set[fx.Node]:
        """What has to be known to run it again."""
        inside = {self.start, *self.nodes}
        return {source for node in inside for source in node.all_input_nodes} - inside


@dataclass(frozen=True)
class Scores:
    """The node that forms scores, and the paths to its queries and keys. `turned`: it reads the keys' transpose."""

    node: fx.Node
    queries: Path
    keys: Path
    turned: bool
    shared: bool
    """Whether several heads of queries read one head of keys inside the operator."""


def scores(node: fx.Node) -> Scores | None:
    """The scores that `node` forms for a softmax over the keys, from two layers without anything but moves between."""
    if node.op != "call_function":
        return None
    if node.target is aten.scaled_dot_product_attention.default:
        bound = bind(node)
        q, k, turned, shared = bound["query"], bound["key"], False, bool(bound.get("enable_gqa"))
    elif node.target in (aten.matmul.default, aten.bmm.default) and _softmax_follows(node):
        q, k, turned, shared = node.args[0], node.args[1], True, False
    else:
        return None
    queries, keys = (_path(end, node) if isinstance(end, fx.Node) else None for end in (q, k))
    return Scores(node, queries, keys, turned, shared) if queries and keys else None


def scales(node: fx.Node) -> bool:
    """Whether `node` multiplies by a number other than zero."""
    number = node.args[1] if node.target in _SCALES else None
    return isinstance(number, (int, float)) and number != 0


def _softmax_follows(node: fx.Node) -> bool:
    """Whether a softmax over the last dimension is all that the product ends in."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.target in _SOFTMAX:
            value = user.meta.get("val")
            last = value.dim() - 1 if isinstance(value, Tensor) else -1
            return user.args[1] in (-1, last)
        if user.target not in _BEFORE_SOFTMAX:
            return False
        node = user
    return False


def _path(end: fx.Node, reader: fx.Node) -> Path | None:
    """The path that ends at `end`; None where something else than moves is on it, or others read the same numbers."""
    nodes: list[fx.Node] = []
    factor, node = 1.0, end
    while True:
        if len(node.users) > 1 and not _apart(node):
            return None
        if weight_of(node) is not None:
            return Path(node, tuple(reversed(nodes)), factor)
        if scales(node):
            number = float(node.args[1])  # type: ignore[arg-type]
            factor *= number if node.target in (aten.mul.Tensor, aten.mul.Scalar) else 1 / number
        elif node.target not in _MOVES:
            return None
        nodes.append(node)
        source = node.args[0]
        if not isinstance(source, fx.Node):
            return None
        node = source


def _apart(node: fx.Node) -> bool:
    """Whether all that read it take different parts, or nothing but its size."""
    users = [user for user in node.users if user.target is not aten.sym_size.int]
    if len(users) < 2:
        return True
    if any(user.target not in _PARTS or user.target is not users[0].target for user in users):
        return False
    return len({tuple(user.args[1:-1]) for user in users}) == 1 and len({user.args[-1] for user in users}) == len(users)


@dataclass(frozen=True)
class Heads:
    """Which numbers of a layer's output the matrices of one chunk hold.

    `place`: (matrices, tokens, positions), where in the flat output; `channel`: (matrices, positions).
    """

    place: Tensor
    channel: Tensor


def heads(place: Tensor, channels: int) -> Heads | None:
    """The matrices of `place`, (..., tokens, positions) into a flat output with `channels` in its last dimension; None
    where the tokens of a matrix do not have the same channels.
    """
    flat = place.reshape(-1, *place.shape[-2:])
    found = flat % channels
    same = bool((found == found[:, :1]).all())
    return Heads(flat, found[:, 0]) if same else None


def labels(chunks: Sequence[Heads]) -> list[Tensor]:
    """For each chunk, which head each matrix is of: those with the same channels are one."""
    _, found = torch.unique(torch.cat([one.channel for one in chunks]), dim=0, return_inverse=True)
    return list(found.split([len(one.channel) for one in chunks]))


def wanted(
    own: Sequence[Tensor],
    other: Sequence[Tensor],
    reached: Sequence[Tensor],
    label: Sequence[Tensor],
    kept: Sequence[Tensor],
    learn: Sequence[Tensor],
    together: Together = ALONE,
    *,
    centred: bool,
) -> list[Tensor]:
    """What queries or keys should be for the scores to be kept, by chunk: (matrices, tokens, positions) like `own`,
    zero where not `kept` (matrices, positions).

    `own`, `other`: those of the dense network, and what they are multiplied by; `reached`: what the pruned network has
    for `other`. `label`: the head of each matrix. `learn`: bool (matrices,), which are looked at. `centred`: whether
    `other` are keys. `together`: the processes that each have some of the matrices, of every head.
    """
    count, size = 1 + max(int(one.max()) for one in label), own[0].shape[-1]
    moments, products = (torch.zeros(count, size, size, dtype=torch.float64) for _ in range(2))
    keep = torch.zeros(count, size, dtype=torch.bool)
    for b, c, which, mask, use in zip(other, reached, label, kept, learn, strict=True):
        keep[which] = mask
        b, c = b[use].double(), c[use].double() * mask[use].unsqueeze(1)
        if centred:
            b, c = (v - v.mean(1, keepdim=True) for v in (b, c))
        moments.index_add_(0, which[use], c.mT @ c)
        products.index_add_(0, which[use], b.mT @ c)
    moments, products = together.added(moments), together.added(products)
    turn = torch.zeros(count, size, size, dtype=torch.float64)
    for head in range(count):
        at = keep[head].nonzero().flatten()
        if not len(at):
            continue
        gram, start = moments[head][at][:, at], torch.eye(size, dtype=torch.float64)[:, at]
        load = PULL * max(float(gram.diagonal().mean()), 1e-30) * torch.eye(len(at), dtype=torch.float64)
        change = torch.linalg.solve(gram + load, (products[head][:, at] - start @ gram).mT).mT
        turn[head][:, at] = start + change
    turn = turn.to(own[0].dtype)
    return [a @ turn[which] for a, which in zip(own, label, strict=True)]


def lack(
    dense: Sequence[Sequence[Tensor]],
    pruned: Sequence[Sequence[Tensor]],
    judges: Sequence[Tensor],
    together: Together = ALONE,
) -> float:
    """Squares that scores lack over those of the dense ones, of the matrices that judge, about the mean of each query.

    `dense`, `pruned`: queries and keys, each (matrices, tokens, positions) by chunk.
    """
    wrong = total = 0.0
    for q, k, a, b, use in zip(*dense, *pruned, judges, strict=True):
        one, two = (x[use] @ (y[use] - y[use].mean(1, keepdim=True)).mT for x, y in ((q, k), (a, b)))
        wrong += sums.squares(one - two)
        total += sums.squares(one)
    wrong, total = together.sum(wrong, total)
    return wrong / (total or 1.0)
