"""The table of cards: an operator's name -> its family's card; and what any node says of itself by its schema."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import fx

from pipeline.channels.operators.card import Card, Relate

R = TypeVar("R", bound=Relate)

CARDS: dict[str, Card] = {}
TAGGED: dict[torch.Tag, Card] = {}
"""Cards for operators that have none of their own, by PyTorch's own tag."""


def register(card: Card, *names: str) -> None:
    """Put the card of the ATen operators `names` (in-place twins included) in the table."""
    for name in names:
        if name in CARDS:
            raise ValueError(f"two cards for {name}")
        CARDS[name] = card


def family(card: Card, *names: str, tag: torch.Tag | None = None) -> Callable[[R], R]:
    """Register `card`, completed by the decorated function as its `relate`, for `names` and for the tag, if given."""

    def complete(relate: R) -> R:
        whole = replace(card, relate=relate)
        register(whole, *names)
        if tag is not None:
            TAGGED[tag] = whole
        return relate

    return complete


@lru_cache(maxsize=4096)
def base_name(target: Any) -> str:
    """The operator's name without namespace, overload and in-place mark: aten.add_.Tensor -> add."""
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__name__", str(target))
    name = target._schema.name.split("::", 1)[1]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def find(target: Any) -> Card | None:
    """The card for a node's target, or None."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    found = CARDS.get(base_name(target))
    if found is None and is_pointwise(target):
        return TAGGED[torch.Tag.pointwise]
    return found


def kind_of(node: fx.Node) -> str:
    """The kind of the node's operator, "" where it has no card."""
    card = find(node.target) if node.op == "call_function" else None
    return "" if card is None else card.kind


def draws(node: fx.Node) -> bool:
    """Whether the node's values differ from run to run; where it has no card, PyTorch's own tag decides."""
    card = find(node.target)
    if card is None:
        return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    if card.kind == "dropout" and card.training is not None:
        return bool(bind(node)[card.training])
    return card.random


def gives_operand(node: fx.Node) -> bool:
    """Whether the node gives its first operand itself, or a copy; a dropout does, unless it is on in evaluation."""
    return kind_of(node) in ("same", "dropout") and not draws(node)


@lru_cache(maxsize=4096)
def is_pointwise(target: Any) -> bool:
    """Whether PyTorch itself tags the operator, or the out-of-place twin of it, as pointwise."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    if torch.Tag.pointwise in target.tags:
        return True
    packet = getattr(torch.ops.aten, base_name(target), None)
    return packet is not None and any(
        torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
    )


def bind(node: fx.Node) -> dict[str, Any]:
    """The node's arguments by their schema names, defaults filled in."""
    bound: dict[str, Any] = {}
    for at, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if at < len(node.args):
            bound[argument.name] = node.args[at]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value if argument.has_default_value() else None
    return bound


def tensors(node: fx.Node) -> list[fx.Node]:
    """The node's tensor arguments in order, lists flattened."""
    found: list[fx.Node] = []

    def visit(arg: Any) -> None:
        if isinstance(arg, fx.Node) and isinstance(arg.meta.get("val"), torch.Tensor):
            found.append(arg)
        elif isinstance(arg, (list, tuple)):
            for a in arg:
                visit(a)

    visit(node.args)
    visit(tuple(node.kwargs.values()))
    return found
