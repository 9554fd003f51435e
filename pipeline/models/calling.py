"""A module that takes its inputs by position and gives plain outputs, whatever its own `forward` takes and returns.

Everything behind the front door (capture, training, the fit, the runners) hands over a flat row of tensors and reads
tensors by name. What a user's `forward` takes (keywords, mappings, lists) and returns (mappings, model outputs,
dataclasses) is translated here, once, without a wrapper around the module: parameters keep the names that they have.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from foundation.errors import ModelError, nearest

Outputs = Mapping[str, Tensor]
"""A model's output tensors by name, the batch in dimension 0."""

ADAPTED = "_leanort_adapted"
"""Attribute of a class that `adapted` made; the user's own is its base."""

ONLY = "output"
"""Name of an output that has none, and is the only one."""


class OtherInTrainingError(ModelError):
    """A module that gives other outputs in training mode, as detectors do."""


@dataclasses.dataclass(frozen=True)
class Call:
    """How `forward` is called: the tree of (arguments, keyword arguments) that a flat row of tensors is put into.

    `names`: of the tensors in that row, as the user wrote them. `keep`: which outputs stay, by name; None: all.
    `outputs`: what the outputs are called, in order, where the module itself has no names for them. `order`: which
    tensor of the row comes first in the tree, which second, ...; None: as they are.
    """

    names: tuple[str, ...]
    tree: pytree.TreeSpec
    keep: tuple[str, ...] | None = None
    outputs: tuple[str, ...] | None = None
    order: tuple[int, ...] | None = None


def flattened(
    args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[str, ...], tuple[Any, ...], pytree.TreeSpec]:
    """Names, tensors and tree of what a `forward` is called with; an argument without a name has the name "".

    Entries of a mapping or list inside an argument are named after it: `batch.pixels`, `pyramid.0`.
    """
    found, tree = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))
    return tuple(_name(path) for path, _ in found), tuple(leaf for _, leaf in found), tree


def _name(path: Sequence[Any]) -> str:
    """Of a tensor at `path` within (arguments, keyword arguments); "" for an argument that is given by position."""
    _, place, *rest = (str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)
    by_position = getattr(path[0], "idx", None) == 0
    return ".".join([*(() if by_position and not rest else (place,)), *rest])


