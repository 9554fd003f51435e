"""The table of rules: an operator's name -> what it relates, and how its constants change when channels go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import fx

from pipeline.channels.operators.cut import Cut
from pipeline.channels.operators.trace import Trace

Relate = Callable[[Trace, fx.Node], Any]
Edit = Callable[[Cut, fx.Node], None]
R = TypeVar("R", bound=Relate)


@dataclass(frozen=True)
class Rule:
    """`relate` states the relations and returns the node's value; `edit` fixes the node's constants afterwards."""

    relate: Relate
    edit: Edit | None = None


RULES: dict[str, Rule] = {}


def rule(*names: str, edit: Edit | None = None) -> Callable[[R], R]:
    """Register a function as the rule of the ATen operators `names` (in-place twins included)."""

    def register(relate: R) -> R:
        for name in names:
            if name in RULES:
                raise ValueError(f"two rules for {name}")
            RULES[name] = Rule(relate, edit)
        return relate

    return register


@lru_cache(maxsize=4096)
def base_name(target: Any) -> str:
    """The operator's name without namespace, overload and in-place mark: aten.add_.Tensor -> add."""
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__name__", str(target))
    name = target._schema.name.split("::", 1)[1]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def writes(node: fx.Node) -> bool:
    """Whether the node's operator changes one of its operands in place."""
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def find(target: Any) -> Rule | None:
    """The rule for a node's target, or None."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace != "aten":
        return None
    found = RULES.get(base_name(target))
    if found is None and is_pointwise(target):
        return RULES["<pointwise>"]
    return found


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
