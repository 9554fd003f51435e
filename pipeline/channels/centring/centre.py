"""One operator per norm: a residual stream that lost channels under LayerNorm is stored centred.

A stream x of n channels lost r of them; k = n − r are left, and μ = Σx/n still counts the lost ones, all zero. Store
    z = T·x = [x − μ, √r·μ]   (k + 1 channels, linear in x),   x = U·z = z[:k] + z[k]/√r.
The r lost channels share the centred value −μ, so ‖z‖² = Σ(x − μ)² + r·μ² = n·var(x), and with m = k + 1
    LayerNorm(x) = (x − μ)/√(var + ε) = √(n/m) · RMSNorm(z; ε·n/m)[:k]
exactly. T is folded into the weights of all that writes to the stream (linear, convolution, embedding, parameter;
layer scales with them), U into the linear layers that read it raw; the norm's shift goes into the linear layers behind
it. Where a writer or a reader takes neither, T or U is put in as a few small operators, if the norms still gain by it.

`shrink` leaves every such norm as pad, layer_norm, slice (see `rules.norm`), which is what is looked for here. It runs
on the shrunk program before export; the ledger, and training, go on with the plain one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument

from pipeline.channels.centring.streams import (
    GAIN,
    Norm,
    Site,
    Stream,
    find_norms,
    find_streams,
    held_tensors,
    moved,
    reads_raw,
    shape_of,
)
from pipeline.channels.operators.table import base_name, bind, writes
from pipeline.channels.program.execute import run_program
from pipeline.channels.removal.rewrite import output_specs, run_fake

aten = torch.ops.aten


@dataclass(frozen=True)
class Centred:
    """The rewritten program, and what was done: streams, norms that became one operator, T and U put in."""

    program: ExportedProgram
    streams: int
    norms: int
    widened: int
    narrowed: int

    def __call__(self, *inputs: Any, dtype: torch.dtype | None = None) -> Any:
        """The outputs for `inputs`; one tensor where the graph has one output, else a tuple."""
        return run_program(self.program, inputs, None, dtype)


def centre(program: ExportedProgram) -> Centred:
    """`program` (of `shrink`) with every stream centred that gains by it; the same function up to rounding.

    The program itself is not changed. Without a norm over removed channels it is returned as it is.
    """
    graph = copy.deepcopy(program.graph)
    norms = find_norms(graph)
    if not norms:
        return Centred(program, 0, 0, 0, 0)
    held = held_tensors(program, graph)
    streams = find_streams(norms, held)
    chosen = [s for s in streams if s.gain > GAIN / 2]
    if not chosen:
        return Centred(program, 0, 0, 0, 0)
    editor = _Editor(program, graph, held)
    for stream in chosen:
        editor.rewrite(stream)
    return Centred(
        editor.finish(),
        len(chosen),
        sum(len(s.norms) for s in chosen),
        sum(len(s.widen) for s in chosen),
        sum(len(s.narrow) for s in chosen),
    )


class _Editor:
    """The graph copy in progress: new parameters, changed constants, and the nodes whose shapes follow."""

    def __init__(self, program: ExportedProgram, graph: fx.Graph, held: dict[fx.Node, Tensor]) -> None:
        self.program, self.graph, self.held = program, graph, held
        self.added: list[tuple[fx.Node, str, Tensor]] = []
        self.known: dict[Any, fx.Node] = {}
        self.now: dict[fx.Node, fx.Node] = {}  # the end of a norm that was rewritten -> what stands there now
        self.dirty: set[fx.Node] = set()
        self.mode = next(
            n.meta["val"].fake_mode
            for n in graph.nodes
            if n.op == "placeholder" and hasattr(n.meta["val"], "fake_mode")
        )

    def rewrite(self, s: Stream) -> None:
        """Centre one stream."""
        for node, scale in s.rows.items():
            self._rows(s, node, scale)
        for (node, argument), dim in s.tables.items():
            self._table(s, node, int(argument), dim)
        for node, branch in s.dissolved.items():
            node.replace_all_uses_with(branch)
        for node in s.columns:
            self._columns(s, node)
        for reader, member, dim in s.narrow:
            self._narrow(s, reader, s.dissolved.get(member, member), dim)
        for node, dim in s.members:
            if node not in s.dissolved:
                self._sizes(s, node, dim)
        for node, dim in s.widen:
            self._widen(s, node, dim)
        for norm in s.norms:
            self._norm(s, norm)

    # T and U, in float64 so that folding adds no more rounding than storing does

    def _wide(self, s: Stream, tensor: Tensor, dim: int) -> Tensor:
        """T along `dim`."""
        x = tensor.double()
        mean = x.sum(dim, keepdim=True) / s.full
        return torch.cat([x - mean, mean * math.sqrt(s.full - s.kept)], dim).to(tensor.dtype)

    def _rows(self, s: Stream, node: fx.Node, scale: fx.Node | None) -> None:
        a = bind(node)
        factor = None if scale is None else self.held[scale].double().flatten()

        def rows(tensor: Tensor) -> Tensor:
            x = tensor.double() if factor is None else tensor.double() * factor.view(-1, *[1] * (tensor.dim() - 1))
            return self._wide(s, x, 0).to(tensor.dtype)

        if base_name(node.target) == "embedding":
            self._set(node, "weight", a["weight"], ("rows", s, None), lambda w: self._wide(s, w, 1))
            return
        for name in ("weight", "bias"):
            if a[name] is not None:
                self._set(node, name, a[name], ("rows", s, scale), rows)
        self.dirty.add(node)

    def _table(self, s: Stream, node: fx.Node, argument: int, dim: int) -> None:
        source: Any = node.args[argument]
        new = self._parameter(source, ("table", s, dim), lambda w: self._wide(s, w, dim))
        node.update_arg(argument, new)
        self.dirty.add(node)

    def _columns(self, s: Stream, node: fx.Node) -> None:
        """W·U: the last column reads what the others lack of the mean."""
        root = math.sqrt(s.full - s.kept)

        def columns(w: Tensor) -> Tensor:
            return torch.cat([w.double(), w.double().sum(1, keepdim=True) / root], 1).to(w.dtype)

        self._set(node, "weight", bind(node)["weight"], ("columns", s, None), columns)

    def _narrow(self, s: Stream, reader: fx.Node, member: fx.Node, dim: int) -> None:
        with self.graph.inserting_before(reader):
            most = self._call(aten.slice.Tensor, member, dim, 0, s.kept)
            last = self._call(aten.slice.Tensor, member, dim, s.kept, s.kept + 1)
            mean = self._call(aten.mul.Tensor, last, 1 / math.sqrt(s.full - s.kept))
            x = self._call(aten.add.Tensor, most, mean)
        reader.replace_input_with(member, x)

    def _widen(self, s: Stream, node: fx.Node, dim: int) -> None:
        """T as operators, behind a writer whose weights cannot take it."""
        node = self.now.get(node, node)
        inside = {n for n, _ in s.members} | {n.pad for n in s.norms}
        users = [u for u in node.users if u in inside]
        with self.graph.inserting_before(node.next):
            total = self._call(aten.mean.dim, node, [dim], True)
            mean = self._call(aten.mul.Tensor, total, s.kept / s.full)
            centred = self._call(aten.sub.Tensor, node, mean)
            last = self._call(aten.mul.Tensor, mean, math.sqrt(s.full - s.kept))
            z = self._call(aten.cat.default, [centred, last], dim)
        for user in users:
            user.replace_input_with(node, z)

    def _sizes(self, s: Stream, node: fx.Node, dim: int) -> None:
        """The channels' size among a view's or an expansion's sizes."""
        self.dirty.add(node)
        name = base_name(node.target)
        if name in ("view", "reshape", "_unsafe_view", "expand"):
            sizes = list(node.args[1])  # type: ignore[arg-type]
            if sizes[dim] != -1:
                sizes[dim] = s.kept + 1
            node.update_arg(1, sizes)
        elif name == "unflatten":
            a = bind(node)
            sizes = list(a["sizes"])
            at = dim - a["dim"] % len(shape_of(node.args[0]))  # type: ignore[arg-type]
            if 0 <= at < len(sizes) and sizes[at] != -1:
                sizes[at] = s.kept + 1
                node.update_arg(2, sizes)

    def _norm(self, s: Stream, norm: Norm) -> None:
        """RMSNorm over the centred stream; its shift and the extra channel go into the linear layers behind it."""
        source: Any = norm.pad.args[0]
        m = s.kept + 1
        factor = math.sqrt(s.full / m)
        known = norm.gamma is None or norm.gamma in self.held

        def scaled(gamma: Tensor | None) -> Tensor:
            plain = torch.ones(s.kept) if gamma is None or not known else gamma
            return torch.cat([plain.double() * factor, torch.zeros(1, dtype=torch.float64)]).to(plain.dtype)

        weight = self._parameter(norm.gamma if known else None, ("gamma", s, None), scaled)
        behind = self._linear_behind(norm) if known and (norm.beta is None or norm.beta in self.held) else None
        with self.graph.inserting_before(norm.cut):
            y = self._call(aten.rms_norm.default, source, [m], weight, norm.eps * s.full / m)
            if behind is None:
                y = self._call(aten.slice.Tensor, y, -1, 0, s.kept)
                if not known:
                    y = self._call(aten.mul.Tensor, y, norm.gamma)
                if norm.beta is not None:
                    y = self._call(aten.add.Tensor, y, norm.beta)
        norm.cut.replace_all_uses_with(y)
        self.now[norm.cut] = y
        if behind is not None:
            readers, between = behind
            for node, dim in between:
                self._sizes(s, node, dim)
            for reader in readers:
                self._behind_norm(reader, norm.beta)

    def _linear_behind(self, norm: Norm) -> tuple[list[fx.Node], list[Site]] | None:
        """The linear layers that alone read the norm, and what lies between (windows, transposes); else None."""
        readers: list[fx.Node] = []
        between: list[Site] = []
        waiting: list[Site] = [(norm.cut, len(shape_of(norm.cut)) - 1)]
        while waiting:
            node, dim = waiting.pop()
            for user in node.users:
                if reads_raw(user, node, dim, self.held):
                    bias = bind(user)["bias"]
                    if bias is not None and bias not in self.held:
                        return None
                    readers.append(user)
                    continue
                to = None
                if (
                    user.op == "call_function"
                    and user.args
                    and user.args[0] is node
                    and base_name(user.target) != "sum"
                ):
                    to = moved(user, node, dim)
                if to is not None:
                    between.append((user, to))
                    waiting.append((user, to))
                elif (
                    not base_name(user.target).startswith("sym_size") or bind(user)["dim"] % len(shape_of(node)) == dim
                ):
                    return None
        return (readers, between) if readers else None

    def _behind_norm(self, reader: fx.Node, beta: fx.Node | None) -> None:
        """A linear layer on the norm: one column of zeros, and its bias takes W·β."""
        a = bind(reader)
        if beta is not None:
            shift, w = self.held[beta], self.held[a["weight"]].double()

            def bias(old: Tensor | None) -> Tensor:
                added = w[:, : len(shift)] @ shift.double()
                return (added if old is None else old.double() + added).to(shift.dtype)

            self._set(reader, "bias", a["bias"], ("beta", a["weight"], beta), bias)
        key = ("zero column", None, None)
        self._set(reader, "weight", a["weight"], key, lambda w: torch.cat([w, w.new_zeros(len(w), 1)], 1))

    # -- the graph -------------------------------------------------------------------------------------------------

    def _call(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        self.dirty.add(node)
        return node

    def _set(self, node: fx.Node, name: str, old: fx.Node | None, key: Any, make: Callable[[Any], Tensor]) -> None:
        """Give `node` the new parameter `make(old's value)` as its argument `name`."""
        new = self._parameter(old, key, make)
        names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
        at = names.index(name)
        if name in node.kwargs:
            node.update_kwarg(name, new)
        elif at < len(node.args):
            node.update_arg(at, new)
        else:
            node.args = (*node.args, *[None] * (at - len(node.args)), new)
        self.dirty.add(node)

    def _parameter(self, old: fx.Node | None, key: Any, make: Callable[[Any], Tensor]) -> fx.Node:
        """A placeholder for `make(old's value)`, one for all that ask for the same."""
        whole = (old, *(id(k) if isinstance(k, Stream) else k for k in key))
        if whole not in self.known:
            tensor = make(None if old is None else self.held[old]).contiguous()
            with self.graph.inserting_before(next(iter(self.graph.nodes))):
                node = self.graph.placeholder(f"p_centred_{len(self.added)}")
            target = f"leanort_centred_{len(self.added)}"
            with self.mode:
                node.meta["val"] = torch.empty(tensor.shape, dtype=tensor.dtype)
            self.added.append((node, target, tensor))
            self.held[node] = tensor
            self.known[whole] = node
        return self.known[whole]

    def finish(self) -> ExportedProgram:
        """Remove what nothing uses any more, bring the shapes up to date, and make a program of it."""
        program: Any = self.program
        signature = program.graph_signature
        inputs = set(signature.user_inputs)
        for node in reversed(list(self.graph.nodes)):
            if not node.users and node.op != "output" and not writes(node) and node.name not in inputs:
                self.graph.erase_node(node)
        for node in self.graph.nodes:
            if node.op == "call_function" and (node in self.dirty or self.dirty.intersection(node.all_input_nodes)):
                before = shape_of(node) if isinstance(node.meta.get("val"), Tensor) else None
                node.meta["val"] = run_fake(self.mode, node)
                same = isinstance(node.meta["val"], Tensor) and before == shape_of(node)
                self.dirty.discard(node) if same else self.dirty.add(node)
        specs = {s.arg.name: s for s in signature.input_specs}
        for node, target, _ in self.added:
            specs[node.name] = InputSpec(InputKind.PARAMETER, TensorArgument(name=node.name), target)
        ordered = [specs[n.name] for n in self.graph.nodes if n.op == "placeholder"]
        used = {s.target for s in ordered if s.target is not None}
        state: dict[str, Any] = {
            target: torch.nn.Parameter(tensor) for _, target, tensor in self.added if target in used
        }
        state |= {n: v for n, v in program.state_dict.items() if n in used}
        return ExportedProgram(
            root=torch.nn.Module(),
            graph=self.graph,
            graph_signature=ExportGraphSignature(ordered, output_specs(signature, self.graph)),
            state_dict=state,
            range_constraints=copy.copy(program.range_constraints),
            module_call_graph=[program.module_call_graph[0]],
            example_inputs=program.example_inputs,
            constants={n: v for n, v in program.constants.items() if n in used},
            verifiers=program.verifiers,
        )