def bound(model: nn.Module, args: int, kwargs: Sequence[str], spec: str) -> tuple[str, ...]:
    """Names of the arguments that `args` positional inputs go to. Raises ModelError where `forward` does not take them.

    An input that it does not know is named, with the nearest that it knows, and so is one that it cannot do without.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    kinds = inspect.Parameter
    by_position = [p.name for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    known = [p.name for p in parameters if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    takes_any = any(p.kind is kinds.VAR_KEYWORD for p in parameters)
    variadic = any(p.kind is kinds.VAR_POSITIONAL for p in parameters)
    listed = ", ".join(p.name for p in parameters) or "nothing"
    unknown = [name for name in kwargs if name not in known and not takes_any]
    if unknown:
        hint = nearest(unknown[0], known) or f"It takes {listed}."
        raise ModelError(
            f"The data gives an input {unknown[0]!r}, which the forward of {spec} does not take.",
            f"{hint} Which entries of a sample are inputs: --set 'data.inputs=[\"...\"]'",
        )
    if args > len(by_position) and not variadic:
        raise ModelError(
            f"The data gives {args} inputs, and the forward of {spec} takes {len(by_position)} ({listed}).",
            "Return (input, ..., target) with as many inputs as the model takes, or a mapping with their names.",
        )
    taken = [*by_position[:args], *kwargs]
    missing = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL) and p.name not in taken
    ]
    if missing:
        raise ModelError(
            f"The forward of {spec} also wants {', '.join(missing)}; the data gives {', '.join(taken) or 'nothing'}.",
            "Return (input, ..., target) with all that the model takes, or a mapping with their names.",
        )
    return tuple(by_position[number] if number < len(by_position) else f"input_{number}" for number in range(args))


def refuse_lists_of_results(out: object, name: str) -> None:
    """Raise ModelError where a model returned one mapping per sample, as detectors do in eval mode."""
    if isinstance(out, list) and out and isinstance(out[0], dict):
        raise ModelError(
            f"{name} returns one dict per sample, as detectors do: how many results it gives depends on the data.",
            "Give a model whose outputs are tensors (batch, ...), such as the raw outputs of the detector's heads.",
        )


def named(out: object) -> dict[str, Tensor]:
    """Every tensor in what a model returned, by name, in the order in which torch.export lists them.

    One tensor alone is called "output", those of a row output_0, output_1, ..., those of a mapping, a model output or a
    dataclass as they are called there; what lies deeper has its path. What is no tensor is left out.
    Raises ModelError where there is none.
    """
    refuse_lists_of_results(out, "The model")
    found: dict[str, Tensor] = {}
    _gather(out, "", found, set())
    if not found:
        raise ModelError(
            f"The model returns {type(out).__name__} without a tensor in it.",
            "Return a tensor, or a tuple or mapping of tensors.",
        )
    return found


def _gather(out: Any, place: str, found: dict[str, Tensor], within: set[int]) -> None:
    if isinstance(out, Tensor):
        found[place or ONLY] = out
        return
    parts: list[tuple[str, Any]] = []
    if isinstance(out, Mapping):
        parts = [(str(key), value) for key, value in out.items()]
    elif dataclasses.is_dataclass(out) and not isinstance(out, type):
        parts = [(one.name, getattr(out, one.name)) for one in dataclasses.fields(out)]
    elif isinstance(out, tuple) and hasattr(out, "_fields"):
        parts = list(zip(out._fields, out, strict=True))
    elif isinstance(out, tuple | list):
        prefix = "" if place else f"{ONLY}_"
        parts = [(f"{prefix}{number}", value) for number, value in enumerate(out)]
        if len(parts) == 1 and not place:
            parts = [("", out[0])]
    if not parts or id(out) in within:  # one that holds itself has no end
        return
    for name, value in parts:
        _gather(value, f"{place}.{name}" if place and name else place or name, found, within | {id(out)})


def adapted(call: Call, model: nn.Module) -> nn.Module:
    """`model` itself, its class replaced by a subclass that takes `call.names` by position and returns a tensor, or a
    flat mapping of tensors as `named` makes it.
    """
    kind = type(model)
    forward = kind.forward
    by_position = _same_row(model, call)

    def called(self: nn.Module, *values: Any) -> Any:
        if by_position:
            out = forward(self, *values)
        else:
            row = values if call.order is None else [values[place] for place in call.order]
            args, kwargs = pytree.tree_unflatten(list(row), call.tree)
            out = forward(self, *args, **kwargs)
        if isinstance(out, Tensor) and call.outputs is None:
            return out
        found = named(out)
        wanted = call.outputs or call.keep or ()
        if self.training and (len(wanted) != len(found) if call.outputs else not found.keys() >= set(wanted)):
            raise OtherInTrainingError(
                f"In training mode {kind.__name__} returns {', '.join(found)}, in eval mode {', '.join(wanted)}.",
                'Train it by a loop of your own, which sees it as it is: train = "file.py:fit" (docs/training.md).',
            )
        if call.outputs is not None:
            found = dict(zip(call.outputs, found.values(), strict=True))
        return found if call.keep is None else {name: found[name] for name in call.keep}

    called.__signature__ = _signature(call.names)  # type: ignore[attr-defined]
    made = type(kind.__name__, (kind,), {"forward": called, "__module__": kind.__module__, ADAPTED: True})
    made.__qualname__ = kind.__qualname__
    model.__class__ = made
    return model


def _same_row(model: nn.Module, call: Call) -> bool:
    """Whether the module's own forward takes the tensors of `call`, each by itself, in this order."""
    if call.order is not None:
        return False
    args, kwargs = pytree.tree_unflatten(list(range(len(call.names))), call.tree)
    if any(not isinstance(value, int) for value in (*args, *kwargs.values())):
        return False
    parameters = list(inspect.signature(model.forward).parameters.values())
    kinds = inspect.Parameter
    taken = parameters[len(args) : len(call.names)]
    return [p.name for p in taken] == list(kwargs) and all(p.kind is kinds.POSITIONAL_OR_KEYWORD for p in taken)


def _signature(names: Sequence[str]) -> inspect.Signature:
    """`(self, first, second, ...)`: torch.export names the graph's inputs after it."""
    words = [name if name.isidentifier() else "".join(c if c.isalnum() else "_" for c in name) for name in names]
    kinds = inspect.Parameter
    return inspect.Signature(
        [kinds("self", kinds.POSITIONAL_OR_KEYWORD)]
        + [kinds(word or "input", kinds.POSITIONAL_OR_KEYWORD) for word in words]
    )
