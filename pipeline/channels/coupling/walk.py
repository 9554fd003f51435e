"""The walk over a captured graph: every node's card states its relations, once, in order.

Every dimension of every parameter starts with atoms of its own; the inputs and outputs of the model are pinned.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, fx
from torch.export.graph_signature import InputKind

from foundation.editor import writes
from foundation.files import memory_of
from pipeline.channels.coupling.shuffle import find_shuffles
from pipeline.channels.operators.strict import BUGS, strict
from pipeline.channels.operators.table import base_name, bind, find, gives_operand, kind_of
from pipeline.channels.operators.trace import NoRule, Policy, Trace
from pipeline.channels.operators.values import Atoms, Flags, Value, opaque
from pipeline.channels.program.capture import Captured
from pipeline.channels.program.macs import concrete, example_batch
from pipeline.channels.program.static import static_values

Zeros = Mapping[tuple[str, int], Flags]
"""(parameter, dimension) -> which of its slices are zero."""


@dataclass(frozen=True)
class Slot:
    """One dimension of one named tensor of the state, with its atoms. `masked`: masks write zeros into it."""

    name: str
    dim: int
    atoms: Atoms
    masked: bool


def walk(captured: Captured, policy: Policy, zeros: Zeros | None = None) -> tuple[Trace, list[Slot]]:
    """What every node's card states, and the parameters' dimensions.

    `zeros`: (parameter, dim) -> which slices are zero *now*. Without it every parameter is taken as zero in
    whatever goes, as the masks will make it. Atoms are numbered alike in both.
    """
    program = captured.program
    batch = example_batch(program) if captured.dynamic_batch else 0
    sizes: dict[Any, int] = {}

    def size_of(size: Any) -> int:
        if isinstance(size, int):
            return size
        key = size.node.expr
        if key not in sizes:
            sizes[key] = concrete(size, batch)
        return sizes[key]

    t = Trace(policy, size_of)
    # Parameters first: the numbering of atoms must not depend on what is zero.
    slots = _placeholders(t, captured, zeros)
    t.static.update(static_values(captured))
    shuffles, between = find_shuffles(program.graph, t.shape)
    t.notes.update(shuffles)
    for node in program.graph.nodes:
        if node.op == "call_function":
            if node not in t.static and node not in between:  # the last view of a shuffle stands for all of it
                t.values[node] = _apply(t, node)
                _after_write(t, node)
        elif node.op == "output":
            for source in node.all_input_nodes:
                value = t.values.get(source)
                for v in value if isinstance(value, tuple) else (value,):
                    if isinstance(v, Value):
                        t.pin_value(v, node, "an output of the model")
    return t, slots


def _apply(t: Trace, node: fx.Node) -> Any:
    if node.target is operator.getitem:
        parent: Any = node.args[0]
        at: Any = node.args[1]
        source = t.values.get(parent)
        return source[at] if isinstance(source, tuple) else t.opaque_like(node)
    card = find(node.target)
    silent = card is not None and not card.gives_tensors
    if silent or not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
        return None
    name = base_name(node.target)
    if card is None or card.relate is None:
        return t.give_up(node, f"no rule for {name}")
    try:
        return _as_batched(node, card.relate(t, node))
    except NoRule as reason:
        return t.give_up(node, str(reason))
    except BUGS as error:
        if strict() or isinstance(error, RuntimeError):
            raise
        return t.give_up(node, f"no rule for this form of {name}")


def _as_batched(node: fx.Node, value: Any) -> Any:
    """Parameters repeated for every sample follow the inputs' batch: they cannot be computed once."""
    val = node.meta["val"]
    if isinstance(value, Value) and value.derived and not all(isinstance(s, int) for s in val.shape):
        return replace(value, derived=False)
    return value


def _after_write(t: Trace, node: fx.Node) -> None:
    """An in-place operator changes its operand: forget that it was zero. What it is a view of changes too, and stays,
    as a copy may take the view's place (the writes that are followed were made plain in `written`).
    """
    if not writes(node) or not node.args or not isinstance(node.args[0], fx.Node):
        return
    if gives_operand(node):  # it writes what is there
        return
    target: Any = node.args[0]
    result = t.values.get(node)
    if isinstance(result, Value):
        t.values[target] = result
    while True:
        schema = getattr(target.target, "_schema", None)
        views = target.target is operator.getitem or (
            schema is not None and any(a.alias_info is not None for a in schema.arguments)
        )
        if not views or not target.args or not isinstance(target.args[0], fx.Node):
            return
        view, target = target, target.args[0]
        value = t.values.get(target)
        if isinstance(value, Value):
            t.values[target] = Value(value.shape, value.atoms, (None,) * len(value.shape), value.derived)
            if not writes(view):
                t.pin_value(value, node, f"written in place through a view ({view.name})")


def _placeholders(t: Trace, captured: Captured, zeros: Zeros | None) -> list[Slot]:
    program = captured.program
    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    known: dict[Any, Value] = {}
    slots: list[Slot] = []
    # A tied parameter may have one placeholder that is used and others that are not: used ones come first.
    specs = sorted(program.graph_signature.input_specs, key=lambda s: not nodes[s.arg.name].users)
    for spec in specs:
        node = nodes[spec.arg.name]
        val = node.meta.get("val")
        if not isinstance(val, Tensor):
            continue
        if spec.kind == InputKind.USER_INPUT:
            t.values[node] = opaque(t.shape(node))
            continue
        named = spec.kind == InputKind.PARAMETER or (spec.kind == InputKind.BUFFER and spec.persistent)
        if not named or spec.target is None or not (val.dtype.is_floating_point or val.dtype.is_complex):
            continue  # a constant: see static_values
        tensor = program.state_dict[spec.target]
        # Tied tensors share their memory, and so one value.
        key = memory_of(spec.target, tensor)
        masked = spec.kind == InputKind.PARAMETER or not _is_statistic(node)
        unmasked = _direction_dims(node)
        if not node.users and key not in known:
            continue  # an auxiliary head that evaluation does not use: the cut drops it
        if key not in known:
            shape = tuple(tensor.shape)
            known[key] = Value(
                shape,
                tuple(t.fresh(n) if n > 1 else None for n in shape),
                tuple(
                    _zero_slices(spec.target, d, n, masked and d not in unmasked, zeros) if n > 1 else None
                    for d, n in enumerate(shape)
                ),
                derived=True,
            )
        value = known[key]
        t.values[node] = value
        slots += [
            Slot(spec.target, d, a, masked and d not in unmasked) for d, a in enumerate(value.atoms) if a is not None
        ]
    return slots


def _zero_slices(name: str, dim: int, size: int, masked: bool, zeros: Zeros | None) -> Flags | None:
    if zeros is not None:
        return zeros.get((name, dim))
    return np.full(size, True) if masked else None


def _direction_dims(node: fx.Node) -> set[int]:
    """Dimensions in which a parameter is the v of g·v/‖v‖: zeros there would give 0/0; the slice is zero when g is."""
    found: set[int] = set()
    for user in node.users:
        if kind_of(user) == "weight norm" and user.args[0] is node:
            found.add(bind(user)["dim"] % node.meta["val"].dim())
    return found


def _is_statistic(node: fx.Node) -> bool:
    """Whether a buffer is only ever a running mean or variance."""
    return bool(node.users) and all(kind_of(u) == "norm" for u in node.users)
