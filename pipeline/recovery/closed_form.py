"""The closed form: both networks advance together, node by node, over all samples at once, and each weight that reads
something changed is fitted so that the pruned network gives what the dense one gave.

No labels, no gradients: about two forward passes and one system of normal equations per weight. After a trial of ours
this gives back more accuracy than an epoch of training with labels (docs/recovery.md); the idea is layer-wise
reconstruction (He et al. 2017, arXiv:1707.06168), here for every contraction of a graph and with both sides cut.
"""

from __future__ import annotations

import math
import mmap
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from foundation.editor import writes
from foundation.files import memory_of
from pipeline.channels.program.capture import Captured
from pipeline.channels.program.execute import last_uses
from pipeline.recovery import attention, recurrent, regression, tied
from pipeline.recovery.contractions import Contraction, contraction, weight_of
from pipeline.recovery.sampling import batches, rows_wanted, seed_of

aten = torch.ops.aten

WALKS = 3
"""Where a weight has several readers; else one is all there is to do."""
LARGEST_SPARSE = 1 << 31
"""Outputs times columns squared of a weight of which single ones are masked: multiply-accumulates in each step of the
conjugate gradients.
"""
LEAST = 10
"""Samples, at the least: some of them are held back."""
ON_DISK = 2 << 30
"""Bytes of activations of both networks together, beyond which further ones are kept in a file that is mapped."""

_ELEMENTWISE = (
    aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor, aten.mul.Tensor, aten.mul_.Tensor,
    aten.div.Tensor, aten.div_.Tensor,
)  # fmt: skip
"""Scales and positions that are learnt: no weights in the sense of a fit."""
LARGE = 1 << 16
"""Numbers in a tensor, from which on it is counted and may go to disk."""

_NORMS: dict[Any, int] = {
    aten.batch_norm.default: 1, aten.layer_norm.default: 2, aten.group_norm.default: 2, aten.instance_norm.default: 1,
}  # fmt: skip
"""Norms with a shift -> the position of their scale; the shift comes next."""
_CENTRING = (aten.batch_norm.default, aten.instance_norm.default)
"""Norms that take a wrong mean of a channel for what their own shift can mend."""


@dataclass(frozen=True)
class Fitted:
    """What became of one weight. `reason` says why it stayed as it was; errors as in `regression.Fit`."""

    name: str
    rows: int = 0
    columns: int = 0
    strength: float = 0.0
    error_before: float = 0.0
    error_after: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class ClosedForm:
    """`state`: every parameter by name, fitted where it could be, the originals under the masks untouched."""

    state: Mapping[str, Tensor]
    fitted: tuple[Fitted, ...]
    seconds: float
    on_disk: int = 0
    """Bytes of activations that went to disk."""


Tick = Callable[[int, str], None]


def recover(
    captured: Captured,
    masks: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    *,
    start: Mapping[str, Tensor] | None = None,
    counted: Tensor | None = None,
    seed: int = 0,
    on_disk: int = ON_DISK,
    folder: Path | None = None,
    tick: Tick = lambda done, note: None,
) -> ClosedForm:
    """Fit the kept weights under `masks` to what `captured` computes, which is the dense network.

    `masks`: parameter name -> bool tensor, True = kept. `inputs`: the model's inputs, all samples in dimension 0 of
    each. `start`: the weights that the pruned network has by now, where they are not the dense ones; the fit is pulled
    to them. `counted`: which places (samples, places) hold something; a matrix over places is fitted to no others.
    `tick(nodes done, name)` is called as it goes. Activations beyond `on_disk` bytes lie in files that have no
    name (in `folder`, by default where the system keeps temporary ones), so that nothing is left behind. Deterministic:
    the same inputs and seed give the same weights. A weight that reads activations which are not finite stays, and its
    `Fitted.reason` says so. Raises ValueError for fewer than `LEAST` samples, inputs of different lengths or that are
    not finite, a fixed batch larger than the samples, and a graph that cannot be run node by node.

    A weight that several operators read is fitted to all of them at once (`tied`): on what they read in one walk, for
    the next, up to `WALKS` of them, as long as the outputs of the samples held back come nearer.
    """
    began = time.perf_counter()
    _check(captured, inputs)
    # What counts is in `captured.state`; the program may hold older values of it.
    known, spilt = {**captured.state, **(start or {})}, 0
    best: _Walk | None = None
    settled: dict[Any, Fitted] = {}
    with torch.random.fork_rng(devices=[]):
        for _ in range(WALKS):
            walk = _Walk(captured, masks, known, inputs, seed, _Shelf(on_disk, folder), counted)
            walk.run(tick)
            spilt += walk.shelf.on_disk
            if best is not None and not walk.left < best.left:
                break
            walk.fitted.extend(settled.values())
            best, settled, known = walk, walk.settled, walk.state(walk.tied)
            if not walk.tied:
                break
    assert best is not None
    told = {one.name for one in best.fitted}
    best.fitted.extend(
        Fitted(one.name, reason=one.reason or "several operators read it, and fitted to all of them it comes no nearer")
        for one in settled.values()
        if one.name not in told
    )
    return ClosedForm(best.state(), tuple(best.fitted), time.perf_counter() - began, spilt)


def _check(captured: Captured, inputs: Sequence[Tensor]) -> None:
    """Raise ValueError where the samples cannot be used."""
    counts = {len(x) for x in inputs}
    if len(counts) != 1:
        raise ValueError(f"the inputs hold different numbers of samples: {sorted(counts)}")
    count = counts.pop()
    if count < LEAST:
        raise ValueError(f"{count} samples are too few to fit weights to; it takes {LEAST}")
    if not captured.dynamic_batch and count < len(captured.example[0]):
        raise ValueError(f"{count} samples do not fill the batch of {len(captured.example[0])} that the model fixes")
    for at, x in enumerate(inputs):
        if (x.is_floating_point() or x.is_complex()) and not bool(x.isfinite().all()):
            raise ValueError(f"input {at} holds values that are not finite")


