"""From a captured graph to classes of atoms that go or stay together: walk the rules, then solve what they said.

Solving: connected components over the ties; pins mark whole components; products are settled last, again and again:
  every factor pinned            -> pin the flat dimension
  the flat dimension pinned      -> pin the factors
  two places of the flat dimension tied, that differ along one factor only -> tie them in that factor
  all places of a factor tied    -> it cannot shrink: pin it
  exactly one factor free        -> tie the flat dimension to it along the others
  two or more free               -> the policy chooses (heads or head positions; else the factor of most classes).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx
from torch.export.graph_signature import InputKind

from pipeline.channels.coupling.shuffle import find_shuffles
from pipeline.channels.operators.table import base_name, bind, find, writes
from pipeline.channels.operators.trace import NoRule, Pin, Policy, Product, Trace
from pipeline.channels.operators.values import PINNED, Atoms, Flags, Value, opaque
from pipeline.channels.program.capture import Captured
from pipeline.channels.program.macs import concrete, example_batch

Zeros = Mapping[tuple[str, int], Flags]

_SILENT = ("_assert", "sym_", "_local_scalar_dense", "item")
_RANDOM = ("rand", "randn", "randint", "bernoulli", "multinomial", "dropout", "empty")


@dataclass(frozen=True)
class Slot:
    """One dimension of one named tensor of the state, with its atoms. `masked`: masks write zeros into it."""

    name: str
    dim: int
    atoms: Atoms
    masked: bool


@dataclass(frozen=True)
class Solution:
    """`class_of[atom]`: the atom's class. `reason_of[class]`: index into `pins`, or −1 = may go."""

    class_of: Atoms
    reason_of: Atoms
    pins: tuple[Pin, ...]


# -- the walk ------------------------------------------------------------------------------------------------------


def walk(captured: Captured, policy: Policy, zeros: Zeros | None = None) -> tuple[Trace, list[Slot]]:
    """Apply every node's rule once, in order.

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
    slots = _placeholders(t, captured, zeros)
    t.static.update(static_values(captured))
    shuffles, between = find_shuffles(program.graph, t.shape)
    t.notes.update(shuffles)
    for node in program.graph.nodes:
        if node.op == "call_function":
            if node not in t.static and node not in between:
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
    name = base_name(node.target)
    if node.target is operator.getitem:
        parent: Any = node.args[0]
        at: Any = node.args[1]
        source = t.values.get(parent)
        return source[at] if isinstance(source, tuple) else t.opaque_like(node)
    if not isinstance(node.meta.get("val"), (Tensor, tuple, list)) or name.startswith(_SILENT):
        return None
    rule = find(node.target)
    if rule is None:
        return t.give_up(node, f"no rule for {name}")
    try:
        return _as_batched(node, rule.relate(t, node))
    except NoRule as reason:
        return t.give_up(node, str(reason))
    except (ValueError, TypeError, IndexError, KeyError, StopIteration, AttributeError) as error:
        return t.give_up(node, f"no rule for this form of {name} ({type(error).__name__}: {error})")


def _as_batched(node: fx.Node, value: Any) -> Any:
    """Parameters repeated for every sample follow the inputs' batch: they cannot be computed once."""
    val = node.meta["val"]
    if isinstance(value, Value) and value.derived and not all(isinstance(s, int) for s in val.shape):
        return replace(value, derived=False)
    return value


def _after_write(t: Trace, node: fx.Node) -> None:
    """An in-place operator changes its operand, and what that operand is a view of: forget that these were zero."""
    if not writes(node) or not node.args or not isinstance(node.args[0], fx.Node):
        return
    target: Any = node.args[0]
    result = t.values.get(node)
    if isinstance(result, Value):
        t.values[target] = result
    while True:
        schema = getattr(target.target, "_schema", None)
        views = schema is not None and any(a.alias_info is not None for a in schema.arguments)
        if not views or not target.args or not isinstance(target.args[0], fx.Node):
            return
        target = target.args[0]
        value = t.values.get(target)
        if isinstance(value, Value):
            t.values[target] = Value(value.shape, value.atoms, (None,) * len(value.shape), value.derived)


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
        if not named or spec.target is None or not val.dtype.is_floating_point:
            continue  # a constant: see static_values
        tensor = program.state_dict[spec.target]
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype) if tensor.numel() else spec.target
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
        if base_name(user.target).startswith("_weight_norm") and user.args[0] is node:
            found.add(bind(user)["dim"] % node.meta["val"].dim())
    return found


def _is_statistic(node: fx.Node) -> bool:
    """Whether a buffer is only ever a running mean or variance."""
    return bool(node.users) and all("norm" in base_name(u.target) for u in node.users)


