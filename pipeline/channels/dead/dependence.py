"""Which elements of a tensor depend on the inputs at all, read off one run of the graph.

Beside every value two masks are carried: `depends` (an input has a part in this element) and `nonzero` (it depends, or
is not zero). A product depends only where one factor depends and the other is not exactly zero, so a zero row, a zero
scale or a zero gate cuts the dependence off. An operator that is not known makes everything depend that touches
anything that does: the answer can be too cautious, never too bold.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from pipeline.channels.operators import layout, pointwise, space
from pipeline.channels.operators.table import RULES, base_name, bind, find, is_pointwise, tensors, writes
from pipeline.channels.program.capture import Captured, small
from pipeline.channels.program.execute import execute, feeds_of, last_uses

Seen = Callable[[fx.Node, Tensor, Tensor], None]
"""Called with (node, its value in float64, its `depends` mask) for every tensor of a run."""

_RANDOM = ("rand", "randn", "randint", "bernoulli", "multinomial", "normal", "randperm", "empty")
_SAME = {name for name, r in RULES.items() if r.relate is pointwise.unchanged}
_MOVES = {name for name, r in RULES.items() if r.relate.__module__ == layout.__name__}
_POOLS = {name for name, r in RULES.items() if r.relate is space.pooled}
_ALONG = ("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp", "softmin")
_REDUCE = ("mean", "sum", "amax", "amin", "var", "std", "prod", "logsumexp", "linalg_vector_norm", "norm")


class _Unknown(Exception):  # noqa: N818  # not an error: everything is taken to depend
    """No sharper answer than "everything depends"."""


def follow(captured: Captured, seen: Seen) -> None:
    """Run `captured` once in float64 on random inputs and hand every tensor to `seen`.

    A graph that writes into a view of a tensor is not followed: `seen` is told that all of it depends.
    """
    graph = captured.program.graph
    inputs = set(captured.program.graph_signature.user_inputs)
    run = _Run(graph, inputs, seen, aliased=_writes_into_views(graph))
    execute(graph, feeds_of(captured.program, small(captured), captured.state), dtype=torch.float64, watch=run.step)


@dataclass
class _Run:
    graph: fx.Graph
    inputs: set[str]
    seen: Seen
    aliased: bool
    values: dict[Any, Any] = field(default_factory=dict)
    depends: dict[Any, Any] = field(default_factory=dict)
    nonzero: dict[Any, Any] = field(default_factory=dict)
    dies: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dies = last_uses(self.graph)

    def step(self, node: fx.Node, value: Any) -> None:
        """One node, in order."""
        depends = self._mask(node, value)
        self._store(node, value, depends)
        if _is_write(node):  # what was written to has changed as well
            target: Any = node.args[0]
            while isinstance(target, fx.Node):
                self._store(target, value, depends)
                target = target.args[0] if _is_write(target) else None
        for v, d in zip(_parts(value), _parts(depends), strict=True):
            if isinstance(v, Tensor):
                self.seen(node, v, d)
        for dead in self.dies.get(node, ()):
            for held in (self.values, self.depends, self.nonzero):
                held.pop(dead, None)

    def _store(self, node: fx.Node, value: Any, depends: Any) -> None:
        self.values[node] = value
        self.depends[node] = depends
        self.nonzero[node] = (
            depends | (value != 0) if isinstance(value, Tensor) and isinstance(depends, Tensor) else None
        )

    def _mask(self, node: fx.Node, value: Any) -> Any:
        everything = _like(value, True)
        if node.op == "placeholder":
            return _like(value, node.name in self.inputs)
        if self.aliased:
            return everything
        if node.target is operator.getitem:
            whole = self.depends.get(node.args[0])
            return whole[int(node.args[1])] if isinstance(whole, tuple) else everything  # type: ignore[arg-type]
        if base_name(node.target).startswith(_RANDOM):
            return everything
        if not any(self._any(n) for n in node.all_input_nodes):
            return _like(value, False)
        if not isinstance(node.target, torch._ops.OpOverload):
            return everything
        try:
            found = _answer(self, node, value)
        except (_Unknown, RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError):
            return everything
        fits = [
            not isinstance(v, Tensor) or (isinstance(d, Tensor) and d.shape == v.shape)
            for v, d in zip(_parts(value), _parts(found), strict=False)
        ]
        return found if all(fits) and len(fits) == len(_parts(value)) else everything

    def _any(self, node: fx.Node) -> bool:
        return any(isinstance(d, Tensor) and bool(d.any()) for d in _parts(self.depends.get(node)))

    def mask(self, node: Any) -> Tensor:
        """What depends in a tensor argument."""
        found = self.depends[node]
        if not isinstance(found, Tensor):
            raise _Unknown
        return found

    def fixed(self, node: Any) -> bool:
        """Whether nothing of an argument depends."""
        return not isinstance(node, fx.Node) or not self._any(node)


def _parts(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _like(value: Any, fill: bool) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_like(v, fill) for v in value)
    return torch.full(value.shape, fill) if isinstance(value, Tensor) else None


def _is_write(node: fx.Node) -> bool:
    return writes(node) and bool(node.args) and isinstance(node.args[0], fx.Node)


def _writes_into_views(graph: fx.Graph) -> bool:
    """Whether an in-place operator's target is a view of something, or something has a view of it already."""

    def is_view(node: fx.Node) -> bool:
        schema = getattr(node.target, "_schema", None)
        if node.target is operator.getitem:
            return True
        return schema is not None and not writes(node) and any(a.alias_info for a in schema.arguments)

    order = {node: k for k, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if not _is_write(node):
            continue
        target: Any = node.args[0]
        while _is_write(target):
            target = target.args[0]
        if is_view(target) or any(is_view(u) and order[u] < order[node] for u in target.users):
            return True
    return False


# -- one operator --------------------------------------------------------------------------------------------------


def _answer(run: _Run, node: fx.Node, value: Any) -> Any:
    name = base_name(node.target)
    if name in _RULES:
        return _RULES[name](run, node, value)
    if name in _SAME:
        return run.mask(node.args[0])
    if name in _MOVES:
        return _moved(run, node, value)
    if name in _POOLS:
        return _pooled(run, node, value)
    rule = find(node.target)
    if is_pointwise(node.target) or (rule is not None and rule.relate is pointwise.pointwise):
        return _pointwise(run, node, value)
    raise _Unknown


def _on_masks(run: _Run, node: fx.Node, replace: dict[fx.Node, Tensor]) -> Any:
    """The operator itself on masks as numbers."""

    def swap(n: fx.Node) -> Any:
        return replace[n] if n in replace else run.values[n]

    return node.target(*fx.node.map_arg(node.args, swap), **fx.node.map_arg(node.kwargs, swap))  # type: ignore[operator]


def _moved(run: _Run, node: fx.Node, value: Any) -> Any:
    """Views, permutations, slices, concatenation, padding: the mask moves as the elements do."""
    replace: dict[fx.Node, Tensor] = {}
    for source in tensors(node):
        if run.values[source].dtype.is_floating_point:
            replace[source] = _number(run.mask(source))
        elif not run.fixed(source):
            raise _Unknown
    out = _on_masks(run, node, replace)
    return tuple(v != 0 for v in out) if isinstance(value, (tuple, list)) else out != 0


def _pooled(run: _Run, node: fx.Node, value: Any) -> Any:
    """Pooling and resizing by weights that are never negative; bicubic ones may cancel out."""
    source: Any = node.args[0]
    if "bicubic" in str(node.target):
        raise _Unknown
    out = _on_masks(run, node, {source: _number(run.mask(source))})
    if isinstance(out, Tensor):
        return out > 0
    return (out[0] > 0, *_like(value[1:], True))  # which place held the maximum is anyone's guess


def _pointwise(run: _Run, node: fx.Node, value: Tensor) -> Tensor:
    found = torch.zeros(value.shape, dtype=torch.bool)
    for source in tensors(node):
        found = found | run.mask(source)
    return found


def _multiplied(run: _Run, node: fx.Node, value: Tensor) -> Tensor:
    a, b = node.args[:2]
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return _pointwise(run, node, value)
    found: Tensor = (run.mask(a) & run.nonzero[b]) | (run.nonzero[a] & run.mask(b))
    return found


def _number(mask: Tensor) -> Tensor:
    return mask.to(torch.float32)


def _convolution(run: _Run, node: fx.Node, value: Tensor) -> Tensor:
    a = bind(node)
    if not (run.fixed(a["weight"]) and run.fixed(a["bias"])):
        raise _Unknown
    a |= {"input": _number(run.mask(a["input"])), "weight": _number(run.nonzero[a["weight"]]), "bias": None}
    out: Tensor = node.target(**a)  # type: ignore[operator]
    return out > 0.5  # a count of ones, up to rounding


def _linear(run: _Run, node: fx.Node, value: Tensor) -> Tensor:
    a = bind(node)
    if not (run.fixed(a["weight"]) and run.fixed(a["bias"])):
        raise _Unknown
    return torch.nn.functional.linear(_number(run.mask(a["input"])), _number(run.nonzero[a["weight"]])) > 0.5


def _matrix_product(run: _Run, node: fx.Node, value: Tensor) -> Tensor:
    a, b = node.args[:2]
    return _product(run, a, b, node.target)  # type: ignore[arg-type]


def _product(run: _Run, a: Any, b: Any, target: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    left = target(_number(run.mask(a)), _number(run.nonzero[b]))
    return (left + target(_number(run.nonzero[a]), _number(run.mask(b)))) > 0.5


def _addmm(run: _Run, node: fx.Node, value: Tensor) -> Tensor:
    bias, a, b = node.args[:3]
    return run.mask(bias) | _product(run, a, b, torch.matmul)


def _einsum(run: _Run, node: fx.Node, value: Tensor) -> Tensor:
    equation, operands = str(node.args[0]), list(node.args[1])  # type: ignore[arg-type]
    if len(operands) != 2:
        raise _Unknown
    return _product(run, operands[0], operands[1], lambda a, b: torch.einsum(equation, a, b))


def _embedding(run: _Run, node: fx.Node, value: Tensor) -> Tensor:
    """A column that holds one number for every row gives that number whatever is looked up."""
    a = bind(node)
    table: Tensor = run.values[a["weight"]]
    if not run.fixed(a["weight"]):
        raise _Unknown
    return (table.amax(0) != table.amin(0)).expand(value.shape)


def _per_channel(scale: Any, run: _Run, mask: Tensor, dim: int) -> Tensor:
    """`mask` where the scale of its channel is not zero."""
    if scale is None:
        return mask
    if not run.fixed(scale):
        raise _Unknown
    shape = [1] * mask.dim()
    shape[dim] = -1
    values: Tensor = run.values[scale]
    return mask & (values != 0).reshape(shape)


def _batch_norm(run: _Run, node: fx.Node, value: Any) -> Any:
    a = bind(node)
    if not isinstance(value, Tensor) or not run.fixed(a["bias"]):
        raise _Unknown
    mask = run.mask(a["input"])
    if a.get("training"):
        mask = _spread(mask, [d for d in range(mask.dim()) if d != 1])
    return _per_channel(a["weight"], run, mask, 1)


def _spread(mask: Tensor, dims: list[int]) -> Tensor:
    """Over `dims` every element has a part in every other."""
    return mask.to(torch.uint8).amax(dim=dims, keepdim=True).expand(mask.shape) != 0


def _layer_norm(run: _Run, node: fx.Node, value: Any) -> Tensor:
    a = bind(node)
    mask = run.mask(a["input"])
    over = len(a["normalized_shape"])
    mask = _spread(mask, list(range(mask.dim() - over, mask.dim())))
    if not (run.fixed(a["weight"]) and run.fixed(a.get("bias"))):
        raise _Unknown
    return mask if a["weight"] is None else mask & (run.values[a["weight"]] != 0)


def _group_norm(run: _Run, node: fx.Node, value: Any) -> Tensor:
    a = bind(node)
    mask = run.mask(a["input"])
    if not run.fixed(a["bias"]):
        raise _Unknown
    groups = mask.reshape(mask.shape[0], a["num_groups"], -1)
    return _per_channel(a["weight"], run, _spread(groups, [2]).reshape(mask.shape), 1)


def _instance_norm(run: _Run, node: fx.Node, value: Any) -> Tensor:
    a = bind(node)
    mask = run.mask(a["input"])
    if not run.fixed(a["bias"]):
        raise _Unknown
    return _per_channel(a["weight"], run, _spread(mask, list(range(2, mask.dim()))), 1)


def _attention(run: _Run, node: fx.Node, value: Tensor) -> Tensor:
    """Rows of a softmax sum to one: a value channel that is the same for every token comes out as it is."""
    a = bind(node)
    mask = run.mask(a["value"])
    v: Tensor = run.values[a["value"]]
    varies = (v.amax(-2, keepdim=True) != v.amin(-2, keepdim=True)) | mask.any(-2, keepdim=True)
    if varies.shape[:-2] != value.shape[:-2] or not run.fixed(a["attn_mask"]):
        raise _Unknown
    return varies.expand(value.shape)


def _along(run: _Run, node: fx.Node, value: Any) -> Tensor:
    a = bind(node)
    mask = run.mask(a["self"])
    return _spread(mask, [(a["dim"] if a["dim"] is not None else -1) % mask.dim()])


def _reduced(run: _Run, node: fx.Node, value: Any) -> Tensor:
    a = bind(node)
    mask = run.mask(a["self"])
    if not isinstance(value, Tensor) or "dim" not in a:
        raise _Unknown
    dims = a["dim"]
    dims = list(range(mask.dim())) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    return mask.to(torch.uint8).amax(dim=dims, keepdim=bool(a.get("keepdim", False))) != 0


_RULES: dict[str, Callable[[_Run, fx.Node, Any], Any]] = {
    **dict.fromkeys(
        ["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution"],
        _convolution,
    ),
    "linear": _linear,
    **dict.fromkeys(["matmul", "mm", "bmm", "mv", "dot"], _matrix_product),
    "addmm": _addmm,
    "einsum": _einsum,
    "embedding": _embedding,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "scaled_dot_product_attention": _attention,
    "mul": _multiplied,
    **dict.fromkeys(_ALONG, _along),
    **dict.fromkeys(_REDUCE, _reduced),
}
