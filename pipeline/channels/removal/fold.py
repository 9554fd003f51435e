"""Fold: what channels that are one constant each gave to their readers goes into the readers' biases."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from foundation.editor import Editor
from pipeline.channels.coupling.groups import Analysis
from pipeline.channels.dead.constants import Reader, Shift
from pipeline.channels.ledger import Fold
from pipeline.channels.operators.cut import Cut
from pipeline.channels.operators.table import base_name, bind, find
from pipeline.channels.program.capture import Captured

aten = torch.ops.aten


class Folding:
    """The folds of one removal: `folds`, for the ledger, and `raised`, parameter -> what is added to its kept part."""

    def __init__(self, captured: Captured, analysis: Analysis, cut: Cut, editor: Editor) -> None:
        self.captured, self.analysis, self.cut, self.editor = captured, analysis, cut, editor
        self.raised: dict[str, Tensor] = {}
        self.folds: list[Fold] = []

    def fold(self, reader: Reader, shift: Shift) -> None:
        """Give `reader` what the constant channels before it gave: in its bias, in one made for it, or in a sum."""
        node, card = reader.node, find(reader.node.target)
        out = self.analysis.trace.value(node)
        weighted = None if card is None else card.weighted
        dim = (weighted.output_dim if weighted else -2 if shift.rows else -1) % len(out.shape)
        keep = self.cut.keep(out.atoms[dim])
        amount = shift.amount if keep is None else shift.amount[torch.from_numpy(np.flatnonzero(keep))]
        if not bool((amount != 0).any()):
            return
        dtype = node.meta["val"].dtype
        takes_bias = "bias" in bind(node)
        bias = bind(node)["bias"] if takes_bias else None
        own = self._own_parameter(bias, node)
        if own is not None:
            self.raised[own] = amount
            parameter = own
        else:
            if takes_bias and bias is None:
                added = self.editor.parameter(f"{node.name}_bias", amount.to(dtype))
                self.cut.set(node, bias=added)
            else:
                wide = amount.to(dtype).reshape(-1, *[1] * (len(out.shape) - 1 - dim))
                added = self.editor.parameter(f"{node.name}_shift", wide)
                self.cut.replace(node, lambda new: self.cut.call(aten.add.Tensor, new, added), "plus folded constants")
            parameter = str(self.editor.target(added))
        self.folds.append(
            Fold(
                parameter=parameter,
                op=base_name(node.target),
                node=node.name,
                created=own is None,
                amounts=tuple(amount.tolist()),
                constants=self._constants(reader, shift),
            )
        )

    def _own_parameter(self, bias: Any, node: fx.Node) -> str | None:
        """The name of a bias parameter that `node` alone uses, under one name."""
        if not isinstance(bias, fx.Node) or bias.op != "placeholder" or set(bias.users) != {node}:
            return None
        signature = self.captured.program.graph_signature
        name = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.get(bias.name)
        if name is None:
            return None
        pointer = self.captured.program.state_dict[name].data_ptr()
        same = [n for n, v in self.captured.program.state_dict.items() if v.data_ptr() == pointer and v.numel()]
        return name if len(same) == 1 and len(self.captured.state[name].shape) == 1 else None

    def _constants(self, reader: Reader, shift: Shift) -> dict[str, dict[int, float]]:
        """Cluster -> {group: its constant}, of what went at this reader."""
        atoms = self.analysis.trace.value(reader.source).atoms[reader.dim]
        assert atoms is not None
        of_class = {
            int(c): float(v)
            for c, v in zip(self.analysis.solution.class_of[atoms], shift.constants, strict=True)
            if v != 0
        }
        found = {
            name: {g: of_class[c] for g, c in enumerate(classes.tolist()) if c in of_class}
            for name, classes in self.analysis.members.items()
        }
        return {name: groups for name, groups in found.items() if groups}