def static_values(captured: Captured) -> dict[fx.Node, Tensor]:
    """Every node whose value depends on no input and no parameter (index tables, attention masks), with that value."""
    program = captured.program
    held = {**program.constants, **captured.state}
    named = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    roots: dict[str, Tensor] = {}
    for spec in program.graph_signature.input_specs:
        value = held.get(spec.target) if spec.target is not None else None
        constant = spec.kind == InputKind.CONSTANT_TENSOR or (spec.kind == InputKind.BUFFER and not spec.persistent)
        integer = isinstance(value, Tensor) and not value.dtype.is_floating_point and spec.kind == InputKind.BUFFER
        if isinstance(value, Tensor) and (constant or integer):
            roots[spec.arg.name] = value
    banned: set[fx.Node] = set()
    while True:
        static = _static_nodes(program.graph, {named[n] for n in roots}, banned)
        more = _written_from_outside(program.graph, static)
        if not more:
            break
        banned |= more
    feeds = {n: v.clone() for n, v in roots.items()}  # in-place operators must not reach the model's own
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in program.graph.nodes:
            if node not in static:
                continue
            if node.op == "placeholder":
                values[node] = feeds[node.name]
                continue
            args = fx.node.map_arg(node.args, lambda n: values.get(n, torch.empty(0, dtype=_dtype(n))))
            kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    return values


def _dtype(node: fx.Node) -> torch.dtype:
    val = node.meta.get("val")
    return val.dtype if isinstance(val, Tensor) else torch.float32


def _static_nodes(graph: fx.Graph, roots: set[fx.Node], banned: set[fx.Node]) -> dict[fx.Node, None]:
    static: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node in banned:
            continue
        if node.op == "placeholder":
            if node in roots:
                static[node] = None
            continue
        if node.op != "call_function":
            continue
        val = node.meta.get("val")
        parts = val if isinstance(val, (tuple, list)) else (val,)
        if not all(isinstance(v, Tensor) and all(isinstance(s, int) for s in v.shape) for v in parts):
            continue
        name = base_name(node.target)
        part = node.target is operator.getitem and node.args[0] in static
        if not part and (name.startswith(_RANDOM) or not isinstance(node.target, torch._ops.OpOverload)):
            continue
        sources = node.all_input_nodes
        if name.startswith("new_") and not name.startswith("new_empty"):
            sources = sources[1:]  # only the type of the first operand is used
        if all(s in static for s in sources):
            static[node] = None
    return static


