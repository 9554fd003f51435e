"""Where elements are moved and none is changed, what depends on an input moves along."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from pipeline.channels.operators.masks import Masks, number
from pipeline.channels.operators.table import tensors


def depends_moved(m: Masks, node: fx.Node, value: Any) -> Any:
    """The operator itself on the masks of its operands: what is not zero in the result depends."""
    replace: dict[fx.Node, Tensor] = {}
    for source in tensors(node):
        if m.values[source].dtype.is_floating_point:
            replace[source] = number(m.mask(source))
        else:  # an index: it has to be known
            m.ask(source)
    out = m.run(node, replace)
    return tuple(v != 0 for v in out) if isinstance(value, (tuple, list)) else out != 0
