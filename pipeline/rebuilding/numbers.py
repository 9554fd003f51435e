"""Which of a module's own numbers (head counts, widths, split sizes) a `forward` puts into which call.

A copy of the model runs once with every whole number that a module keeps replaced by one that remembers where it comes
from, also through arithmetic. Whoever then knows which argument of which call has to change (a removal's ledger) knows
which attribute that is, whatever it is called.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pipeline.rebuilding.structure import Place, Setting

Values = Mapping[Place, int]

LEAST = 2
"""Numbers below it are no widths: nothing can be taken from one channel."""


class Number(int):
    """A whole number that knows which attributes it was computed from, and how."""

    values: Values
    """What it was computed from."""
    compute: Callable[[Values], int]

    @staticmethod
    def at(place: Place, value: int) -> Number:
        """The number that stands at `place`."""
        return Number._made(value, {place: value}, lambda values: values[place])

    @property
    def places(self) -> Set[Place]:
        """The attributes that it was computed from."""
        return self.values.keys()

    @staticmethod
    def _made(value: int, values: Values, compute: Callable[[Values], int]) -> Number:
        made = Number(value)
        made.values, made.compute = values, compute
        return made

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)


def _arithmetic(name: str) -> Callable[[Number, Any], Any]:
    plain: Callable[[Any, Any], Any] = getattr(operator, name)

    def method(self: Number, other: Any, swapped: bool = False) -> Any:
        if not isinstance(other, int) or isinstance(other, bool):
            return NotImplemented
        left, right = (other, self) if swapped else (self, other)
        values = {**self.values, **(other.values if isinstance(other, Number) else {})}

        def compute(values: Values) -> int:
            a, b = (one.compute(values) if isinstance(one, Number) else one for one in (left, right))
            return int(plain(a, b))

        return Number._made(int(plain(int(left), int(right))), values, compute)

    return method


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    _method = _arithmetic(_name)
    setattr(Number, f"__{_name}__", _method)
    setattr(Number, f"__r{_name}__", lambda self, other, method=_method: method(self, other, True))


@dataclass(frozen=True)
class Use:
    """One number in a call: the module whose `forward` was running, the function, where among its arguments."""

    module: str
    function: str
    position: tuple[int | str | None, ...]
    number: Number


def uses(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Use, ...]:
    """Every number of a module's own that a call in `model(*inputs)` is given; `model` itself stays as it is.

    Raises whatever the model raises.
    """
    tagged = copy.deepcopy(model).eval()
    for name, module in tagged.named_modules():
        for attribute, value in list(vars(module).items()):
            if attribute.startswith("_") and not isinstance(value, int):
                continue
            vars(module)[attribute] = _tagged((name, attribute), value)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # as in the capture, whose calls these are compared with
    try:
        with torch.no_grad(), running_in(tagged) as running, _Watching(running) as watching:
            tagged(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return tuple(watching.found)


@contextmanager
def running_in(model: nn.Module) -> Iterator[list[str]]:
    """Names of the modules whose `forward` is running, the innermost last; one that fails is not taken off."""
    running: list[str] = []

    def ended(*_: object) -> None:
        running.pop()

    handles = [
        handle
        for name, module in model.named_modules()
        for handle in (
            module.register_forward_pre_hook(lambda _m, _i, name=name: running.append(name)),
            module.register_forward_hook(ended),
        )
    ]
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


def _tagged(place: Place, value: Any, depth: int = 0) -> Any:
    """`value` with its whole numbers replaced by such that know their place; modules and tensors as they are."""
    if type(value) is int:
        return Number.at(place, value) if value >= LEAST else value
    if type(value) in (tuple, list):
        return type(value)(_tagged((*place, at), one, depth) for at, one in enumerate(value))
    if isinstance(value, (nn.Module, torch.Tensor, type)) or callable(value) or depth:
        return value
    if type(value) is dict:
        return {key: _tagged((*place, key), one, 1) if isinstance(key, str) else one for key, one in value.items()}
    if hasattr(value, "__dict__") and any(type(one) is int for one in vars(value).values()):  # a config
        twin = copy.copy(value)
        for key, one in list(vars(value).items()):
            vars(twin)[key] = _tagged((*place, key), one, 1)
        return twin
    return value


class _Watching(TorchFunctionMode):
    """Notes the numbers in the arguments of every call, and hands on plain ones."""

    def __init__(self, running: list[str]) -> None:
        super().__init__()
        self.running = running
        self.found: list[Use] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves, tree = pytree.tree_flatten_with_path((args, kwargs))
        for path, leaf in leaves:
            for inner, number in _numbers(leaf):
                position = (*(getattr(key, "idx", getattr(key, "key", None)) for key in path), *inner)
                self.found.append(Use(self.running[-1] if self.running else "", func.__name__, position, number))
        plain, kwargs = pytree.tree_unflatten([_plain(leaf) for _, leaf in leaves], tree)
        return func(*plain, **kwargs)


def _numbers(leaf: Any) -> Iterator[tuple[tuple[str, ...], Number]]:
    if isinstance(leaf, Number):
        yield (), leaf
    elif isinstance(leaf, slice):
        for name in ("start", "stop", "step"):
            if isinstance(getattr(leaf, name), Number):
                yield (name,), getattr(leaf, name)
    elif isinstance(leaf, torch.Size):
        for at, one in enumerate(leaf):
            if isinstance(one, Number):
                yield (str(at),), one


def _plain(leaf: Any) -> Any:
    if isinstance(leaf, Number):
        return int(leaf)
    if isinstance(leaf, slice):
        return slice(*(int(one) if isinstance(one, Number) else one for one in (leaf.start, leaf.stop, leaf.step)))
    if isinstance(leaf, torch.Size):
        return torch.Size(int(one) for one in leaf)
    return leaf


def put(model: nn.Module, values: Mapping[Place, Setting]) -> None:
    """Set the attributes at `values` in place. What several modules share (a config) is copied for each before."""
    own: set[tuple[str | int, ...]] = set()
    for (name, attribute, *rest), value in values.items():
        module = model.get_submodule(str(name))
        if rest and (name, attribute) not in own:
            vars(module)[str(attribute)] = copy.copy(vars(module)[str(attribute)])
            own.add((name, attribute))
        vars(module)[str(attribute)] = _with(vars(module).get(str(attribute)), rest, value)


def _with(held: Any, rest: list[str | int], value: Any) -> Any:
    """`held` with `value` at the place `rest` within it."""
    if not rest:
        return value
    first, *further = rest
    if isinstance(held, (tuple, list)):
        return type(held)(_with(one, further, value) if at == first else one for at, one in enumerate(held))
    if isinstance(held, dict):
        held[first] = _with(held[first], further, value)
    else:
        vars(held)[str(first)] = _with(vars(held)[str(first)], further, value)
    return held


def module_of(node: torch.fx.Node) -> str:
    """Name of the innermost module whose `forward` made a node of an exported graph; "" for the model's own."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()), ("", None))[0] if stack else ""
    return re.sub(r"@\d+", "", str(path))