def _written_from_outside(graph: fx.Graph, static: Mapping[fx.Node, None]) -> set[fx.Node]:
    """Static nodes that an in-place operator fills with something that is not static, and what they are views of."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if not writes(node) or node in static or not node.args:
            continue
        target: Any = node.args[0]
        while isinstance(target, fx.Node) and target in static:
            found.add(target)
            target = target.args[0] if target.args else None
    return found


# -- the solution --------------------------------------------------------------------------------------------------


class _Classes:
    """Union of atoms, by repeated connected components; pinned classes carry the index of their first reason."""

    def __init__(self, t: Trace) -> None:
        self.t = t
        self.class_of: Atoms = np.arange(t.count, dtype=np.int64)
        none = np.iinfo(np.int64).max
        self.reason = np.full(t.count, none, np.int64)
        self.none = none
        self.reason[PINNED] = -1
        left = np.concatenate([np.zeros(0, np.int64), *t.left])
        right = np.concatenate([np.zeros(0, np.int64), *t.right])
        self.merge(left, right)
        for k, pin in enumerate(t.pins):
            self.pin_classes(self.class_of[pin.atoms], k)

    def merge(self, left: Atoms, right: Atoms) -> None:
        """Join classes pairwise."""
        size = self.reason.shape[0]
        if not left.size:
            return
        graph = coo_matrix((np.ones(left.shape[0], np.int8), (left, right)), shape=(size, size))
        count, label = connected_components(graph, directed=False)
        reason = np.full(count, self.none, np.int64)
        np.minimum.at(reason, label, self.reason)
        self.reason = reason
        self.class_of = label.astype(np.int64)[self.class_of]

    def pin_classes(self, classes: Atoms, reason: int) -> None:
        np.minimum.at(self.reason, classes, reason)

    def pinned(self, classes: Atoms) -> Flags:
        pinned: Flags = self.reason[classes] != self.none
        return pinned


def solve(t: Trace) -> Solution:
    """Classes and what is pinned, every product settled."""
    c = _Classes(t)
    pins = list(t.pins)
    roles: dict[str, Flags] | None = None
    waiting = list(t.products)
    while waiting:
        left: list[Atoms] = []
        right: list[Atoms] = []
        still: list[Product] = []
        progress = False
        for p in waiting:
            done, ties, pinned_any = _settle(c, p, pins)
            progress |= done or pinned_any
            for a, b in ties:
                left.append(a)
                right.append(b)
            if not done:
                still.append(p)
        if left:
            c.merge(np.concatenate(left), np.concatenate(right))
            roles = None
        if not progress and still:
            roles = roles or _role_classes(t, c)
            for p in _independent(c, still):
                _choose(c, p, pins, roles, t.policy)
        waiting = still
    reason = np.where(c.reason == c.none, -1, c.reason)
    reason[c.class_of[PINNED]] = max(int(reason[c.class_of[PINNED]]), 0) if pins else 0
    return Solution(c.class_of, reason, tuple(pins))


def _independent(c: _Classes, products: list[Product]) -> list[Product]:
    """The first product of every set that hangs together by classes that may still go: one choice cannot touch another,
    and the rounds do not grow with depth.
    """
    found = [
        np.concatenate([c.class_of[a].reshape(-1) for a in (p.flat, *p.factors) if a is not None]) for p in products
    ]
    rows = np.repeat(np.arange(len(products)), [f.shape[0] for f in found])
    classes = np.concatenate(found)
    free = ~c.pinned(classes)
    size = len(products) + c.reason.shape[0]
    links = coo_matrix(
        (np.ones(int(free.sum()), np.int8), (rows[free], len(products) + classes[free])), shape=(size, size)
    )
    _, label = connected_components(links, directed=False)
    _, first = np.unique(label[: len(products)], return_index=True)
    return [products[i] for i in np.sort(first)]


def _settle(c: _Classes, p: Product, pins: list[Pin]) -> tuple[bool, list[tuple[Atoms, Atoms]], bool]:
    """One step on one product: (settled, classes to tie, whether something new was pinned)."""
    sizes = p.sizes
    flat = c.class_of[p.flat].reshape(sizes)
    factors = [None if f is None else c.class_of[f] for f in p.factors]
    flat_pinned = c.pinned(flat)
    new = False
    if flat_pinned.any():  # a flat index that stays keeps its place along every factor
        for d, f in enumerate(factors):
            if f is not None:
                axes = tuple(k for k in range(len(sizes)) if k != d)
                hit = flat_pinned.any(axis=axes) & ~c.pinned(f)
                if hit.any():
                    c.pin_classes(f[hit], int(c.reason[flat[flat_pinned]].min()))
                    new = True
    free = [d for d, f in enumerate(factors) if f is not None and not c.pinned(f).all()]
    if not free:
        rest = flat[~c.pinned(flat)]
        if rest.size:
            reasons = [int(c.reason[f].min()) for f in factors if f is not None]
            if not reasons:
                pins.append(Pin(p.flat, p.node, "merged from fixed dimensions"))
                reasons = [len(pins) - 1]
            c.pin_classes(rest, max(min(reasons), 0))
        return True, [], True
    if len(free) == 1:
        d = free[0]
        shape = [1] * len(sizes)
        shape[d] = sizes[d]
        spread = np.broadcast_to(factors[d].reshape(shape), sizes)  # type: ignore[union-attr]
        return True, [(flat.reshape(-1), np.ascontiguousarray(spread).reshape(-1))], False
    ties: list[tuple[Atoms, Atoms]] = []
    for d in free:
        mine = factors[d]
        assert mine is not None
        if (mine == mine[0]).all():  # all or nothing
            pins.append(Pin(np.zeros(0, np.int64), p.node, "its places are tied to one another"))
            c.pin_classes(mine, len(pins) - 1)
            new = True
            continue
        order = np.argsort(flat, axis=d, kind="stable")
        ordered, place = np.moveaxis(np.take_along_axis(flat, order, axis=d), d, 0), np.moveaxis(mine[order], d, 0)
        tied = (ordered[1:] == ordered[:-1]) & (place[1:] != place[:-1])
        if tied.any():
            ties.append((place[1:][tied], place[:-1][tied]))
            new = True
    return False, ties, new


def _role_classes(t: Trace, c: _Classes) -> dict[str, Flags]:
    found = {r: np.zeros(c.reason.shape[0], np.bool_) for r in ("head", "position", "residual")}
    for role, atoms in t.roles:
        found[role][c.class_of[atoms]] = True
    return found


def _choose(c: _Classes, p: Product, pins: list[Pin], roles: dict[str, Flags], policy: Policy) -> None:
    """Two or more factors could shrink: keep one free."""
    factors = {d: c.class_of[f] for d, f in enumerate(p.factors) if f is not None}
    free = [d for d, f in factors.items() if not c.pinned(f).all()]
    heads = [d for d in free if roles["head"][factors[d]].any()]
    positions = [d for d in free if roles["position"][factors[d]].any() and d not in heads]
    stay: int | None
    if positions and (heads or len(free) > len(positions)):
        others = heads or [d for d in free if d not in positions]
        stay = others[0] if policy.heads else positions[0] if policy.head_positions else None
    else:
        stay = max(free, key=lambda d: (np.unique(factors[d]).size, -d))
    what = "the other factor of the view goes instead" if stay is not None else "the recipe keeps heads and positions"
    for d in free:
        if d != stay:
            pins.append(Pin(np.zeros(0, np.int64), p.node, what))
            c.pin_classes(factors[d], len(pins) - 1)
