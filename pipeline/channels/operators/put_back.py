"""A view's new elements put back into what it is a view of: the out-of-place twin of a write through the view."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from pipeline.channels.operators.table import base_name, bind, find

aten = torch.ops.aten

Call = Callable[..., fx.Node]
"""Makes an operator of a target and its arguments."""

PutBack = Callable[[Call, fx.Node, int | None, fx.Node, fx.Node], fx.Node]
"""For (call, view, part, old, new): `old`, what `view` looks at, with `new` in the place of the view's elements.

`part`: which of its tensors is meant, where the view gives several.
"""


def _in_slice(call: Call, view: fx.Node, part: int | None, old: fx.Node, new: fx.Node) -> fx.Node:
    a = bind(view)
    if "length" in a:
        return call(aten.slice_scatter.default, old, new, a["dim"], a["start"], a["start"] + a["length"])
    return call(aten.slice_scatter.default, old, new, a["dim"], a["start"], a["end"], a["step"])


def _in_index(call: Call, view: fx.Node, part: int | None, old: fx.Node, new: fx.Node) -> fx.Node:
    a = bind(view)
    return call(aten.select_scatter.default, old, new, a["dim"], a["index"] if part is None else part)


def _in_part(call: Call, view: fx.Node, part: int | None, old: fx.Node, new: fx.Node) -> fx.Node:
    dim = bind(view)["dim"]
    sizes = [v.shape[dim] for v in view.meta["val"]]
    assert part is not None
    bounds = np.cumsum([0, *sizes]).tolist()
    return call(aten.slice_scatter.default, old, new, dim, bounds[part], bounds[part + 1])


def _same_order(call: Call, view: fx.Node, part: int | None, old: fx.Node, new: fx.Node) -> fx.Node:
    return call(aten.reshape_as.default, new, old)


def _permuted(call: Call, view: fx.Node, part: int | None, old: fx.Node, new: fx.Node) -> fx.Node:
    card = find(view.target)
    assert card is not None and card.order is not None
    order = card.order(view, view.meta["val"].dim())
    return call(aten.permute.default, new, np.argsort(order).tolist())


def _itself(call: Call, view: fx.Node, part: int | None, old: fx.Node, new: fx.Node) -> fx.Node:
    return new


def _as_pairs(call: Call, view: fx.Node, part: int | None, old: fx.Node, new: fx.Node) -> fx.Node:
    return call(aten.view_as_real.default, new)


def _as_complex(call: Call, view: fx.Node, part: int | None, old: fx.Node, new: fx.Node) -> fx.Node:
    return call(aten.view_as_complex.default, new)


def _on_diagonal(call: Call, view: fx.Node, part: int | None, old: fx.Node, new: fx.Node) -> fx.Node:
    a = bind(view)
    return call(aten.diagonal_scatter.default, old, new, a["offset"], a["dim1"], a["dim2"])


_BY_NAME: dict[str, PutBack] = {
    "slice": _in_slice,
    "narrow": _in_slice,
    "select": _in_index,
    "unbind": _in_index,
    "split": _in_part,
    "split_with_sizes": _in_part,
    "chunk": _in_part,
    "tensor_split": _in_part,
    "diagonal": _on_diagonal,
    "squeeze": _same_order,
    "unsqueeze": _same_order,
    "view_as_complex": _as_pairs,
    "view_as_real": _as_complex,
}
_BY_KIND: dict[str, PutBack] = {
    "view": _same_order,
    "permutation": _permuted,
    "same": _itself,
    "dropout": _itself,
    "cast": _itself,
}


def put_back(view: fx.Node) -> PutBack | None:
    """How what is written to `view` comes into its operand; None where no operator does it (`as_strided`, `unfold`)."""
    card = find(view.target)
    name = base_name(view.target)
    if name == "view" and not isinstance(view.args[1], (list, tuple)):
        return None  # the bits as another type
    if _BY_NAME.get(name) is _in_part and not all(isinstance(v.shape[bind(view)["dim"]], int) for v in _parts(view)):
        return None  # parts of a size known only at run time
    return _BY_NAME.get(name) or (_BY_KIND.get(card.kind) if card is not None else None)


def _parts(view: fx.Node) -> tuple[Any, ...]:
    return tuple(view.meta["val"])


def out_of_place(target: Any) -> Any:
    """The operator that gives what `target` writes into its first operand; None where there is none.

    aten.mul_.Tensor -> aten.mul.Tensor.
    """
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.inplace_view in target.tags:
        return None
    declared = target._schema.arguments
    written = [k for k, a in enumerate(declared) if a.alias_info is not None and a.alias_info.is_write]
    if target.namespace != "aten" or written != [0]:
        return None
    name = base_name(target)
    if name.startswith("__i"):
        name = f"__{name[3:]}"
    twin = getattr(getattr(aten, name, None), target._overloadname, None)
    if twin is None or twin._schema.is_mutable:
        return None
    return twin if [a.name for a in twin._schema.arguments] == [a.name for a in declared] else None
