"""Operators that pick elements by number, or put them in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.onnx_reading.node import Node
from pipeline.models.onnx_reading.shaping import checked
from pipeline.models.onnx_reading.values import Known, Value, axis, numbers, one_number, rank, tensor


def _gather(node: Node, x: Value, picked: Value) -> Value:
    at = axis(node, node.get("axis", 0), rank(x))
    if isinstance(x, Known) and isinstance(picked, Known) and picked.constant:
        return Known(np.asarray(np.take(x.array, picked.array.astype(np.int64), at), dtype=object), x.dtype)
    x = tensor(x)
    if isinstance(picked, Known) and picked.constant:
        rows = [int(one) for one in picked.array.flat]
        if not picked.array.ndim:
            return x.select(at, rows[0])
        if picked.array.ndim == 1 and rows and rows[0] >= 0 and rows == list(range(rows[0], rows[0] + len(rows))):
            return x.narrow(at, rows[0], len(rows))
        if any(one < 0 for one in rows):
            upward = [one + int(x.shape[at]) if one < 0 else one for one in rows]
            picked = Known(np.asarray(upward, dtype=object).reshape(picked.array.shape), picked.dtype)
    index = tensor(picked).to(torch.int64)
    if index.ndim == 1:
        return x.index_select(at, index)
    index = torch.where(index < 0, index + x.shape[at], index) if node.get("from_the_end", 0) else index
    flat = x.index_select(at, index.flatten())
    return flat.reshape([*x.shape[:at], *index.shape, *x.shape[at + 1 :]])


def _gather_elements(node: Node, x: Value, picked: Value) -> Tensor:
    given, at, index = tensor(x), node.get("axis", 0), tensor(picked).to(torch.int64)
    return torch.gather(given, at, torch.where(index < 0, index + given.shape[at], index))


def _gather_nd(node: Node, x: Value, picked: Value) -> Tensor:
    if node.get("batch_dims", 0):
        node.refuse("batch_dims is not read")
    return tensor(x)[tuple(tensor(picked).to(torch.int64).unbind(-1))]


def _scatter_elements(node: Node, x: Value, picked: Value, values: Value) -> Tensor:
    at, how = node.get("axis", 0), node.get("reduction", "none")
    index, given = tensor(picked).to(torch.int64), tensor(values)
    index = torch.where(index < 0, index + tensor(x).shape[at], index)
    if how == "none":
        return torch.scatter(tensor(x), at, index, given)
    if how == "add":
        return torch.scatter_add(tensor(x), at, index, given)
    name = {"mul": "prod", "max": "amax", "min": "amin"}[how]
    return torch.scatter_reduce(tensor(x), at, index, given, name)


def _scatter_nd(node: Node, x: Value, picked: Value, values: Value) -> Tensor:
    how = node.get("reduction", "none")
    if how not in ("none", "add"):
        node.refuse(f"its reduction {how} is not read")
    return torch.index_put(tensor(x), tensor(picked).to(torch.int64).unbind(-1), tensor(values), how == "add")


def _one_hot(node: Node, picked: Value, depth: Value, values: Value) -> Tensor:
    count = int(one_number(node, depth, "depth"))
    off, on = numbers(node, values, "values")
    rows = tensor(picked).to(torch.int64)
    checked(node, [*rows.shape, count])
    made = F.one_hot(torch.where(rows < 0, rows + count, rows), count).to(values.dtype)
    at = node.get("axis", -1)
    made = made.movedim(-1, at) if at != -1 else made
    return made if (off, on) == (0, 1) else made * (on - off) + off


TABLE: Mapping[str, Callable[..., Any]] = {
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "ScatterElements": _scatter_elements,
    "Scatter": _scatter_elements,
    "ScatterND": _scatter_nd,
    "OneHot": _one_hot,
}
