"""Run an exported graph node by node, on any state, in any float precision, watching any node."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

Watch = Callable[[fx.Node, Any], None]
Change = Callable[[fx.Node, Any], Any]
Compute = Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any]


def last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For every node, the nodes whose values nobody needs once it has run."""
    seen: set[fx.Node] = set()
    dies: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                dies.setdefault(node, []).append(source)
    return dies


def execute(
    graph: fx.Graph,
    feeds: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    watch: Watch | None = None,
    change: Change | None = None,
    compute: Compute | None = None,
    only: Iterable[fx.Node] | None = None,
) -> tuple[Any, ...]:
    """The outputs of `graph` for placeholder values `feeds` (placeholder name -> value).

    `dtype`: every float32 tensor and every float32 constant of the graph takes this precision instead, complex ones of
    that precision along with them.
    `watch(node, value)` sees each value as it is computed; `change(node, value)`
    gives what takes its place. `compute(node, args, kwargs)` works a node's value out instead of its operator.
    `only`: run these nodes and stop (no outputs then).
    """
    wanted = None if only is None else set(only)
    dies = last_uses(graph)
    values: dict[fx.Node, Any] = {}

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor) and dtype is not None:
            if value.dtype == torch.float32:
                return value.to(dtype)
            if value.dtype == torch.complex64:
                return value.to(dtype.to_complex())
        return value

    with torch.no_grad(), _default_dtype(dtype):
        for node in graph.nodes:
            if wanted is not None and node not in wanted and node.op != "output":
                continue
            if node.op == "placeholder":
                values[node] = cast(feeds[node.name])
            elif node.op == "call_function":
                args = fx.node.map_arg(node.args, values.__getitem__)
                kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
                if dtype is not None:
                    args = swap_dtype(args, dtype)
                    kwargs = swap_dtype(kwargs, dtype)
                    # Without an eps it takes the type's own, which would be another in this precision.
                    if node.target is torch.ops.aten.rms_norm.default and (len(args) < 4 or args[3] is None):
                        args = (*(*args, None, None)[:3], torch.finfo(torch.float32).eps)
                values[node] = node.target(*args, **kwargs) if compute is None else compute(node, args, kwargs)
            elif node.op == "output":
                if wanted is not None:
                    return ()
                return tuple(fx.node.map_arg(node.args[0], values.__getitem__))
            else:
                raise ValueError(f"a flat exported graph holds no {node.op} node ({node.name})")
            if change is not None:
                values[node] = change(node, values[node])
            if watch is not None:
                watch(node, values[node])
            if wanted is None:
                for dead in dies.get(node, ()):
                    values.pop(dead, None)
    return ()


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Tensors that the graph creates without naming a type take the precision too."""
    before = torch.get_default_dtype()
    if dtype is not None:
        torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def swap_dtype(arg: Any, dtype: torch.dtype) -> Any:
    """`arg` with every torch.float32 in it replaced by `dtype`, and complex64 by the complex type of that precision."""
    if isinstance(arg, torch.dtype):
        return dtype if arg == torch.float32 else dtype.to_complex() if arg == torch.complex64 else arg
    if isinstance(arg, (list, tuple)):
        return type(arg)(swap_dtype(a, dtype) for a in arg)
    if isinstance(arg, dict):
        return {k: swap_dtype(v, dtype) for k, v in arg.items()}
    return arg


def feeds_of(
    program: torch.export.ExportedProgram, inputs: Sequence[Any], state: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """Placeholder name -> value for `program`: its own state and constants (or `state`), and the user's `inputs`."""
    held: dict[str, Any] = dict(program.constants)
    held.update(program.state_dict)
    if state is not None:
        held.update(state)
    remaining = iter(inputs)
    feeds: dict[str, Any] = {}
    for spec in program.graph_signature.input_specs:
        name = spec.arg.name
        if spec.target is not None:
            feeds[name] = held[spec.target]
        else:
            feeds[name] = next(remaining)
    return feeds


def run_program(
    program: torch.export.ExportedProgram,
    inputs: Sequence[Any],
    state: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    watch: Watch | None = None,
    change: Change | None = None,
) -> Any:
    """The program's outputs for `inputs` on `state` (its own by default), in `dtype` where given.

    One tensor where the program has one output, else a tuple.
    """
    outputs = execute(program.graph, feeds_of(program, inputs, state), dtype=dtype, watch=watch, change=change)
    return outputs[0] if len(outputs) == 1 else outputs
