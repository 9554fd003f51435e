"""Slice: the kept part of every parameter, buffer and computed tensor, and the fake values of what is left."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foundation.editor import Editor
from foundation.files import memory_of
from pipeline.channels.coupling.groups import Analysis
from pipeline.channels.operators.cut import Cut
from pipeline.channels.operators.values import Value
from pipeline.channels.program.capture import Captured

Kept = dict[str, dict[int, tuple[int, ...]]]
"""Name -> dimension -> the original indices that stay, where some go."""


def kept_part(cut: Cut, tensor: Tensor, value: Value) -> Tensor:
    """What stays of a tensor at full size whose dimensions are those of `value`."""
    for dim, atoms in enumerate(value.atoms):
        keep = cut.keep(atoms)
        if keep is not None:
            tensor = tensor.index_select(dim, torch.from_numpy(np.flatnonzero(keep)))
    return tensor.contiguous()


def sliced_state(
    captured: Captured, analysis: Analysis, cut: Cut, raised: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Kept]:
    """(the kept part of the captured state by name, which indices that is).

    `raised`: parameter -> what is added to its kept part. Tied tensors stay tied: one is made for all their names.
    """
    # Of tied names a graph may know one alone, which need not be the first: what is told of one holds for all.
    keys = {name: memory_of(name, tensor) for name, tensor in captured.state.items()}
    parameters = {keys[name] for name in captured.program.graph_signature.parameters if name in keys}
    more = {keys[name]: amount for name, amount in raised.items()}
    kept: Kept = {}
    indices: dict[Hashable, dict[int, Tensor]] = {}
    for slot in analysis.slots:
        keep = cut.keep(slot.atoms)
        if keep is not None:
            stay = np.flatnonzero(keep)
            kept.setdefault(slot.name, {})[slot.dim] = tuple(stay.tolist())
            indices.setdefault(keys[slot.name], {})[slot.dim] = torch.from_numpy(stay)
    state: dict[str, Tensor] = {}
    cut_once: dict[Hashable, Tensor] = {}
    for name, tensor in captured.state.items():
        key = keys[name]
        if key not in cut_once:
            small = tensor.detach()
            for dim, places in indices.get(key, {}).items():
                small = small.index_select(dim, places)
            if key in more:
                small = (small.to(torch.float64) + more[key]).to(small.dtype)
            floating = small.dtype.is_floating_point
            cut_once[key] = torch.nn.Parameter(small, floating) if key in parameters else small
        state[name] = cut_once[key]
    return state, kept


def smaller(editor: Editor, cut: Cut, fake: Any, value: Any) -> Any:
    """A node's fake tensor(s) at the kept counts, which follow from its `value`: nothing is run for it."""
    if isinstance(fake, (tuple, list)):
        return type(fake)(smaller(editor, cut, f, v) for f, v in zip(fake, value, strict=True))
    if not isinstance(value, Value) or not cut.touched(value):
        return fake

    def size(now: Any, atoms: Any, before: int) -> Any:
        kept = cut.count(atoms, before)
        if kept == before:
            return now
        # Batch × channels: the symbol scales with the share that is kept.
        return kept if isinstance(now, int) else now * kept // before

    return editor.fake(fake, tuple(map(size, fake.shape, value.atoms, value.shape)))