@dataclass
class _Shelf:
    """Where activations lie: in memory, or in mapped files once there are too many bytes of them."""

    limit: int
    folder: Path | None = None
    held: int = 0
    on_disk: int = 0
    counted: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Tensor -> its bytes, and how many nodes have it for their value: what is written in place is that of several."""
    mapped: weakref.WeakValueDictionary[int, mmap.mmap] = field(default_factory=weakref.WeakValueDictionary)
    """Address of a tensor's memory -> the file behind it."""

    def put(self, value: Any, *, move: bool = True) -> Any:
        """`value` of one more node, moved into a file where it is a large tensor of its own and memory is full."""
        if not isinstance(value, Tensor) or value.numel() < LARGE:
            return value
        if id(value) in self.counted:
            size, nodes = self.counted[id(value)]
            self.counted[id(value)] = size, nodes + 1
            return value
        if value._is_view():
            return value
        size = value.numel() * value.element_size()
        if self.held + size <= self.limit or not move:
            self.held += size
            self.counted[id(value)] = size, 1
            return value
        self.on_disk += size
        with tempfile.TemporaryFile(dir=self.folder) as file:  # it has no name; the space is free when the value goes
            file.truncate(size)
            pages = mmap.mmap(file.fileno(), size)
        stored = torch.frombuffer(pages, dtype=value.dtype).view(value.shape).copy_(value)
        self.mapped[stored.untyped_storage().data_ptr()] = pages
        self.rest(stored)
        return stored

    def rest(self, value: Any) -> None:
        """Free the memory of a value that lies in a file, until it is read again."""
        pages = self.mapped.get(value.untyped_storage().data_ptr()) if isinstance(value, Tensor) else None
        if pages is not None and hasattr(mmap, "MADV_DONTNEED"):
            pages.madvise(mmap.MADV_DONTNEED)  # of a shared mapping: what was written is kept by the file

    def drop(self, value: Any) -> None:
        """Forget a value that nobody reads any more."""
        size, nodes = self.counted.get(id(value), (0, 0))
        if nodes > 1:
            self.counted[id(value)] = size, nodes - 1
        elif nodes:
            self.held -= size
            del self.counted[id(value)]


@dataclass
class _Tie:
    """A weight of several readers, as far as they have been met."""

    key: Any
    held: fx.Node
    uses: tuple[tied.Use, ...]
    order: Tensor
    """Where in the flat weight the numbers of its matrices (groups, outputs, columns) are."""
    moved: bool = False
    """Whether any reader reads something changed."""
    reason: str = ""
    met: int = 0
    rows: list[tuple[tied.Use, Tensor, Tensor, Tensor]] = field(default_factory=list)
    lookups: list[Tensor] = field(default_factory=list)
    """For each, how often (learnt, held back) each row was looked up: (2, rows of the weight)."""


@dataclass(frozen=True)
class _Side:
    """Queries or keys of scores, and the layer behind them, by chunk where a list.

    `x`: what the layer reads; `dense`: (matrices, tokens, positions) of the dense network; `places`: where in the flat
    output of the layer the numbers of the path's end are; `of`: the sample of each matrix. `kept`, `columns`: bool, of
    the weight.
    """

    path: attention.Path
    found: Contraction
    held: fx.Node
    bias: fx.Node | None
    x: list[Tensor]
    dense: list[Tensor]
    places: list[Tensor]
    heads: list[attention.Heads]
    label: list[Tensor]
    of: list[Tensor]
    kept: Tensor
    columns: Tensor

    def _given(self, weights: Mapping[fx.Node, Tensor], where: Sequence[Tensor]) -> list[Tensor]:
        matrix = self.found.to_matrix(weights[self.held])[0]
        bias = None if self.bias is None else weights[self.bias]
        return [
            (torch.nn.functional.linear(x, matrix, bias).flatten()[place] * self.path.factor)
            for x, place in zip(self.x, where, strict=True)
        ]

    def reached(self, weights: Mapping[fx.Node, Tensor]) -> list[Tensor]:
        """What they are with these weights: (matrices, tokens, positions)."""
        return [v.float() for v in self._given(weights, [layout.place for layout in self.heads])]

    def ends(self, weights: Mapping[fx.Node, Tensor]) -> list[Tensor]:
        """The same as the path ends in."""
        return self._given(weights, self.places)


