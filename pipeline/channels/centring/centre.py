"""One operator per norm: a residual stream that lost channels under LayerNorm is stored centred.

A stream x of n channels lost r of them; k = n − r are left, and μ = Σx/n still counts the lost ones, all zero. Store
    z = T·x = [x − μ, √r·μ]   (k + 1 channels, linear in x),   x = U·z = z[:k] + z[k]/√r.
The r lost channels share the centred value −μ, so ‖z‖² = Σ(x − μ)² + r·μ² = n·var(x), and with m = k + 1
    LayerNorm(x) = (x − μ)/√(var + ε) = √(n/m) · RMSNorm(z; ε·n/m)[:k]
exactly. T is folded into the weights of all that writes to the stream (linear, convolution, embedding, parameter;
layer scales with them), U into the linear layers that read it raw; the norm's shift goes into the linear layers behind
it. Where a writer or a reader takes neither, T or U is put in as a few small operators, if the norms still gain by it.

`shrink` leaves every such norm as pad, layer_norm, slice (see its card), which is what is looked for here. It runs on
the shrunk program before export; the ledger, and training, go on with the plain one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from foundation.editor import Editor
from pipeline.channels.centring.streams import (
    GAIN,
    Layer,
    Norm,
    Site,
    Stream,
    find_norms,
    find_streams,
    held_tensors,
    layer_of,
    moved,
    reads_raw,
    reads_size,
    shape_of,
)
from pipeline.channels.operators.carry import keeps_constants
from pipeline.channels.operators.table import bind
from pipeline.channels.operators.views import written_sizes
from pipeline.channels.program.editing import finished
from pipeline.channels.program.execute import run_program

aten = torch.ops.aten

RMS_OPSET = 23
"""From this opset on ONNX has RMSNormalization; below it, the operator falls apart into seven small ones."""


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
    editor = Editor(program)
    norms = find_norms(editor.graph)
    if not norms:
        return Centred(program, 0, 0, 0, 0)
    held = held_tensors(program, editor.graph)
    chosen = [s for s in find_streams(norms, held) if s.gain > GAIN / 2]
    if not chosen:
        return Centred(program, 0, 0, 0, 0)
    centring = _Centring(editor, held)
    for stream in chosen:
        centring.rewrite(stream)
    return Centred(
        finished(editor),
        len(chosen),
        sum(len(s.norms) for s in chosen),
        sum(len(s.widen) for s in chosen),
        sum(len(s.narrow) for s in chosen),
    )


class _Centring:
    """The edit in progress. `held`: placeholder -> the floating tensor that it stands for, new ones included."""

    def __init__(self, editor: Editor, held: dict[fx.Node, Tensor]) -> None:
        self.editor, self.held = editor, held
        self.known: dict[Any, fx.Node] = {}  # what a new parameter was made from, and how -> its placeholder
        self.now: dict[fx.Node, fx.Node] = {}  # the end of a norm that was rewritten -> what stands there now

    def rewrite(self, s: Stream) -> None:
        """Centre one stream."""
        for node, scale in s.rows.items():
            self._rows(s, node, scale)
        for (node, argument), dim in s.tables.items():
            self._table(s, node, int(argument), dim)
        for node, branch in s.dissolved.items():
            self.editor.replace(node, branch)
        for node in s.columns:
            self._columns(s, node)
        for reader, member, dim in s.narrow:
            self._narrow(s, reader, s.dissolved.get(member, member), dim)
        for node, dim in s.members:
            if node not in s.dissolved:
                self._sizes(s, node, dim)
        for (node, dim), readers in s.widen.items():
            self._widen(s, node, dim, readers)
        for norm in s.norms:
            self._norm(s, norm)

    # T and U, in float64 so that folding adds no more rounding than storing does

    def _wide(self, s: Stream, tensor: Tensor, dim: int) -> Tensor:
        """T along `dim`."""
        x = tensor.double()
        mean = x.sum(dim, keepdim=True) / s.full
        return torch.cat([x - mean, mean * math.sqrt(s.full - s.kept)], dim).to(tensor.dtype)

    def _rows(self, s: Stream, node: fx.Node, scale: fx.Node | None) -> None:
        """T, behind the layer scale, along what the layer writes: its weight's outputs and its bias."""
        layer = self._layer(node)
        factor = None if scale is None else self.held[scale].double().flatten()

        def rows(tensor: Tensor, dim: int) -> Tensor:
            x = tensor.double() if factor is None else tensor.double() * _along(factor, dim, tensor.dim())
            return self._wide(s, x, dim).to(tensor.dtype)

        out = layer.facts.weight_out
        self._set(node, layer.facts.weight, layer.weight, ("rows", s, scale, out), lambda w: rows(w, out))
        if layer.facts.bias is not None and layer.bias is not None:
            self._set(node, layer.facts.bias, layer.bias, ("rows", s, scale, 0), lambda b: rows(b, 0))

    def _table(self, s: Stream, node: fx.Node, argument: int, dim: int) -> None:
        source: Any = node.args[argument]
        new = self._parameter(source, ("table", s, dim), lambda w: self._wide(s, w, dim))
        node.update_arg(argument, new)
        self.editor.outdate(node)

    def _columns(self, s: Stream, node: fx.Node) -> None:
        """W·U: the last column reads what the others lack of the mean."""
        root = math.sqrt(s.full - s.kept)
        layer = self._layer(node)
        dim = layer.facts.weight_in

        def columns(w: Tensor) -> Tensor:
            return torch.cat([w.double(), w.double().sum(dim, keepdim=True) / root], dim).to(w.dtype)

        self._set(node, layer.facts.weight, layer.weight, ("columns", s, dim), columns)

    def _narrow(self, s: Stream, reader: fx.Node, member: fx.Node, dim: int) -> None:
        with self.editor.before(reader):
            most = self.editor.call(aten.slice.Tensor, member, dim, 0, s.kept)
            last = self.editor.call(aten.slice.Tensor, member, dim, s.kept, s.kept + 1)
            mean = self.editor.call(aten.mul.Tensor, last, 1 / math.sqrt(s.full - s.kept))
            x = self.editor.call(aten.add.Tensor, most, mean)
        self.editor.replace(member, x, [reader])

    def _widen(self, s: Stream, node: fx.Node, dim: int, readers: list[fx.Node]) -> None:
        """T as operators, behind a writer whose weights cannot take it."""
        node = self.now.get(node, node)
        inside = {n for n, _ in s.members} | {n.pad for n in s.norms}
        users = [u for u in readers if u in inside]
        with self.editor.after(node):
            total = self.editor.call(aten.mean.dim, node, [dim], True)
            mean = self.editor.call(aten.mul.Tensor, total, s.kept / s.full)
            centred = self.editor.call(aten.sub.Tensor, node, mean)
            last = self.editor.call(aten.mul.Tensor, mean, math.sqrt(s.full - s.kept))
            z = self.editor.call(aten.cat.default, [centred, last], dim)
        self.editor.replace(node, z, users)

    def _sizes(self, s: Stream, node: fx.Node, dim: int) -> None:
        """The channels' size among a view's or an expansion's sizes."""
        self.editor.outdate(node)
        written = written_sizes(node) if node.op == "call_function" else None
        if written is None:
            return
        name, first = written
        sizes = list(bind(node)[name])
        if 0 <= dim - first < len(sizes) and sizes[dim - first] != -1:
            sizes[dim - first] = s.kept + 1
            self.editor.set_arguments(node, **{name: sizes})

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
        with self.editor.before(norm.cut):
            y = self.editor.call(aten.rms_norm.default, source, [m], weight, norm.eps * s.full / m)
            if behind is None:
                y = self.editor.call(aten.slice.Tensor, y, -1, 0, s.kept)
                if not known:
                    y = self.editor.call(aten.mul.Tensor, y, norm.gamma)
                if norm.beta is not None:
                    y = self.editor.call(aten.add.Tensor, y, norm.beta)
        self.editor.replace(norm.cut, y)
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
                    layer = self._layer(user)
                    if layer.facts.bias is None or (layer.bias is not None and layer.bias not in self.held):
                        return None
                    readers.append(user)
                    continue
                # What the linear layers' biases take is the norm's shift as it is.
                passes = bool(user.args) and user.args[0] is node and keeps_constants(user)
                to = moved(user, dim) if passes else None
                if to is not None:
                    between.append((user, to))
                    waiting.append((user, to))
                elif not reads_size(user, node, dim):
                    return None
        return (readers, between) if readers else None

    def _behind_norm(self, reader: fx.Node, beta: fx.Node | None) -> None:
        """A linear layer on the norm: one column of zeros, and its bias takes W·β."""
        layer = self._layer(reader)
        facts = layer.facts
        if beta is not None:
            assert facts.bias is not None
            shift, w = self.held[beta], self.held[layer.weight].double().movedim(facts.weight_in, 1)

            def bias(old: Tensor | None) -> Tensor:
                added = w[:, : len(shift)] @ shift.double()
                return (added if old is None else old.double() + added).to(shift.dtype)

            self._set(reader, facts.bias, layer.bias, ("beta", layer.weight, beta), bias)

        def padded(w: Tensor) -> Tensor:
            return torch.cat([w, torch.zeros_like(w.narrow(facts.weight_in, 0, 1))], facts.weight_in)

        self._set(reader, facts.weight, layer.weight, ("zero column", facts.weight_in, None), padded)

    def _layer(self, node: fx.Node) -> Layer:
        layer = layer_of(node, self.held)
        assert layer is not None
        return layer

    # -- the graph -------------------------------------------------------------------------------------------------

    def _set(self, node: fx.Node, name: str, old: fx.Node | None, key: Any, make: Callable[[Any], Tensor]) -> None:
        """Give `node` the new parameter `make(old's value)` as its argument `name`."""
        self.editor.set_arguments(node, **{name: self._parameter(old, key, make)})

    def _parameter(self, old: fx.Node | None, key: Any, make: Callable[[Any], Tensor]) -> fx.Node:
        """A placeholder for `make(old's value)`, one for all that ask for the same."""
        whole = (old, *(id(k) if isinstance(k, Stream) else k for k in key))
        if whole not in self.known:
            tensor = make(None if old is None else self.held[old]).contiguous()
            node = self.known[whole] = self.editor.parameter(f"centred_{len(self.known)}", tensor)
            self.held[node] = tensor
        return self.known[whole]


def _along(factors: Tensor, dim: int, rank: int) -> Tensor:
    """One factor per index of dimension `dim` of a tensor of that rank."""
    return factors.view([-1 if d == dim else 1 for d in range(rank)])
