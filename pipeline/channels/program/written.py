"""Writes through views made plain.

`y[:, ::2].mul_(2)` changes y, and every other view of y: who reads what is not in the graph's edges. Here each such
write becomes its out-of-place twin, its result is put back into what was viewed (slice_scatter, select_scatter, …), and
later readers read that. Nothing is left that a copy in the place of a view could change.

A write to a whole tensor without views (`relu_` behind a convolution) stays. So does a write into the model's own
state, which lasts beyond the call, and one through a view that no operator puts back (`as_strided`): the walk pins
those.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from foundation.editor import Editor, writes
from pipeline.channels.operators.put_back import out_of_place, put_back
from pipeline.channels.operators.table import find
from pipeline.channels.program.macs import concrete, example_batch

aten = torch.ops.aten


def without_writes_through_views(program: ExportedProgram) -> ExportedProgram:
    """`program` in its plain form; the program itself where it has no such write."""
    if not any(_is_write(n) for n in program.graph.nodes):
        return program
    editor = Editor(program)
    aliases = _Aliases(editor.graph, example_batch(program))
    inputs = set(program.graph_signature.user_inputs)
    roots = dict.fromkeys(aliases.root(n.args[0]) for n in editor.graph.nodes if _is_write(n))
    changed = False
    for root in roots:
        own = root.op != "placeholder" or root.name in inputs
        if own:
            changed |= _Family(editor, aliases, root).rewrite()
    if not changed:
        return program
    for node in editor.graph.nodes:
        editor.reshape(node)  # strides may be others than those that a view was made for
    return editor.finish()


def _is_write(node: fx.Node) -> bool:
    return node.op == "call_function" and writes(node) and bool(node.args) and isinstance(node.args[0], fx.Node)


class _Aliases:
    """Which node shares its memory with which operand, found by running the node alone on tensors without numbers."""

    def __init__(self, graph: fx.Graph, batch: int) -> None:
        self.place = {node: k for k, node in enumerate(graph.nodes)}
        self._batch = batch
        self._known: dict[fx.Node, fx.Node | None] = {}

    def source(self, node: fx.Node) -> fx.Node | None:
        """The operand whose memory the node looks at; None where it has memory of its own."""
        if node not in self._known:
            self._known[node] = self._find(node)
        return self._known[node]

    def root(self, node: Any) -> fx.Node:
        """The node whose memory it is in the end."""
        found: fx.Node = node
        while (source := self.source(found)) is not None:
            found = source
        return found

    def _find(self, node: fx.Node) -> fx.Node | None:
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            return None
        source = node.args[0]
        if node.target is operator.getitem:
            return source if isinstance(source.meta.get("val"), (tuple, list)) and self.source(source) else None
        if not isinstance(source.meta.get("val"), Tensor):
            return None
        if _is_write(node):
            return source
        schema = getattr(node.target, "_schema", None)
        card = find(node.target)
        may = schema is not None and any(r.alias_info is not None for r in schema.returns)
        if not may and (card is None or card.kind != "dropout"):  # dropout gives its operand itself in evaluation
            return None
        return source if self._shares(node, source) else None

    def _shares(self, node: fx.Node, source: fx.Node) -> bool:
        stand_ins: dict[fx.Node, Any] = {}

        def stand_in(n: fx.Node) -> Any:
            if n not in stand_ins:
                stand_ins[n] = self._without_numbers(n.meta["val"])
            return stand_ins[n]

        try:
            out = node.target(*fx.node.map_arg(node.args, stand_in), **fx.node.map_arg(node.kwargs, stand_in))  # type: ignore[operator]
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
            return True  # as its schema says
        first = out[0] if isinstance(out, (tuple, list)) else out
        return bool(first.untyped_storage()._cdata == stand_ins[source].untyped_storage()._cdata)

    def _without_numbers(self, val: Any) -> Any:
        if isinstance(val, Tensor):
            shape = [concrete(s, self._batch) for s in val.shape]
            stride = [concrete(s, self._batch) for s in val.stride()]
            return torch.empty_strided(shape, stride, dtype=val.dtype, device="meta")
        return concrete(val, self._batch) if isinstance(val, torch.SymInt) else val


class _Family:
    """A tensor, its views, and what is written through them, in the graph's order.

    `tensor_of`: member -> the member whose memory it is without a view between: a write's target for its result.
    `made`: such a member -> (how many writes there had been, the node that holds its elements as of then).
    """

    def __init__(self, editor: Editor, aliases: _Aliases, root: fx.Node) -> None:
        self.editor, self.aliases, self.root = editor, aliases, root
        self.tensor_of: dict[fx.Node, fx.Node] = {root: root}
        waiting = [root]
        while waiting:
            for user in waiting.pop().users:
                source = aliases.source(user)
                if user not in self.tensor_of and source in self.tensor_of:
                    self.tensor_of[user] = self.tensor_of[source] if _is_write(user) else user
                    waiting.append(user)
        self.held = [n for n in self.tensor_of if _is_write(n)]
        self.read_until = {n: max((aliases.place[u] for u in n.users), default=-1) for n in self.tensor_of}
        self.writes = 0
        self.made: dict[fx.Node, tuple[int, fx.Node]] = {root: (0, root)}

    def rewrite(self) -> bool:
        """Whether its writes were made plain: where one goes through a view, or changes a view that is read later."""
        place = self.aliases.place
        views = [n for n, tensor in self.tensor_of.items() if tensor is n and n is not self.root]
        through = any(self.tensor_of[w] is not self.root for w in self.held)
        if not through and not any(place[v] < place[w] < self.read_until[v] for v in views for w in self.held):
            return False
        if not all(out_of_place(w.target) is not None and self._can_put_back(w) for w in self.held):
            return False
        written = set(self.held)
        events = {*self.tensor_of, *(user for n in self.tensor_of for user in n.users)} - {self.root}
        for node in sorted(events, key=place.__getitem__):
            above = self._above(self.tensor_of[node]) if node in written else []
            with self.editor.before(node):
                olds = [self._now(n) for n in above]
                node.args = fx.node.map_arg(node.args, self._now)
                node.kwargs = fx.node.map_arg(node.kwargs, self._now)
            if node in written:
                self._write(node, list(zip(above, olds, strict=True)))
            elif node in self.tensor_of:
                self.made[node] = self.writes, node
        return True

    def _can_put_back(self, write: fx.Node) -> bool:
        node = self.tensor_of[write]
        while node is not self.root:
            if node.target is not operator.getitem and put_back(node) is None:
                return False
            node = self._viewed(node)
        return True

    def _viewed(self, view: fx.Node) -> fx.Node:
        source = self.aliases.source(view)
        assert source is not None
        return self.tensor_of[source]

    def _above(self, node: fx.Node) -> list[fx.Node]:
        """What `node` is a view of, what that is a view of, and so on up to the root; one tensor each."""
        found: list[fx.Node] = []
        while node is not self.root:
            node = self._viewed(node)
            if isinstance(node.meta["val"], Tensor):
                found.append(node)
        return found

    def _now(self, node: fx.Node) -> fx.Node:
        """The node that holds a member's elements after all writes so far, made at the insertion point if need be."""
        if node not in self.tensor_of:
            return node
        node = self.tensor_of[node]
        when, holder = self.made[node]
        if when < self.writes and node is not self.root:  # what is read later of the root is kept up to date
            fresh, before = self._now(self._viewed(node)), node.args[0]
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: fresh if n is before else n)
            target: Any = node.target
            holder = self.editor.call(target, *args, **kwargs)
            self.made[node] = self.writes, holder
        return holder

    def _write(self, node: fx.Node, above: list[tuple[fx.Node, fx.Node]]) -> None:
        """Make a write its twin, and put the result back into what its target is a view of, where that is read later.

        `above`: (what is above the target, the node that held its elements before).
        """
        target = self.tensor_of[node]
        dtype = node.meta["val"].dtype
        node.target = out_of_place(node.target)
        self.editor.outdate(node)
        holder = node
        with self.editor.after(node):
            if self.editor.value(node).dtype != dtype:  # in place the target's own type is kept
                holder = self.editor.call(aten.to.dtype, node, dtype)
            self.writes += 1
            self.made[target] = self.writes, holder
            others = [n for n, tensor in self.tensor_of.items() if tensor is not target]
            if not any(self.read_until[n] > self.aliases.place[node] for n in others):
                return
            view = target
            for tensor, old in above:
                part: Any = view.args[1] if view.target is operator.getitem else None
                give = put_back(view if part is None else self._viewed(view))
                assert give is not None
                holder = give(self.editor.call, view if part is None else self._viewed(view), part, old, holder)
                self.made[tensor] = self.writes, holder
                view = tensor
