"""Values that need no tensor: constants and sizes, as Python numbers, so that the batch stays a symbol in a capture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.models.onnx_reading.node import Node

Objects = np.ndarray[Any, np.dtype[np.object_]]
Size = int | torch.SymInt
Number = int | float | bool | torch.SymInt | torch.SymFloat


@dataclass(frozen=True)
class Known:
    """A tensor of type `dtype` as an array of Python numbers, symbols among them."""

    array: Objects
    dtype: torch.dtype

    @property
    def constant(self) -> bool:
        """Whether no symbol is among the numbers."""
        return not any(isinstance(one, torch.SymInt | torch.SymFloat | torch.SymBool) for one in self.array.flat)


Value = Tensor | Known
Given = Value | None
"""An input that a node may leave out."""


def known(values: Sequence[Any] | Any, dtype: torch.dtype = torch.int64) -> Known:
    """A `Known` of one number, or of a flat sequence of numbers."""
    if not isinstance(values, list | tuple):
        array: Objects = np.empty((), dtype=object)
        array[()] = values
    else:
        array = np.empty(len(values), dtype=object)
        for at, value in enumerate(values):
            array[at] = value
    return Known(array, dtype)


def known_tensor(tensor: Tensor) -> Known:
    """The numbers of a tensor."""
    flat = known(tensor.flatten().tolist(), tensor.dtype)
    return Known(flat.array.reshape(tuple(tensor.shape)), tensor.dtype)


def applied(form: Callable[..., Any], *arrays: Objects) -> Objects:
    """`form` on every element, broadcast."""
    return np.asarray(np.frompyfunc(form, len(arrays), 1)(*arrays), dtype=object)


def tensor(value: Value) -> Tensor:
    """`value` as a tensor."""
    if isinstance(value, Tensor):
        return value
    if value.constant:
        return torch.tensor(value.array.ravel().tolist(), dtype=value.dtype).reshape(value.array.shape)
    parts = [torch.scalar_tensor(one, dtype=value.dtype) for one in value.array.flat]  # type: ignore[arg-type]
    return torch.stack(parts).reshape(value.array.shape)


def operand(value: Value, rank: int) -> Any:
    """`value` as what an elementwise operator takes beside a tensor of `rank` dimensions: a number where it is one."""
    if isinstance(value, Known) and value.array.size == 1 and value.array.ndim <= rank:
        return value.array.reshape(-1)[0]
    return tensor(value)


def rank(value: Value) -> int:
    """How many dimensions `value` has."""
    return value.ndim if isinstance(value, Tensor) else value.array.ndim


def shape(value: Value) -> tuple[Size, ...]:
    """The sizes of `value`."""
    return tuple(value.shape) if isinstance(value, Tensor) else value.array.shape


def numbers(node: Node, value: Given, what: str) -> list[Any]:
    """The numbers of `value`, flat. Raises NotReadError where they depend on the data."""
    if isinstance(value, Known):
        return list(value.array.flat)
    if value is None:
        return []
    return node.refuse(f"its {what} depend on the data that goes in")


def sizes(node: Node, value: Given, what: str) -> list[Any]:
    """`numbers` as whole ones."""
    return [one if isinstance(one, torch.SymInt) else int(one) for one in numbers(node, value, what)]


def one_number(node: Node, value: Given, what: str) -> Any:
    """The only number of `value`; None where it is left out."""
    found = numbers(node, value, what)
    if value is not None and len(found) != 1:
        node.refuse(f"its {what} is not one number")
    return found[0] if found else None


def axes(node: Node, value: Given, count: int, attribute: str = "axes") -> list[int] | None:
    """Axes given by an attribute (older opsets) or an input, counted from the front; None where neither is given."""
    held = node.get(attribute)
    if held is None and value is None:
        return None
    return [axis(node, one, count) for one in (sizes(node, value, "axes") if held is None else held)]


def axis(node: Node, number: int, count: int) -> int:
    """An axis of a tensor of `count` dimensions counted from the front."""
    if not -count <= number < max(count, 1):
        node.refuse(f"it has no axis {number}")
    return number % count if count else 0
