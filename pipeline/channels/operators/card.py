"""What an operator is, said once: the card of its family.

A pass asks the card, never a name. A fact that a card leaves out has the cautious answer: its tensors are pinned,
everything in its output depends on everything, it is not counted, and no weight of it is known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from pipeline.channels.operators.cut import Cut
from pipeline.channels.operators.masks import Masks
from pipeline.channels.operators.trace import Trace

Relate = Callable[[Trace, fx.Node], Any]
"""States the relations and returns the node's value, or a tuple of values."""

Edit = Callable[[Cut, fx.Node], None]
"""Fixes the node's constants once channels have gone."""

Depends = Callable[[Masks, fx.Node, Any], Any]
"""For (masks, node, its value): which elements of the value an input has a part in, as bool tensor(s) of its shape."""

Shape = Callable[[fx.Node], tuple[int, ...]]
Macs = Callable[[fx.Node, Shape], int]
"""Multiply-accumulates of the node for the whole batch; `Shape` gives any tensor's sizes."""

Order = Callable[[fx.Node, int], list[int]]
"""For (node, rank): dimension k of the output is dimension order[k] of the operand."""

Carries = Callable[[fx.Node, int], int | None]
"""For (node, dim): where the first operand's dimension `dim` is in the output, see `carry`."""

Kind = Literal[
    "view",  # other sizes, the same elements in the same order
    "permutation",  # the same dimensions in another order
    "same",  # the same numbers in the same places
    "dropout",  # the same in evaluation, noise in training
    "cast",  # the same numbers, perhaps in another type
    "arrangement",  # elements repeated, picked, joined or padded, none of them changed
    "pointwise",  # each element by itself
    "pooling",  # windows of space, channel by channel
    "contraction",  # products summed over a dimension
    "lookup",  # rows of a table
    "norm",
    "weight norm",  # a weight as length and direction
    "reduction",  # dimensions summed or otherwise taken together
    "scan",  # along one dimension, each index from others
    "attention",
    "recurrent",
    "transform",  # between space and frequency, or complex numbers and pairs
    "creation",  # a tensor made from sizes
    "size",  # a size of a tensor
    "number",  # any other number that is read off a tensor
    "assertion",  # nothing comes out
]


@dataclass(frozen=True)
class WeightedSum:
    """Where y[o] = Σ_i w[o, i]·x[i] + b[o] has its operands, and which dimension of each holds channels.

    `input`, `weight`, `bias`: names of arguments. `input_dim` is summed over (None: rows of the weight are picked
    instead), `output_dim` holds o; negative ones count from the end. `weight_in` and `weight_out`: the weight's
    dimensions i and o. `windows`: a kernel slides over the input's other dimensions, with the arguments stride,
    padding, dilation and groups; with groups, one of the weight's two dimensions holds the channels of one group only.
    """

    input: str
    weight: str
    bias: str | None
    input_dim: int | None
    output_dim: int
    weight_in: int
    weight_out: int
    windows: bool = False

    @property
    def transposed(self) -> bool:
        """Whether each input is spread over outputs, instead of inputs gathered for an output."""
        return self.weight_in < self.weight_out


@dataclass(frozen=True)
class Card:
    """Every fact of one family of operators.

    `weighted`: its operands, where the weight is always the same argument. `matrices`: positions of the left and the
    right argument, where either may be one matrix of weights for all samples. `order`: of a permutation. `carries`:
    where it takes a dimension whole, if it is linear in its first operand. `random`: draws numbers in evaluation.
    `undefined`: what it holds is not known until something is written to it. `type_only`: of its first operand it uses
    the type, not the numbers. `averages`: gives means of its first operand's elements. `training`: the argument that
    switches to what it does in training.
    """

    kind: Kind
    relate: Relate | None = None
    edit: Edit | None = None
    depends: Depends | None = None
    macs: Macs | None = None
    weighted: WeightedSum | None = None
    matrices: tuple[int, int] | None = None
    order: Order | None = None
    carries: Carries | None = None
    random: bool = False
    undefined: bool = False
    type_only: bool = False
    averages: bool = False
    training: str | None = None

    @property
    def gives_tensors(self) -> bool:
        """Whether tensors come out, in which indices can be followed."""
        return self.kind not in ("size", "number", "assertion")

    @property
    def moves(self) -> bool:
        """Whether elements come out as they went in, in other places or several times."""
        return self.kind in ("view", "permutation", "same", "dropout", "arrangement")
