"""The same tensor again: copies, casts, dropout in evaluation."""

from __future__ import annotations

from torch import fx

from pipeline.channels.operators.card import Card
from pipeline.channels.operators.carry import in_place
from pipeline.channels.operators.masks import same
from pipeline.channels.operators.table import family
from pipeline.channels.operators.trace import NoRule, Trace
from pipeline.channels.operators.values import Value


@family(
    Card("same", depends=same, carries=in_place),
    "contiguous", "clone", "detach", "alias", "lift_fresh_copy", "lift_fresh", "resolve_conj", "resolve_neg",
    "requires_grad",
)  # fmt: skip
@family(
    Card("dropout", depends=same, carries=in_place, training="train"),
    "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout",
)  # fmt: skip
@family(Card("cast", depends=same), "to", "_to_copy")
@family(Card("pointwise", depends=same), "conj", "_conj")
def unchanged(t: Trace, node: fx.Node) -> Value:
    """Every index where it was."""
    x = t.value(node.args[0])
    if x.shape != t.shape(node):
        raise NoRule("changes the shape")
    return x