class _Walk:
    """One pass over the graph with both networks' values of every chunk; where they are the same they are one.

    `settled` and `tied`: what becomes of the weights of several readers, for another walk. `left`: squares of what the
    outputs differ by, for the samples held back, over those of the dense ones.
    """

    def __init__(
        self,
        captured: Captured,
        masks: Mapping[str, Tensor],
        start: Mapping[str, Tensor],
        inputs: Sequence[Tensor],
        seed: int,
        shelf: _Shelf,
        counted: Tensor | None = None,
    ) -> None:
        self.captured, self.seed, self.start = captured, seed, start
        self.graph = captured.program.graph
        self.dies: dict[fx.Node, list[fx.Node]] = {}
        self.names = captured.targets
        held: dict[str, Any] = {**captured.program.constants, **captured.program.state_dict, **captured.state}
        self.dense = {node: held[target] for node, target in self.names.items()}
        self.parameters = set(captured.program.graph_signature.inputs_to_parameters)
        # Tied tensors lie under several names, and a mask may be given under any of them.
        self.memory = {name: memory_of(name, value) for name, value in captured.state.items()}
        known = {self.memory[name]: torch.as_tensor(mask) for name, mask in masks.items() if name in self.memory}
        self.masks = {
            node: known[self.memory[target]] for node, target in self.names.items() if self.memory.get(target) in known
        }
        self.readers: dict[Any, int] = {}
        placeholders: dict[Any, list[fx.Node]] = {}
        for node in self.graph.nodes:
            if node.name in self.names:
                placeholders.setdefault(self._key(node), []).append(node)
        for key, nodes in placeholders.items():
            self.readers[key] = len(tied.readers(nodes))
        self.result: dict[str, Tensor] = {}
        self.fitted: list[Fitted] = []
        self.shelf = shelf
        self.chunks = list(zip(*(batches(captured, x) for x in inputs), strict=True))
        self.samples = samples = sum(len(chunk[0]) for chunk in self.chunks)
        self.counted = None if counted is None else list(batches(captured, counted))
        # The samples held back lie anywhere in the data: it may be sorted by class.
        draw = torch.Generator().manual_seed(seed)
        self.held_back = torch.zeros(samples, dtype=torch.bool)
        self.held_back[torch.randperm(samples, generator=draw)[: samples // regression.HELD_BACK]] = True
        # Where a fit is judged by those as a whole, others choose the strength.
        learn = (~self.held_back).nonzero().flatten()
        self.choosing = torch.zeros_like(self.held_back)
        self.choosing[learn[torch.randperm(len(learn), generator=draw)[: len(learn) // regression.HELD_BACK]]] = True
        self.left = 0.0
        self.settled: dict[Any, Fitted] = {}
        self.tied: dict[str, Tensor] = {}
        self.uses: dict[fx.Node, tuple[_Tie, tied.Use]] = {}
        self.untied: dict[Any, str] = {}
        """Weights of several readers that cannot be fitted to all of them -> why."""
        found = (attention.scores(node) for node in self.graph.nodes) if self.masks else ()
        self.scores = {one.node: one for one in found if one and self._positions_gone(one) and self._unwritten(one)}
        for key, nodes in placeholders.items() if self.masks else ():
            weight = self.dense[nodes[0].name]
            if nodes[0].name not in self.parameters or weight.dim() < 2 or not weight.is_floating_point():
                continue
            uses, order, self.untied[key] = tied.uses(nodes, weight)
            tie = _Tie(key, nodes[0], uses, order)
            self.uses.update({use.node: (tie, use) for use in uses})

    def _key(self, node: fx.Node) -> Any:
        """The same for placeholders of tied tensors."""
        target = self.names[node.name]
        return self.memory.get(target, target)

    @torch.no_grad()
    def state(self, result: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Every parameter by each of its names, originals under the masks as they were; with all fits by default."""
        result = self.result if result is None else result
        made: dict[Any, Tensor] = {}
        for node in self.graph.nodes:
            name = self.names.get(node.name)
            if name is None or name not in result:
                continue
            value, mask = result[name], self.masks.get(node.name)
            made[self._key(node)] = value if mask is None else torch.where(mask, value, self.start[name])
        return {name: made.get(self.memory.get(name, name), value) for name, value in self.start.items()}

    def run(self, tick: Tick) -> None:
        """Compute, fit, forget, node by node. Raises ValueError where an operator does not take its operands."""
        pruned = {node: self.start.get(self.names[node], value) for node, value in self.dense.items()}
        for node, mask in self.masks.items():
            pruned[node] = torch.where(mask, pruned[node], torch.zeros((), dtype=pruned[node].dtype))
        pruned = {n: self.dense[n] if _same(v, self.dense[n]) else v for n, v in pruned.items()}
        values: dict[fx.Node, list[list[Any]]] = {}  # node -> [dense values, pruned values], each by chunk
        self.dies = last_uses(self.graph)
        self._outlive()
        inputs = iter(range(len(self.chunks[0])))
        fixed: dict[fx.Node, list[Any]] = {}  # parameters, buffers, constants: [dense, pruned]
        with torch.no_grad():
            for number, node in enumerate(self.graph.nodes):
                if node.op == "output":
                    self._unread()
                    self.left = self._left(node, values)
                    break
                if node.op == "placeholder":
                    # A graph may write into its inputs and its state; ours are no one else's.
                    written = any(writes(user) for user in node.users)
                    if node.name in self.dense:
                        sides = [self.dense[node.name], pruned[node.name]]
                        if written:
                            sides = [v.clone() if isinstance(v, Tensor) else v for v in sides]
                        fixed[node] = sides
                    else:
                        at = next(inputs)
                        column = [chunk[at] for chunk in self.chunks]
                        if written:
                            column = [self.shelf.put(value.clone()) for value in column]
                        values[node] = [column, column]
                    continue
                if node.op != "call_function":
                    raise ValueError(f"the graph holds a {node.op} node ({node.name}), which has no values of its own")
                tick(number, node.name)
                self._node(node, values, fixed)
                for dead in self.dies.get(node, ()):
                    gone = values.pop(dead, [])
                    for column in gone if gone and gone[0] is not gone[1] else gone[:1]:
                        for value in column:
                            self.shelf.drop(value)

    def _node(self, node: fx.Node, values: dict[fx.Node, list[list[Any]]], fixed: dict[fx.Node, list[Any]]) -> None:
        sources = node.all_input_nodes
        if all(source in fixed for source in sources):  # of weights alone
            pair = [self._call(node, {s: fixed[s][side] for s in sources}) for side in (0, 1)]
            same = all(fixed[s][0] is fixed[s][1] for s in sources)
            fixed[node] = [pair[0], pair[0] if same else pair[1]]
            return
        moved = any(values[s][0] is not values[s][1] for s in sources if s in values)
        changed = moved or any(fixed[s][0] is not fixed[s][1] for s in sources if s in fixed)
        first = sources[0] if sources else None
        if changed and writes(node) and first in values and values[first][0] is values[first][1]:
            values[first] = [values[first][0], [self.shelf.put(v.clone()) for v in values[first][0]]]
        if changed and node.target in recurrent.GATES:  # needs what the dense layer reads, which is gone afterwards
            self._recurrent(node, values, fixed)
        if changed and node in self.scores:
            self._fit_scores(self.scores[node], values, fixed)
        dense = self._column(node, values, fixed, 0, whole=not changed and node not in self.uses)
        if node in self.uses:
            self._meet(node, values, fixed, dense, moved=moved)
        if not changed:
            values[node] = [dense, dense]
            return
        if moved or self._thinned(node, fixed):
            self._fit(node, values, fixed, dense)
        pruned = self._column(node, values, fixed, 1, whole=True)
        # A size is the same number in both, however they differ.
        values[node] = [dense, dense if all(isinstance(v, int) for v in dense) and dense == pruned else pruned]
        if node.target in _NORMS:
            self._shift(node, values, fixed)

    def _column(
        self,
        node: fx.Node,
        values: dict[fx.Node, list[list[Any]]],
        fixed: dict[fx.Node, list[Any]],
        side: int,
        *,
        whole: bool,
    ) -> list[Any]:
        """What `node` gives on one side. What is read for the last time goes chunk by chunk, so that large activations
        of two nodes are never there at once; what both sides share only where this is the last side (`whole`).
        """
        made = []
        dying = [
            values[dead][side]
            for dead in self.dies.get(node, ())
            if dead in values and (whole or values[dead][0] is not values[dead][1])
        ]
        target: Any = node.target
        if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()):
            torch.manual_seed(self.seed + seed_of(node.name))  # the same noise in both networks, and in every run
        for chunk in range(len(self.chunks)):
            args = {s: values[s][side][chunk] if s in values else fixed[s][side] for s in node.all_input_nodes}
            value = self._call(node, args)
            made.append(self.shelf.put(value, move=not writes(node)))  # other nodes have what is written in place
            for used in args.values():
                self.shelf.rest(used)
            for column in dying:
                self.shelf.drop(column[chunk])
                column[chunk] = None
        return made

    def _call(self, node: fx.Node, args: Mapping[fx.Node, Any]) -> Any:
        target: Any = node.target
        positional = fx.node.map_arg(node.args, args.__getitem__)
        try:
            return target(*positional, **fx.node.map_arg(node.kwargs, args.__getitem__))
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{node.name} cannot be run by itself: {str(error).splitlines()[0]}") from error

    def _unread(self) -> None:
        """Say of weights with a mask that nothing reads that there is nothing to fit them to."""
        for node in self.graph.nodes:
            masked = node.name in self.masks and not bool(self.masks[node.name].all())
            if masked and self.readers[self._key(node)] == 0 and self.dense[node.name].dim() > 1:
                self.fitted.append(Fitted(self.names[node.name], reason="no operator reads it"))

    def _left(self, output: fx.Node, values: dict[fx.Node, list[list[Any]]]) -> float:
        """Squares of what the outputs lack on the samples held back, over those of the dense ones; the mean of them."""
        shares = []
        for node in output.all_input_nodes:
            wrong = total = start = 0.0
            for dense, pruned, chunk in zip(*values.get(node, [[], []]), self.chunks, strict=False):
                held = (
                    self._held(int(start), len(chunk[0]), len(dense))
                    if isinstance(dense, Tensor) and dense.dim()
                    else None
                )
                start += len(chunk[0])
                if held is not None and dense.is_floating_point():
                    wrong += float((pruned[held].double() - dense[held].double()).square().sum())
                    total += float(dense[held].double().square().sum())
            shares.append(wrong / (total or 1.0))
        worst = sum(shares) / max(len(shares), 1)
        return worst if math.isfinite(worst) else math.inf

    # ── fitting ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _fit(
        self,
        node: fx.Node,
        values: dict[fx.Node, list[list[Any]]],
        fixed: dict[fx.Node, list[Any]],
        dense: list[Any],
    ) -> None:
        if node in self.uses or node.target in recurrent.GATES:
            return  # fitted together with the other readers of its weight, or layer by layer
        held = weight_of(node)
        if held is None or held not in fixed:
            for source in node.all_input_nodes if node.target not in _ELEMENTWISE else ():
                if source.name in self.parameters and fixed[source][0].dim() > 1:
                    reason = f"there is no rule for {node.target} ({node.name})"
                    self.fitted.append(Fitted(self.names[source.name], reason=reason))
            return
        name = self.names.get(held.name)
        if name is None or held.name not in self.parameters:
            what = "is computed from others" if name is None else "is no parameter"
            self.fitted.append(Fitted(name or held.name, reason=f"the weight of {node.name} {what}"))
            return
        found = contraction(node, fixed[held][0])
        if found is None or found.x not in values:
            self.fitted.append(
                Fitted(name, reason=f"there is no rule for {node.target} of such operands ({node.name})")
            )
            return
        reason = self._obstacle(node, found, values[found.x][1], dense, fixed[held][1])
        if reason:
            self.fitted.append(Fitted(name, reason=reason))
            return
        matrix = found.to_matrix(fixed[held][1])
        mask = self.masks.get(held.name, torch.ones_like(fixed[held][0], dtype=torch.bool))
        kept = found.to_matrix(mask)
        outputs, columns = kept.any(2), kept.any(1)
        by_channel = _channels(kept)
        if not by_channel and kept.numel() * kept.shape[2] > LARGEST_SPARSE:
            self.fitted.append(Fitted(name, reason="single weights are masked, of too many to fit each output alone"))
            return
        if not bool(kept.any()):
            self.fitted.append(Fitted(name, reason="nothing of it is kept"))
            return
        x, y, of = self._rows(node, found, values[found.x][1], dense, matrix)
        held_back = self.held_back[of]
        if not bool(held_back.any()) or bool(held_back.all()):
            self.fitted.append(Fitted(name, reason="too few of its rows can be held back"))
            return
        if not (regression.finite(x) and regression.finite(y)):
            self.fitted.append(Fitted(name, reason="it reads or gave values that are not finite"))
            return
        bias = found.bias
        own_bias = bias is not None and self._own_shift(bias, fixed, matrix.shape[0] * matrix.shape[1])
        intercept = own_bias or self._norm_follows(node, fixed)
        if by_channel:
            new, made = self._solve(x, y, matrix, outputs, columns, held_back, intercept)
        else:
            made = [regression.fit(x, y, matrix, held_back, intercept=intercept, kept=kept)]
            new, outputs = made[0].weight, torch.ones_like(outputs)
        value = found.from_matrix(new)
        self.result[name] = value
        fixed[held] = [fixed[held][0], torch.where(mask, value, torch.zeros_like(value))]
        if own_bias and bias is not None:
            whole = fixed[bias][1].clone()
            new_bias = torch.cat([fit.bias.flatten() for fit in made if fit.bias is not None])
            whole[outputs.flatten()] = new_bias.to(whole.dtype)
            if bias.name in self.masks:
                whole = torch.where(self.masks[bias.name], whole, torch.zeros_like(whole))
            self.result[self.names[bias.name]] = whole
            fixed[bias] = [fixed[bias][0], whole]
        self.fitted.append(_told(name, len(x), columns, made))

    def _thinned(self, node: fx.Node, fixed: dict[fx.Node, list[Any]]) -> bool:
        """Whether single weights of `node` are masked: then what is left of an output can make up for them."""
        held = weight_of(node)
        if held is None or held not in fixed or held.name not in self.masks:
            return False
        found = contraction(node, fixed[held][0])
        return found is not None and not _channels(found.to_matrix(self.masks[held.name]))

    def _obstacle(
        self, node: fx.Node, found: Contraction, inputs: list[Any], outputs: list[Any], weight: Tensor
    ) -> str:
        """Why the weight stays as it is; "" where nothing is in the way."""
        readers = self.readers[self._key(found.weight)]
        if readers > 1:
            return self.untied.get(self._key(found.weight)) or f"{readers} operators read it"
        return _not_real(inputs[0], outputs[0], weight) or _without_samples(node, inputs[0], weight)

    def _own_shift(self, shift: fx.Node, fixed: dict[fx.Node, list[Any]], size: int) -> bool:
        """Whether `shift` is a parameter of `size` numbers that nothing else reads."""
        if shift not in fixed or shift.name not in self.parameters:
            return False
        value = fixed[shift][0]
        return tuple(value.shape) == (size,) and value.is_floating_point() and self.readers[self._key(shift)] == 1

    def _shift_of(self, norm: fx.Node, fixed: dict[fx.Node, list[Any]]) -> fx.Node | None:
        """The shift of a norm where it can take what a channel's mean lacks."""
        at = _NORMS[norm.target] + 1
        shift = norm.args[at] if len(norm.args) > at else None
        if not isinstance(shift, fx.Node) or shift not in fixed:
            return None
        return shift if self._own_shift(shift, fixed, fixed[shift][0].numel()) else None

    def _norm_follows(self, node: fx.Node, fixed: dict[fx.Node, list[Any]]) -> bool:
        """Whether a norm whose shift mends a wrong mean is all that reads it."""
        users = list(node.users)
        return len(users) == 1 and users[0].target in _CENTRING and self._shift_of(users[0], fixed) is not None

    def _batch_axis(self, node: fx.Node, samples: int) -> int:
        """The dimension of the samples in what a matrix multiplies; 0 where none shows."""
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            for axis, size in enumerate(value.shape[:-1]):
                if size == samples if isinstance(size, int) else self.captured.of_batch(size):
                    return axis
        return 0

    def _rows(
        self,
        node: fx.Node,
        found: Contraction,
        inputs: list[Tensor],
        outputs: list[Tensor],
        matrix: Tensor,
        share: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (rows, groups, columns), targets (rows, groups, outputs), of which sample each row is.

        One in `share` of the rows that a weight is fitted on, of several readers that have to do with these together.
        """
        axis = self._batch_axis(found.x, -1 if self.captured.dynamic_batch else len(self.chunks[0][0]))
        if axis and found.matrix:
            inputs, outputs = ([v.movedim(axis, 0) for v in side] for side in (inputs, outputs))
        count = found.count(outputs[0])
        wanted = rows_wanted(matrix.shape[0], matrix.shape[2]) // share
        counted = self.counted if found.matrix and not axis else None
        if counted is not None and any(y.shape[:-1] != held.shape for y, held in zip(outputs, counted, strict=True)):
            counted = None
        elif counted is not None:  # enough of them when those that hold nothing are left out
            wanted = round(
                wanted * sum(held.numel() for held in counted) / max(1, sum(int(held.sum()) for held in counted))
            )
        each = min(count, -(-wanted // sum(len(x) for x in inputs)))
        draw = torch.Generator().manual_seed(self.seed + 1 + seed_of(node.name))
        xs, ys, of, start = [], [], [], 0
        for number, (x, y, chunk) in enumerate(zip(inputs, outputs, self.chunks, strict=True)):
            # The same places of every sample of a chunk, others in the next.
            places = torch.randperm(count, generator=draw)[:each]
            held = slice(None) if counted is None else counted[number][:, places].flatten()
            xs.append(found.rows(x, places).flatten(0, 1)[held].float())
            ys.append(found.targets(y, places).flatten(0, 1)[held].float())
            self.shelf.rest(x)
            self.shelf.rest(y)
            of.append(_samples(start, len(chunk[0]), len(x)).repeat_interleave(each)[held])
            start += len(chunk[0])
        return torch.cat(xs), torch.cat(ys), torch.cat(of)

    def _held(self, start: int, samples: int, entries: int) -> Tensor:
        """Which entries of a batch are held back."""
        return self.held_back[_samples(start, samples, entries)]

    # ── recurrent layers ─────────────────────────────────────────────────────────────────────────────────────────────

    def _recurrent(
        self, node: fx.Node, values: dict[fx.Node, list[list[Any]]], fixed: dict[fx.Node, list[Any]]
    ) -> None:
        """Fit a recurrent operator cell by cell: what one gives on both sides is what those of the next layer read."""
        args: Any = node.args
        source, given = args[0], args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
        layers = recurrent.layers(node)
        reason = ""
        if source not in values:
            reason = f"what {node.name} reads does not depend on the samples"
        elif args[5] and args[6]:
            reason = f"{node.name} drops some of what its layers give at random"
        reason = reason or next(
            (why for layer in layers for cell in layer for why in [self._not_free(node, cell, fixed)] if why), ""
        )
        reason = reason or _not_real(*(side[0] for side in values[source]))
        if reason:
            self.fitted += [
                Fitted(self.names.get(cell.nodes[at].name, cell.nodes[at].name), reason=reason)
                for layer in layers for cell in layer for at in cell.matrices
            ]  # fmt: skip
            return
        sides = [[x.transpose(0, 1) if args[8] else x for x in column] for column in values[source]]
        initial = [
            [[(values[s][side][at] if s in values else fixed[s][side]) for s in given] for at in range(len(sides[0]))]
            for side in (0, 1)
        ]
        for layer in layers:
            made = [self._cell(cell, sides, initial, fixed) for cell in layer]
            sides = [
                [torch.cat(parts, -1) for parts in zip(*(one[side] for one in made), strict=True)] for side in (0, 1)
            ]

    def _not_free(self, node: fx.Node, cell: recurrent.Cell, fixed: dict[fx.Node, list[Any]]) -> str:
        """Why a matrix of a recurrent cell cannot be fitted; "" where all can."""
        for at in cell.matrices:
            held = cell.nodes[at]
            name = self.names.get(held.name)
            if name is None or held.name not in self.parameters:
                return f"a weight of {node.name} {'is computed from others' if name is None else 'is no parameter'}"
            key = self._key(held)
            if self.readers[key] > 1:
                return self.untied.get(key) or f"{self.readers[key]} operators read it"
            mask = self.masks.get(held.name)
            if mask is not None and not _channels(mask.unsqueeze(0)) and mask.numel() * mask.shape[1] > LARGEST_SPARSE:
                return "single weights are masked, of too many to fit each output alone"
        return _not_real(*(fixed[cell.nodes[at]][0] for at in cell.matrices))

    def _cell(
        self,
        cell: recurrent.Cell,
        sides: list[list[Tensor]],
        initial: list[list[list[Tensor]]],
        fixed: dict[fx.Node, list[Any]],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Fit one layer in one direction; what it gives in both networks at every step, by chunk."""
        starts = [[[s[cell.number : cell.number + 1] for s in chunk] for chunk in side] for side in initial]
        weights = [tuple(fixed[held][side] for held in cell.nodes) for side in (0, 1)]
        dense, pruned = (recurrent.Side(*side) for side in zip(sides, starts, weights, strict=True))
        same_input = all(map(_same, dense.x, pruned.x)) and all(
            _same(a, b) for old, new in zip(*starts, strict=True) for a, b in zip(old, new, strict=True)
        )
        names = [self.names[cell.nodes[at].name] for at in cell.matrices]
        if same_input and all(map(_same, dense.weights, pruned.weights)):
            given = recurrent.states(cell, dense)
            return given, given
        kept = [
            self.masks.get(held.name, torch.ones_like(weight, dtype=torch.bool))
            for held, weight in zip(cell.nodes, dense.weights, strict=True)
        ]
        made, reason = None, ""
        if not all(bool(kept[at].any()) for at in cell.matrices):
            reason = "nothing of it is kept"
        else:
            drawn = self._sequences(names[0], dense.x, sum(kept[at].shape[1] for at in (0, 1)))
            if drawn is None:
                reason = "too few of its rows can be held back"
            else:
                free = [
                    at in cell.matrices or self._own_shift(held, fixed, dense.weights[0].shape[0])
                    for at, held in enumerate(cell.nodes)
                ]
                made = recurrent.fit(cell, dense, pruned, kept, free, drawn)
                reason = "" if made else "it reads or gave values that are not finite"
        if made is None:
            self.fitted += [Fitted(name, reason=reason) for name in names]
            return recurrent.states(cell, dense), recurrent.states(cell, pruned)
        for held, mask, value, old in zip(cell.nodes, kept, made.weights, pruned.weights, strict=True):
            if not torch.equal(value, old):
                self.result[self.names[held.name]] = value
                fixed[held] = [fixed[held][0], torch.where(mask, value, torch.zeros_like(value))]
        self.fitted += [
            Fitted(name, made.rows, made.columns, made.strength, made.error_before, made.error_after) for name in names
        ]
        return made.dense, made.pruned

    def _sequences(self, name: str, inputs: Sequence[Tensor], columns: int) -> recurrent.Drawn | None:
        """Steps to look at, and sequences to hold back; None where too few can be."""
        wanted = -(-rows_wanted(1, columns) // sum(x.shape[1] for x in inputs))
        draw = torch.Generator().manual_seed(self.seed + 1 + seed_of(name))
        steps, judges, chooses, start = [], [], [], 0
        for x, chunk in zip(inputs, self.chunks, strict=True):
            steps.append(torch.randperm(len(x), generator=draw)[: min(len(x), wanted)])
            of = _samples(start, len(chunk[0]), x.shape[1])
            judges.append(self.held_back[of])
            chooses.append(self.choosing[of])
            start += len(chunk[0])
        judging, choosing = torch.cat(judges), torch.cat(chooses)
        if not bool(judging.any()) or not bool(choosing.any()) or bool((judging | choosing).all()):
            return None
        return recurrent.Drawn(steps, chooses, judges)

    # ── queries and keys ─────────────────────────────────────────────────────────────────────────────────────────────

    def _positions_gone(self, one: attention.Scores) -> bool:
        """Whether rows of the layers behind queries and keys are masked."""
        held = [weight_of(path.start) for path in (one.queries, one.keys)]
        return all(node is not None and node.name in self.masks for node in held)

    def _unwritten(self, one: attention.Scores) -> bool:
        """Whether nothing is written in place until the scores are formed: what the layers read is read again then."""
        nodes = list(self.graph.nodes)
        first = min(nodes.index(path.start) for path in (one.queries, one.keys))
        return not any(writes(node) for node in nodes[first : nodes.index(one.node)])

    def _outlive(self) -> None:
        """Keep what the layers behind scores read until these are formed."""
        order = {node: at for at, node in enumerate(self.graph.nodes)}
        last = {node: user for user, nodes in self.dies.items() for node in nodes}
        for reader, one in self.scores.items():
            for node in one.queries.needed() | one.keys.needed():
                if order[last[node]] < order[reader]:
                    self.dies[last[node]].remove(node)
                    self.dies.setdefault(reader, []).append(node)
                    last[node] = reader

    def _fit_scores(
        self, one: attention.Scores, values: dict[fx.Node, list[list[Any]]], fixed: dict[fx.Node, list[Any]]
    ) -> None:
        """Fit queries and keys to the scores, in turns, where that brings the scores nearer than layer by layer."""
        sides = [self._side(one, path, values, fixed) for path in (one.queries, one.keys)]
        queries, keys = sides
        if queries is None or keys is None:
            return
        pairs = list(zip(queries.heads, keys.heads, strict=True))
        channels = [set(torch.cat([h.channel.flatten() for h in side.heads]).tolist()) for side in (queries, keys)]
        if any(a.channel.shape != b.channel.shape for a, b in pairs) or (
            queries.held is keys.held and channels[0] & channels[1]
        ):
            return
        kept = [queries.kept[a.channel] & keys.kept[b.channel] for a, b in pairs]
        judges = [self.held_back[of] for of in queries.of]
        learn = [~use for use in judges]
        if (
            all(bool((mask.all(1) | ~mask.any(1)).all()) for mask in kept)  # whole heads are gone at the most
            or not any(bool(use.any()) for use in judges)
            or not any(bool(use.any()) for use in learn)
            or not all(regression.finite(v) for side in (queries, keys) for v in (*side.dense, *side.x))
        ):
            return
        weights = {node: fixed[node][1] for side in (queries, keys) for node in (side.held, side.bias) if node}
        reached = [side.reached(weights) for side in (queries, keys)]
        if not all(regression.finite(v) for given in reached for v in given):
            return
        wanted = [queries.dense, keys.dense]
        before = best = attention.lack(wanted, reached, judges)
        rows, strength = 0, 0.0
        for _ in range(attention.TURNS):
            for at, side in enumerate((queries, keys)):
                other = 1 - at
                targets = attention.wanted(
                    wanted[at], wanted[other], reached[other], side.label, kept, learn, centred=at == 0
                )
                refit = self._refit_side(side, targets, weights)
                if refit is None:
                    continue
                changed, made, rows = refit
                given = side.reached(weights | changed)
                left = attention.lack(wanted, [given, reached[1]] if at == 0 else [reached[0], given], judges)
                if left < best:
                    best, reached[at], strength = left, given, max(strength, made)
                    weights |= changed
        names = {self.names[side.held.name]: side for side in (queries, keys)}
        told = {record.name for record in self.fitted}
        if best < before:
            self.fitted = [record for record in self.fitted if record.name not in names]
            for node, value in weights.items():
                self.result[self.names[node.name]] = value
                fixed[node] = [fixed[node][0], value]
            for side in (queries, keys):
                end = side.path.end
                for old in values[end][1] if values[end][1] is not values[end][0] else ():
                    self.shelf.drop(old)
                values[end] = [values[end][0], [self.shelf.put(v) for v in side.ends(weights)]]
        for name, side in names.items():
            if best < before or name not in told:
                self.fitted.append(Fitted(name, rows, int(side.columns.sum()), strength, before, best))

    def _side(
        self,
        one: attention.Scores,
        path: attention.Path,
        values: dict[fx.Node, list[list[Any]]],
        fixed: dict[fx.Node, list[Any]],
    ) -> _Side | None:
        """Queries or keys of scores; None where the layer behind them cannot be fitted to these alone."""
        held = weight_of(path.start)
        if held is None or held not in fixed or held.name not in self.parameters or path.start in self.uses:
            return None
        found = contraction(path.start, fixed[held][0])
        if found is None or not found.matrix or found.x not in values or self.readers[self._key(held)] > 1:
            return None
        bias, mask = found.bias, found.to_matrix(self.masks[held.name])
        outputs = mask.shape[1]
        if not _channels(mask) or (bias is not None and not self._own_shift(bias, fixed, outputs)):
            return None
        xs = values[found.x][1]
        if _not_real(xs[0], fixed[held][1]) or xs[0].dim() < 2 or values[path.end][0][0].dim() < 3:
            return None
        axis = self._batch_axis(found.x, -1 if self.captured.dynamic_batch else len(self.chunks[0][0]))
        keys = path is one.keys
        dense, places, heads, of, start = [], [], [], [], 0
        layouts: dict[
            torch.Size, tuple[Tensor, attention.Heads | None]
        ] = {}  # where numbers are depends on sizes alone
        for at, (x, chunk) in enumerate(zip(xs, self.chunks, strict=True)):
            end = values[path.end][0][at]
            repeats = values[one.queries.end][0][at].shape[-3] // end.shape[-3] if keys and one.shared else 1
            turned = keys and one.turned
            if x.shape not in layouts:
                place = self._place(path, (*x.shape[:-1], outputs), at, values, fixed)
                made = attention.heads(_as_matrices(place, turned=turned, repeats=repeats), outputs)
                layouts[x.shape] = place, made
            place, layout = layouts[x.shape]
            if layout is None:
                return None
            sizes = [1] * (x.dim() - 1)
            sizes[axis] = -1
            samples = _samples(start, len(chunk[0]), x.shape[axis]).reshape(sizes).expand(x.shape[:-1]).flatten()
            of.append(samples[layout.place[:, 0, 0] // outputs])
            places.append(place)
            heads.append(layout)
            dense.append(_as_matrices(end, turned=turned, repeats=repeats).flatten(0, -3).float())
            start += len(chunk[0])
        return _Side(path, found, held, bias, xs, dense, places, heads, attention.labels(heads), of,
                     mask[0].any(1), mask[0].any(0))  # fmt: skip

    def _place(
        self,
        path: attention.Path,
        shape: tuple[int, ...],
        at: int,
        values: dict[fx.Node, list[list[Any]]],
        fixed: dict[fx.Node, list[Any]],
    ) -> Tensor:
        """Where in the layer's flat output of this shape the numbers of the path's end are, for the chunk `at`."""
        made: dict[fx.Node, Any] = {path.start: torch.arange(math.prod(shape)).reshape(shape)}
        for node in path.nodes:
            source = node.all_input_nodes[0]
            known = {
                s: made[s] if s in made else values[s][1][at] if s in values else fixed[s][1]
                for s in node.all_input_nodes
            }
            made[node] = made[source] if attention.scales(node) else self._call(node, known)
        place: Tensor = made[path.end]
        return place

    def _refit_side(
        self, side: _Side, targets: list[Tensor], weights: Mapping[fx.Node, Tensor]
    ) -> tuple[dict[fx.Node, Tensor], float, int] | None:
        """Weight and bias fitted to give these queries or keys, the strength of it, and how many rows say so; None
        where they cannot be fitted.
        """
        ys = []
        for x, layout, target in zip(side.x, side.heads, targets, strict=True):
            y = x.new_zeros(math.prod(x.shape[:-1]) * len(side.kept))
            y[layout.place.flatten()] = (target / side.path.factor).flatten().to(y.dtype)
            ys.append(y.reshape(*x.shape[:-1], -1))
        outputs = torch.zeros_like(side.kept)
        outputs[torch.cat([layout.channel.flatten() for layout in side.heads])] = True
        outputs &= side.kept
        matrix = side.found.to_matrix(weights[side.held])
        x, y, of = self._rows(side.path.start, side.found, side.x, ys, matrix)
        learn = ~self.held_back[of]
        chooses = self.choosing[of][learn]
        if not (regression.finite(x) and regression.finite(y)) or not bool(chooses.any()) or bool(chooses.all()):
            return None
        made = regression.fit(
            x[learn][:, :, side.columns], y[learn][:, :, outputs], matrix[:, outputs][:, :, side.columns],
            chooses, intercept=side.bias is not None,
        )  # fmt: skip
        new = matrix.clone()
        new[0, outputs.nonzero(), side.columns.nonzero().flatten()] = made.weight[0].to(new.dtype)
        changed = {side.held: side.found.from_matrix(new)}
        if side.bias is not None and made.bias is not None:
            bias = weights[side.bias].clone()
            bias[outputs] = made.bias[0].to(bias.dtype)
            if side.bias.name in self.masks:
                bias = torch.where(self.masks[side.bias.name], bias, torch.zeros_like(bias))
            changed[side.bias] = bias
        return changed, made.strength, int(learn.sum())

    # ── weights of several readers ───────────────────────────────────────────────────────────────────────────────────

    def _meet(
        self,
        node: fx.Node,
        values: dict[fx.Node, list[list[Any]]],
        fixed: dict[fx.Node, list[Any]],
        dense: list[Any],
        *,
        moved: bool,
    ) -> None:
        """Take the rows of one reader; with those of the last one, fit the weight: for the next walk, or at once."""
        tie, use = self.uses[node]
        tie.met += 1
        tie.moved |= moved
        tie.reason = tie.reason or self._gather(tie, use, values, fixed, dense)
        if tie.met < len(tie.uses):
            return
        if tie.moved:
            name = self.names[tie.held.name]
            new: dict[fx.Node, Tensor] = {}
            made = Fitted(name, reason=tie.reason) if tie.reason else self._settle(tie, name, fixed, new)
            if len(tie.uses) > 1:
                self.settled[tie.key] = made
                self.tied.update({self.names[node.name]: value for node, value in new.items()})
            else:  # nobody has read the old one
                self.fitted.append(made)
                for changed, value in new.items():
                    self.result[self.names[changed.name]] = value
                    fixed[changed] = [fixed[changed][0], value]
                for turn in tied.turns(use.found.weight) if use.found else ():
                    fixed[turn] = [fixed[turn][0], self._call(turn, {n: fixed[n][1] for n in turn.all_input_nodes})]
        tie.rows, tie.lookups = [], []

    def _gather(
        self,
        tie: _Tie,
        use: tied.Use,
        values: dict[fx.Node, list[list[Any]]],
        fixed: dict[fx.Node, list[Any]],
        dense: list[Any],
    ) -> str:
        """Why the rows of one reader cannot be taken, "" where they are."""
        found = use.found
        source = use.node.args[1] if found is None else found.x
        if not isinstance(source, fx.Node) or source not in values:
            return f"what {use.node.name} reads does not depend on the samples"
        inputs = values[source][1]
        if found is None:
            counts, start = torch.zeros(2, len(fixed[tie.held][0]), dtype=torch.long), 0
            for tokens, chunk in zip(inputs, self.chunks, strict=True):
                held = self._held(start, len(chunk[0]), len(tokens))
                for row, places in enumerate((tokens[~held], tokens[held])):
                    counts[row] += torch.bincount(places.flatten(), minlength=counts.shape[1])
                start += len(chunk[0])
            tie.lookups.append(counts)
            return ""
        weight = fixed[found.weight][1]
        reason = _not_real(inputs[0], dense[0], weight) or _without_samples(use.node, inputs[0], weight)
        if reason:
            return reason
        x, y, of = self._rows(use.node, found, inputs, dense, found.to_matrix(weight), share=len(tie.uses))
        if not (regression.finite(x) and regression.finite(y)):
            return "it reads or gave values that are not finite"
        held_back = self.held_back[of]
        if not bool(held_back.any()) or bool(held_back.all()):
            return "too few of its rows can be held back"
        tie.rows.append((use, x, y, held_back))
        return ""

    def _settle(self, tie: _Tie, name: str, fixed: dict[fx.Node, list[Any]], new: dict[fx.Node, Tensor]) -> Fitted:
        """Fit a weight to the rows of all its readers, and the biases that they alone read; put both into `new`."""
        dense, old = fixed[tie.held]
        mask = self.masks.get(tie.held.name, torch.ones_like(old, dtype=torch.bool))
        kept = mask.flatten()[tie.order]
        if not _channels(kept):
            return Fitted(name, reason=f"{tied.several(tie.uses)}, and single weights of it are masked")
        if not bool(kept.any()):
            return Fitted(name, reason="nothing of it is kept")
        matrix, wanted = old.flatten()[tie.order], dense.flatten()[tie.order]
        biases = {use.node: self._tied_bias(tie, use, fixed) for use, *_ in tie.rows}
        new_biases = {bias: fixed[bias][1].clone().reshape(len(matrix), -1) for bias in biases.values() if bias}
        fits = []
        for group in kept.any(2).any(1).nonzero().flatten().tolist():
            outputs, columns = kept[group].any(1).nonzero().flatten(), kept[group].any(0).nonzero().flatten()
            parts = []
            for use, x, y, held in tie.rows:
                seen, given = (outputs, columns) if use.turned else (columns, outputs)
                bias = biases[use.node]
                parts.append(tied.Rows(x[:, group, seen], y[:, group, given], held, use.turned, bias))
            lookups = [
                tied.Lookups(learnt[outputs], held[outputs], wanted[group][outputs][:, columns])
                for learnt, held in tie.lookups
            ]
            made = tied.fit(parts, lookups, matrix[group][outputs][:, columns])
            matrix[group, outputs.unsqueeze(1), columns] = made.weight
            for use, *_ in tie.rows:
                bias = biases[use.node]
                if bias is not None:
                    new_biases[bias][group, columns if use.turned else outputs] = made.shifts[bias]
            fits.append(made)
        value = old.flatten().clone()
        value[tie.order.flatten()] = matrix.flatten()
        new[tie.held] = value.reshape(old.shape)
        for bias, shift in new_biases.items():
            shift = shift.flatten()
            new[bias] = torch.where(self.masks.get(bias.name, torch.tensor(True)), shift, 0.0)
        return _told(name, sum(len(x) for _, x, _, _ in tie.rows), kept.any(1), fits)

    def _tied_bias(self, tie: _Tie, use: tied.Use, fixed: dict[fx.Node, list[Any]]) -> fx.Node | None:
        """The bias of a reader where readers of the same weight alone read it, by its first node."""
        bias = use.found.bias if use.found else None
        if bias is None or bias.name not in self.parameters or bias not in fixed:
            return None
        size = tie.order.shape[0] * tie.order.shape[2 if use.turned else 1]
        key = self._key(bias)
        same = [o.found.bias for o in tie.uses if o.found and o.found.bias and o.found.bias.name in self.names]
        same = [node for node in same if self._key(node) == key]
        alone = len(same) == self.readers[key]
        value = fixed[bias][0]
        return same[0] if alone and tuple(value.shape) == (size,) and value.is_floating_point() else None

    def _solve(
        self,
        x: Tensor,
        y: Tensor,
        matrix: Tensor,
        outputs: Tensor,
        columns: Tensor,
        held_back: Tensor,
        intercept: bool,
    ) -> tuple[Tensor, list[regression.Fit]]:
        """All groups at once where all of them keep all columns and outputs that they have, else one by one."""
        new = matrix.clone()
        alive = outputs.any(1)
        if bool(columns[alive].all()) and bool(outputs[alive].all()):
            made = regression.fit(x[:, alive], y[:, alive], matrix[alive], held_back, intercept=intercept)
            new[alive] = made.weight
            return new, [made]
        fits = []
        for group in alive.nonzero().flatten().tolist():
            rows, cols = outputs[group].nonzero().flatten(), columns[group].nonzero().flatten()
            part = matrix[group][rows][:, cols].unsqueeze(0)
            made = regression.fit(
                x[:, group : group + 1, cols], y[:, group : group + 1, rows], part, held_back, intercept=intercept
            )
            new[group, rows.unsqueeze(1), cols] = made.weight[0]
            fits.append(made)
        return new, fits

    def _shift(self, node: fx.Node, values: dict[fx.Node, list[list[Any]]], fixed: dict[fx.Node, list[Any]]) -> None:
        """Give a norm's shift what its output's mean lacks, per channel; the pruned values move along."""
        shift = self._shift_of(node, fixed)
        if shift is None:
            return
        dense, pruned = values[node]
        axis = -1 if node.target is aten.layer_norm.default else 1
        size = fixed[shift][0].shape
        if dense[0].shape[axis] != size[0]:
            return
        lack = torch.zeros(size[0], dtype=torch.float64)
        for a, b in zip(dense, pruned, strict=True):
            rest = [d for d in range(a.dim()) if d != axis % a.dim()]
            lack += (a - b).mean(rest, dtype=torch.float64) * len(a)
            self.shelf.rest(a)
            self.shelf.rest(b)
        lack /= sum(len(a) for a in dense)
        if not bool(lack.isfinite().all()):
            return
        if shift.name in self.masks:
            lack[~self.masks[shift.name]] = 0
        lack = lack.to(fixed[shift][0].dtype)
        whole = fixed[shift][1] + lack
        self.result[self.names[shift.name]] = whole
        fixed[shift] = [fixed[shift][0], whole]
        shape = [1] * dense[0].dim()
        shape[axis] = -1
        for value in pruned:
            value += lack.reshape(shape)
            self.shelf.rest(value)


def _as_matrices(value: Tensor, *, turned: bool, repeats: int) -> Tensor:
    """(..., tokens, positions) of queries or keys; each head `repeats` times."""
    value = value.mT if turned else value
    return value.repeat_interleave(repeats, -3) if repeats > 1 else value


def _samples(start: int, samples: int, entries: int) -> Tensor:
    """Of which sample each entry of a batch is: windows and frames lie beside each other, several of one sample."""
    return start + torch.arange(entries) * samples // entries


def _told(name: str, rows: int, columns: Tensor, fits: Sequence[regression.Fit | tied.TiedFit]) -> Fitted:
    """What became of a weight by the fits of its groups, their errors on average; `columns`: kept, (groups, all)."""
    return Fitted(
        name=name,
        rows=rows,
        columns=int(columns.sum(1).max()),
        strength=fits[0].strength,
        error_before=sum(fit.error_before for fit in fits) / len(fits),
        error_after=sum(fit.error_after for fit in fits) / len(fits),
    )


def _not_real(*values: Tensor) -> str:
    """The reason where one of them does not hold real numbers."""
    real = all(v.is_floating_point() for v in values)
    return "" if real else "it is no matter of real numbers"


def _without_samples(node: fx.Node, x: Tensor, weight: Tensor) -> str:
    """The reason where the input of `node` is a single sample."""
    return f"the input of {node.name} has no dimension for the samples" if x.dim() < weight.dim() else ""


def _channels(kept: Tensor) -> bool:
    """Whether whole rows and columns of a mask (groups, outputs, columns) are gone, and no single weights."""
    return torch.equal(kept, kept.any(2, keepdim=True) & kept.any(1, keepdim=True))


def _same(a: Any, b: Any) -> bool:
    """Whether two values of the model are one, or alike in every number."""
    return a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b))
