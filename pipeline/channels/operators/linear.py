"""Linear layers, bilinear forms and tables of embeddings.

y[o] = Σ_i w[o, i]·x[i] + b[o]: the output lives with the rows and the bias, the input with the columns; index i may
go only where x[i] or w[·, i] is exactly zero (`Trace.contract`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from pipeline.channels.operators.card import Card, Shape, WeightedSum
from pipeline.channels.operators.masks import Masks, number
from pipeline.channels.operators.table import bind, family
from pipeline.channels.operators.trace import ROWS, Trace
from pipeline.channels.operators.values import Atoms, Flags, Value, both


def with_bias(
    t: Trace, node: fx.Node, bias: Any, atoms: Atoms | None, zeros: Flags | None
) -> tuple[Atoms | None, Flags | None]:
    """Rows with their bias: zero only when both are."""
    if bias is None:
        return atoms, zeros
    b = t.value(bias)
    if not b.shape or b.shape[-1] == 1:
        return atoms, None
    t.tie(atoms, b.atoms[-1], node)
    return (None if b.atoms[-1] is None else atoms), both(zeros, b.zeros[-1])


def depends_linear(m: Masks, node: fx.Node, value: Any) -> Tensor:
    """An output from every input whose weight is not zero."""
    a = bind(node)
    m.ask(a["weight"], a["bias"])
    return torch.nn.functional.linear(number(m.mask(a["input"])), number(m.filled(a["weight"]))) > 0.5


def macs_linear(node: fx.Node, shape: Shape) -> int:
    """Every output from every input."""
    return math.prod(shape(node)) * shape(bind(node)["input"])[-1]


@family(
    Card(
        "contraction",
        depends=depends_linear,
        macs=macs_linear,
        weighted=WeightedSum("input", "weight", "bias", input_dim=-1, output_dim=-1, weight_in=1, weight_out=0),
    ),
    "linear",
)
def linear(t: Trace, node: fx.Node) -> Value:
    """y[..., o] = Σ_i x[..., i]·w[o, i] + b[o]."""
    a = bind(node)
    x, w = t.value(a["input"]), t.value(a["weight"])
    t.contract(node, [(a["input"], len(x.shape) - 1), (a["weight"], len(w.shape) - 1)])
    t.reading(w.atoms[-1])
    if len(w.shape) == 1:
        return Value(x.shape[:-1], x.atoms[:-1], (None,) * (len(x.shape) - 1), x.derived and w.derived)
    atoms, zeros = with_bias(t, node, a["bias"], w.atoms[0], w.zeros[0])
    lead = _lead_zeros(x.zeros[:-1], a["bias"])
    return Value((*x.shape[:-1], w.shape[0]), (*x.atoms[:-1], atoms), (*lead, zeros), x.derived and w.derived)


def _lead_zeros(zeros: tuple[Flags | None, ...], bias: Any) -> tuple[Flags | None, ...]:
    """A slice of the input that is zero gives a slice of the output that is zero, unless a bias is added."""
    return zeros if bias is None else (None,) * len(zeros)


def depends_bilinear(m: Masks, node: fx.Node, value: Any) -> Tensor:
    """An output from every pair of inputs whose weight is not zero, where one depends and the other is not zero."""
    a = bind(node)
    m.ask(a["weight"], a["bias"])
    weight = number(m.filled(a["weight"]))
    masks = [(number(m.mask(a[k])), number(m.filled(a[k]))) for k in ("input1", "input2")]
    (first, first_filled), (second, second_filled) = masks
    bilinear = torch.nn.functional.bilinear
    return (bilinear(first, second_filled, weight) + bilinear(first_filled, second, weight)) > 0.5


def macs_bilinear(node: fx.Node, shape: Shape) -> int:
    """Every output from every pair of inputs."""
    a = bind(node)
    return math.prod(shape(node)) * shape(a["input1"])[-1] * shape(a["input2"])[-1]


@family(Card("contraction", depends=depends_bilinear, macs=macs_bilinear), "bilinear")
def bilinear(t: Trace, node: fx.Node) -> Value:
    """y[o] = Σ x1[i]·w[o, i, j]·x2[j] + b[o]."""
    a = bind(node)
    w = t.value(a["weight"])
    for side, dim in (("input1", 1), ("input2", 2)):
        t.contract(node, [(a[side], len(t.shape(a[side])) - 1), (a["weight"], dim)])
        t.reading(w.atoms[dim])
    atoms, zeros = with_bias(t, node, a["bias"], w.atoms[0], w.zeros[0])
    x = t.value(a["input1"])
    return Value((*x.shape[:-1], w.shape[0]), (*x.atoms[:-1], atoms), (*[None] * (len(x.shape) - 1), zeros))


def depends_embedding(m: Masks, node: fx.Node, value: Any) -> Tensor:
    """A column that holds one number for every row gives that number whatever is looked up."""
    a = bind(node)
    m.ask(a["weight"])
    table: Tensor = m.values[a["weight"]]
    return (table.amax(0) != table.amin(0)).expand(value.shape)


@family(
    Card(
        "lookup",
        depends=depends_embedding,
        weighted=WeightedSum("indices", "weight", None, input_dim=None, output_dim=-1, weight_in=0, weight_out=1),
    ),
    "embedding",
)
def embedding(t: Trace, node: fx.Node) -> Value:
    """Rows of a table picked by an integer: the rows stay, the columns are channels."""
    a = bind(node)
    w = t.value(a["weight"])
    t.pin(w.atoms[0], node, ROWS)
    if a["indices"] in t.values:
        t.pin_value(t.value(a["indices"]), node, ROWS)
    lead = len(t.shape(node)) - 1
    return Value(
        t.shape(node),
        (*[None] * lead, w.atoms[1]),
        (*[None] * lead, w.zeros[1]),
        w.derived and a["indices"] in t.static,
    )
