"""Scaled dot-product attention: softmax(q·kᵀ·scale + mask)·v over [batch, heads, tokens, positions]."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, fx

from pipeline.channels.operators.card import Card, Shape
from pipeline.channels.operators.cut import Cut
from pipeline.channels.operators.masks import Masks, NoAnswer
from pipeline.channels.operators.table import bind, family
from pipeline.channels.operators.trace import Trace
from pipeline.channels.operators.values import Atoms, Flags, Value


def edit_scale(c: Cut, node: fx.Node) -> None:
    """The default scale is (head size)^−1/2: it is written out before the head size changes."""
    a = bind(node)
    q = c.value(a["query"])
    if a["scale"] is None and c.keep(q.atoms[-1]) is not None:
        c.set(node, scale=float(q.shape[-1]) ** -0.5)


def depends_attention(m: Masks, node: fx.Node, value: Any) -> Tensor:
    """Rows of a softmax sum to one: a value channel that is the same for every token comes out as it is."""
    a = bind(node)
    mask = m.mask(a["value"])
    v: Tensor = m.values[a["value"]]
    varies = (v.amax(-2, keepdim=True) != v.amin(-2, keepdim=True)) | mask.any(-2, keepdim=True)
    m.ask(a["attn_mask"])
    if varies.shape[:-2] != value.shape[:-2]:
        raise NoAnswer
    return varies.expand(value.shape)


def macs_attention(node: fx.Node, shape: Shape) -> int:
    """Scores, and the sum of values."""
    a = bind(node)
    query, key, value = shape(a["query"]), shape(a["key"]), shape(a["value"])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


@family(
    Card("attention", edit=edit_scale, depends=depends_attention, macs=macs_attention), "scaled_dot_product_attention"
)
def attention(t: Trace, node: fx.Node) -> Value:
    """Heads live together in q, k and v; positions in q with k, and in v with the output; tokens stay."""
    a = bind(node)
    nodes = [a["query"], a["key"], a["value"]]
    q, k, v = (t.value(n) for n in nodes)
    rank = len(q.shape)
    for value in (q, k, v):
        t.role("position", value.atoms[-1])
    t.contract(node, [(nodes[0], rank - 1), (nodes[1], rank - 1)])
    t.pin(k.atoms[-2], node, "the softmax runs over it")
    t.pin(v.atoms[-2], node, "the softmax runs over it")
    atoms: list[Atoms | None] = []
    zeros: list[Flags | None] = []
    for d in range(rank - 2):
        flags = v.zeros[d]  # a head whose values are zero gives zero, whatever its scores are
        if d == rank - 3 and a.get("enable_gqa") and q.shape[d] != k.shape[d]:
            batch = _shared_heads(t, node, q, k, v, d)
            flags = None if flags is None else flags.repeat(q.shape[d] // k.shape[d])
        else:
            batch = _own_heads(t, node, q, k, v, d)
        t.role("head", batch)
        atoms.append(batch)
        zeros.append(flags if batch is not None else None)
    if a["attn_mask"] is not None:
        mask = t.value(a["attn_mask"])  # added to the scores, [..., heads, query tokens, key tokens], by broadcasting
        scores = [*atoms, q.atoms[-2], None]
        for d, n in enumerate(mask.shape):
            at = d - len(mask.shape) + rank
            if n > 1:
                t.tie(scores[at], mask.atoms[d], node, "shares a dimension with something fixed")
                if at < rank - 2 and mask.atoms[d] is None:
                    atoms[at] = zeros[at] = None
    return Value(t.shape(node), (*atoms, q.atoms[-2], v.atoms[-1]), (*zeros, None, v.zeros[-1]))


def _shared_heads(t: Trace, node: fx.Node, q: Value, k: Value, v: Value, d: int) -> Atoms | None:
    """Several query heads to one head of keys and values: they go with it, all together."""
    shared, ratio = k.shape[d], q.shape[d] // k.shape[d]
    t.tie(k.atoms[d], v.atoms[d], node)
    t.role("head", k.atoms[d])
    heads, key_heads = q.atoms[d], k.atoms[d]
    if heads is None or key_heads is None:
        t.pin(heads, node, "shares a dimension with something fixed")
        t.pin(key_heads, node, "shares a dimension with something fixed")
        return None
    inner = t.fresh(ratio)
    t.pin(inner, node, "query heads of one key head")
    t.product(node, heads, (key_heads, inner), (shared, ratio))
    return heads


def _own_heads(t: Trace, node: fx.Node, q: Value, k: Value, v: Value, d: int) -> Atoms | None:
    """As many heads in q, k and v; a dimension that is broadcast over the others' stays."""
    heads = q.atoms[d]
    for other in (k, v):
        if other.shape[d] == q.shape[d]:
            t.tie(heads, other.atoms[d], node)
            heads = None if other.atoms[d] is None else heads
        else:
            t.pin(heads if q.shape[d] > 1 else other.atoms[d], node, "broadcast over heads")
            heads = None
    return heads
