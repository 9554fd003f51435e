"""Cut: fix every constant of the graph for the channels that are left, and make a smaller exported program of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from foundation.editor import Editor
from foundation.errors import RefusedError
from pipeline.channels.coupling.frozen import frozen_part
from pipeline.channels.coupling.groups import Analysis, Removed
from pipeline.channels.ledger import Ledger, Refusal
from pipeline.channels.operators.cut import Cut
from pipeline.channels.operators.strict import BUGS, strict
from pipeline.channels.operators.table import bind, find, kind_of
from pipeline.channels.operators.values import Flags, Value
from pipeline.channels.program.capture import Captured
from pipeline.channels.program.editing import finished
from pipeline.channels.program.execute import execute, feeds_of, run_program
from pipeline.channels.removal.fold import Folding
from pipeline.channels.removal.slice import kept_part, sliced_state, smaller
from pipeline.channels.removal.verify import Shifts, zero_check


@dataclass(frozen=True)
class Shrunk:
    """A physically smaller program, the ledger of what went, and what stayed although it was asked to go."""

    program: ExportedProgram
    ledger: Ledger
    refused: tuple[Refusal, ...]
    example: tuple[Any, ...]

    def __call__(self, *inputs: Any, dtype: torch.dtype | None = None) -> Any:
        """The outputs for `inputs`; one tensor where the graph has one output, else a tuple."""
        return run_program(self.program, inputs, None, dtype)


def shrink(
    captured: Captured,
    analysis: Analysis,
    removed: Removed,
    *,
    check_zero: bool = True,
    refused: tuple[Refusal, ...] = (),
) -> Shrunk:
    """`captured` without the groups flagged in `removed` (cluster name -> bool array, True = goes).

    `captured`: the analysed model, its state folded (see `Captured.fold`). A group that is zero where it is summed
    goes; a group that is one constant goes where a bias can take it (`ledger.folds`); any other stays, and is listed in
    `ledger.refusals`. The last of a dimension stays, too (`ledger.spared`). `refused`: refusals that were found before
    (see `liveness`), for the ledger. `check_zero=False` is for the control experiment only: it shows what the check is
    worth. Raises RefusedError where the graph cannot be edited.
    """
    if captured.program.graph is not analysis.captured.program.graph:
        raise ValueError("the analysis is of another capture")
    gone = analysis.gone(removed)
    going = _by_cluster(analysis, gone)
    spared = {
        name: tuple(np.setdiff1d(np.flatnonzero(flags), going.get(name, ())).tolist())
        for name, flags in removed.items()
    }
    shifts: Shifts = {}
    if check_zero:
        gone, more, shifts = zero_check(captured, analysis, gone, removed)
        refused = (*refused, *more)
    return _Removal(captured, analysis, gone).run(shifts, refused, {n: s for n, s in spared.items() if s})


def _by_cluster(analysis: Analysis, gone: Flags) -> dict[str, tuple[int, ...]]:
    """Cluster name -> the groups that are gone, where any is."""
    by_class = np.zeros(analysis.solution.reason_of.shape[0], np.bool_)
    by_class[analysis.solution.class_of[gone]] = True
    found = {name: np.flatnonzero(by_class[members]) for name, members in analysis.members.items()}
    return {name: tuple(groups.tolist()) for name, groups in found.items() if groups.size}


class _Removal:
    """One removal in progress: an edited copy of the captured program, and what the ledger says of it."""

    def __init__(self, captured: Captured, analysis: Analysis, gone: Flags) -> None:
        self.captured = captured
        self.analysis = analysis
        self.trace = analysis.trace
        self.gone = gone
        self.editor = Editor(captured.program)
        # The captured graph's node -> the node that gives its kept part; nodes that are not run any more are absent.
        self.new_of = dict(self.editor.copies)
        self.frozen: dict[str, str] = {}  # parameter that was put in -> the node whose value it holds
        self.cut = Cut(gone, self.trace.values, self.trace.notes, self.editor, self.new_of)

    def run(self, shifts: Shifts, refused: tuple[Refusal, ...], spared: Mapping[str, tuple[int, ...]]) -> Shrunk:
        """Do it."""
        self._drop_assertions()
        self._freeze()
        self._edit()
        folding = Folding(self.captured, self.analysis, self.cut, self.editor)
        for reader, shift in shifts.values():
            folding.fold(reader, shift)
        for node in self.editor.graph.nodes:
            self.editor.reshape(node)
        state, kept = sliced_state(self.captured, self.analysis, self.cut, folding.raised)
        added = [tensor for name, tensor in self.editor.state.items() if name not in state]
        self.editor.state.update(state)
        self._settle()
        program = finished(self.editor)
        names = set(program.graph_signature.parameters) | set(program.graph_signature.buffers)
        shapes = {n: tuple(v.shape) for n, v in self.captured.state.items()}
        ledger = Ledger(
            shapes=shapes,
            kept=kept,
            groups=_by_cluster(self.analysis, self.gone),
            rewrites=tuple(self.cut.rewrites),
            refusals=refused,
            spared=spared,
            folds=tuple(folding.folds),
            frozen=self.frozen,
            dropped=tuple(n for n in shapes if n not in names),
            rounded=bool(folding.folds) or any(t.dtype.is_floating_point for t in added),
        )
        return Shrunk(program, ledger, refused, self.captured.example)

    # -- what is not computed any more -----------------------------------------------------------------------------

    def _drop_assertions(self) -> None:
        """They hold for the old sizes."""
        for node in self.captured.program.graph.nodes:
            if kind_of(node) == "assertion":
                self.editor.erase(self.new_of.pop(node))

    def _freeze(self) -> None:
        """Put tensors in the place of what is computed without the input, where something of it goes."""
        graph = self.captured.program.graph
        frozen, edge = frozen_part(graph, self.trace, self.cut.touched)
        computed = self._frozen_values(edge)
        for node in graph.nodes:
            if node in computed:
                new = self.editor.parameter(f"{node.name}_frozen", computed[node])
                self.frozen[str(self.editor.target(new))] = node.name
            elif node not in frozen and (part := self._static(node)) is not None:
                new = self.editor.constant(f"{node.name}_kept", part)
            else:
                continue
            twin, self.new_of[node] = self.new_of[node], new
            self.editor.replace(twin, new)
            self.editor.erase(twin)
        for node in reversed(graph.nodes):
            if node in frozen and node not in computed:
                self.editor.erase(self.new_of.pop(node))

    def _static(self, node: fx.Node) -> Tensor | None:
        """The kept part of a constant computed from nothing, where a part of it goes."""
        value = self.trace.values.get(node)
        if node not in self.trace.static or not isinstance(value, Value) or not self.cut.touched(value):
            return None
        return kept_part(self.cut, self.trace.static[node], value)

    def _frozen_values(self, edge: list[fx.Node]) -> dict[fx.Node, Tensor]:
        """What the rest of the graph uses of the frozen part, computed on the folded weights at full size,
        then sliced.
        """
        if not edge:
            return {}
        needed: set[fx.Node] = set()
        stack = list(edge)
        while stack:
            node = stack.pop()
            if node not in needed:
                needed.add(node)
                stack += node.all_input_nodes
        found: dict[fx.Node, Tensor] = {}

        def watch(node: fx.Node, value: Any) -> None:
            if node in edge:
                found[node] = kept_part(self.cut, value, self.trace.values[node])

        feeds = feeds_of(self.captured.program, self.captured.example, self.captured.state)
        execute(self.captured.program.graph, feeds, watch=watch, only=needed)
        return found

    # -- what is computed on fewer channels ------------------------------------------------------------------------

    def _edit(self) -> None:
        """Every operator whose tensors lose something fixes its constants."""
        values = self.trace.values
        for node in self.captured.program.graph.nodes:
            if node not in values or node not in self.new_of or node in self.trace.static:
                continue
            if self.new_of[node].op == "placeholder":
                continue
            if kind_of(node) == "size":
                self._original_size(node)
                continue
            rule = find(node.target)
            if rule is None or rule.edit is None:
                continue
            if self.cut.touched(values.get(node)) or any(self.cut.touched(values.get(s)) for s in node.all_input_nodes):
                try:
                    rule.edit(self.cut, node)
                except BUGS as error:
                    if strict() or isinstance(error, RuntimeError):
                        raise
                    raise RefusedError(
                        f"{node.target} at '{node.name}' cannot be rewritten for fewer channels.",
                        "Exclude the channels around it, or report the model.",
                    ) from error

    def _original_size(self, node: fx.Node) -> None:
        """Sizes read at run time keep meaning the original ones; each use of a size is corrected where it is used."""
        source: Any = node.args[0]
        value = self.trace.values.get(source)
        if not isinstance(value, Value):
            return
        dim = bind(node)["dim"] % len(value.shape)
        before, kept = value.shape[dim], self.cut.count(value.atoms[dim], value.shape[dim])
        if kept == before:
            return
        new = self.new_of[node]
        with self.editor.after(new):
            whole = self.cut.size(new, before, kept)
        self.editor.replace(new, whole)
        self.new_of[node] = whole

    def _settle(self) -> None:
        """Fake values at the kept counts. What was rewritten is run on fake tensors, which checks its shapes; those of
        all else follow from their atoms.
        """
        known = {new: old for old, new in self.new_of.items() if self.trace.values.get(old) is not None}
        for node in self.editor.graph.nodes:
            if node.op != "call_function":
                continue
            old = known.get(node)
            if old is None or "val" not in node.meta:
                self.editor.outdate(node)
            else:
                self.editor.settle(node, smaller(self.editor, self.cut, node.meta["val"], self.trace.values[old]))
