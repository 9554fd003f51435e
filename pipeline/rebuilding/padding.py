"""Norms over a stream of which channels went, in a class whose own `forward` calls them.

Such a norm takes its mean and variance over the channels that are left and the zeros that are gone, by their original
count, which no narrower layer of its class does. So it keeps its size: what goes in is padded with the zeros, and of
what comes out the channels that are left go on. Beside the products around it that costs next to nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from pipeline.channels.program.capture import Captured
from pipeline.channels.removal.rewrite import Shrunk
from pipeline.rebuilding.numbers import module_of
from pipeline.rebuilding.structure import Padding


def paddings(model: nn.Module, captured: Captured, shrunk: Shrunk) -> dict[str, Padding]:
    """Name of a norm that `shrunk` computes with its original count -> how its input is padded; `model`: the dense one,
    of which `captured` is a capture.
    """
    before = {node.name: node for node in captured.program.graph.nodes}
    after = {node.name: node for node in shrunk.program.graph.nodes}
    signature = captured.program.graph_signature
    state = {*signature.inputs_to_parameters, *signature.inputs_to_buffers}
    calls: dict[str, set[fx.Node]] = defaultdict(set)
    for node in before.values():
        if node.op == "call_function":
            calls[module_of(node)].add(node)
    found: dict[str, Padding] = {}
    for rewrite in shrunk.ledger.rewrites:
        at = before.get(rewrite.node)
        path = module_of(at) if at is not None and rewrite.argument == "operator" else ""
        kept = _kept(model, shrunk, path) if path and path not in found else ()
        source = _given(calls[path], state) if kept else None
        if source is None or source.name not in after:
            continue
        old, new = (list(one.meta["val"].shape) for one in (source, after[source.name]))
        cut = [d for d, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
        if len(cut) == 1 and new[cut[0]] == len(kept):
            found[path] = Padding(dim=cut[0] - len(old), size=old[cut[0]], kept=kept)
    return found


def parameters(model: nn.Module, padded: Mapping[str, Padding]) -> set[str]:
    """Names of the tensors that keep their size."""
    return {f"{path}.{name}" for path in padded for name in model.get_submodule(path).state_dict()}


def pad(model: nn.Module, padded: Mapping[str, Padding]) -> None:
    """Let these modules of `model` see all of their channels again; a deep copy does so, too."""
    for path, one in padded.items():
        module = model.get_submodule(path)
        module.register_forward_pre_hook(partial(_whole, one), with_kwargs=True)
        module.register_forward_hook(partial(_left, one))


def _kept(model: nn.Module, shrunk: Shrunk, path: str) -> tuple[int, ...]:
    """Which channels a norm has left, by the one list that all its parameters have lost to; () where it is no norm."""
    module = model.get_submodule(path)
    own = [f"{path}.{name}" for name in module.state_dict()]
    lists = {tuple(map(int, shrunk.ledger.kept.get(name, {}).get(0, ()))) for name in own}
    plain = not any(module.children()) and all(value.dim() == 1 for value in module.state_dict().values())
    return lists.pop() if plain and len(lists) == 1 else ()


def _given(calls: set[fx.Node], state: set[str]) -> fx.Node | None:
    """The tensor that a module with these `calls` is given, where it is one; `state`: names of what holds weights."""
    outside = {source for node in calls for source in node.all_input_nodes if source.name not in state} - calls
    return outside.pop() if len(outside) == 1 else None


def _whole(
    padding: Padding, _module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def padded(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        shape = list(x.shape)
        shape[padding.dim] = padding.size
        return x.new_zeros(shape).index_copy(padding.dim, _index(padding, x), x)

    return tuple(map(padded, given)), {name: padded(value) for name, value in named.items()}  # a norm has one tensor


def _left(padding: Padding, _module: nn.Module, _given: tuple[Any, ...], made: Tensor) -> Tensor:
    return made.index_select(padding.dim, _index(padding, made))


def _index(padding: Padding, x: Tensor) -> Tensor:
    return torch.tensor(padding.kept, device=x.device)
