"""Whole branches that add nothing: one side of an addition is zero whatever the input is, the other goes on alone.

A residual block whose last layer is zero computes x + 0. The addition goes, and with it everything that only led to its
zero side: that saves what no width could, since one channel of every layer would have to stay.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, fx

from foundation.editor import Editor, argument, asserts, writes
from pipeline.channels.coupling.analyse import analyse
from pipeline.channels.coupling.groups import Analysis
from pipeline.channels.coupling.walk import walk
from pipeline.channels.dead.liveness import zero_slices
from pipeline.channels.ledger import Branch
from pipeline.channels.operators.trace import Policy, Trace
from pipeline.channels.operators.values import Value
from pipeline.channels.program.capture import Captured
from pipeline.channels.program.editing import finished

aten = torch.ops.aten
ADDITIONS = (aten.add.Tensor, aten.add_.Tensor)


def without_zero_branches(captured: Captured, policy: Policy) -> tuple[Captured, tuple[Branch, ...]]:
    """A captured program with folded weights without the additions of which one side is zero; and these.

    The captured program itself where there is none. Raises RefusedError where the graph cannot be edited.
    """
    if not any(_all_zero(captured.state[name]) for name in captured.program.graph_signature.parameters):
        return captured, ()  # a branch ends in a layer or a norm that is zero as a whole
    plain = out_of_place(captured)
    found = zero_sides(analyse(plain, policy))
    if not found:
        return captured, ()
    editor = Editor(plain.program)
    branches = []
    for addition, (kept, zero) in found.items():
        before = set(_held(editor))
        while kept in found:  # the side that goes on was itself such an addition
            kept = found[kept][0]
        twin, stays = editor.copies[addition], editor.copies[kept]
        if any(writes(user) for user in twin.users) and len(stays.users) > 1:
            with editor.after(stays):  # what is written to is read elsewhere, too
                stays = editor.call(aten.clone.default, stays)
        editor.replace(twin, stays)
        editor.erase(twin)
        _drop_unread(editor)
        gone = tuple(sorted(before - set(_held(editor))))
        branches.append(Branch(addition.name, kept.name, zero.name, gone))
    program = finished(editor)
    names = set(program.graph_signature.parameters) | set(program.graph_signature.buffers)
    left = {name: value for name, value in captured.state.items() if name in names}
    return replace(captured, program=program, state=left), tuple(branches)


def _all_zero(tensor: Tensor) -> bool:
    return tensor.numel() > 1 and not bool(tensor.any())


def out_of_place(captured: Captured) -> Captured:
    """`x += y` as `x + y` wherever nothing but the addition reads x: the walk tells what a value is at the end, and
    what x was before it was written to is asked for.
    """
    program = captured.program
    inputs = set(program.graph_signature.user_inputs)
    written = [
        node
        for node in program.graph.nodes
        if node.target == aten.add_.Tensor
        and not node.kwargs
        and isinstance(node.args[0], fx.Node)
        and set(node.args[0].users) == {node}
        and (node.args[0].op != "placeholder" or node.args[0].name in inputs)
    ]
    if not written:
        return captured
    editor = Editor(program)
    for node in written:
        twin = editor.copies[node]
        editor.retarget(twin, aten.add.Tensor, *twin.args)
    return replace(captured, program=finished(editor))


def zero_sides(analysis: Analysis) -> dict[fx.Node, tuple[fx.Node, fx.Node]]:
    """Addition -> (the side that goes on, the side that is zero for any input), as far as the captured weights tell.

    Only where what goes on is the sum itself: of its shape and its type, and not scaled on the way.
    """
    captured = analysis.captured
    none = np.zeros(analysis.solution.reason_of.shape[0], np.bool_)
    now, _ = walk(captured, analysis.policy, zero_slices(analysis, captured.state, none))
    found: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for node in analysis.captured.program.graph.nodes:
        if node.op != "call_function" or node.target not in ADDITIONS:
            continue
        left, right = argument(node, "self"), argument(node, "other")
        if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)) or left is right:
            continue
        if _zero(now, right) and _same(left, node):
            found[node] = left, right
        elif _zero(now, left) and _same(right, node) and argument(node, "alpha") == 1:
            found[node] = right, left
    return found


def _zero(now: Trace, node: fx.Node) -> bool:
    """Whether a value is zero in every place: one of its dimensions is zero in all its indices."""
    value = now.values.get(node)
    return isinstance(value, Value) and any(zeros is not None and bool(zeros.all()) for zeros in value.zeros)


def _same(one: fx.Node, other: fx.Node) -> bool:
    a, b = one.meta.get("val"), other.meta.get("val")
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype


def _held(editor: Editor) -> list[str]:
    """Names of the tensors that a placeholder stands for and something reads."""
    holders = (node for node in editor.graph.nodes if node.op == "placeholder" and node.users)
    return [name for node in holders if (name := editor.target(node)) is not None]


def _drop_unread(editor: Editor) -> None:
    """Erase what led to the zero side only: writes too, where nothing else reads what they write to."""
    for node in reversed(list(editor.graph.nodes)):
        if node.users or node.op in ("output", "placeholder") or asserts(node):
            continue
        target = node.args[0] if writes(node) and node.args else None
        if isinstance(target, fx.Node) and (target.op == "placeholder" or set(target.users) != {node}):
            continue
        editor.erase(node)
