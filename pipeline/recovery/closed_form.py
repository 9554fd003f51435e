"""The closed form: both networks advance together, node by node, over all samples at once, and each weight that reads
something changed is fitted so that the pruned network gives what the dense one gave.

No labels, no gradients: about two forward passes and one system of normal equations per weight. After a trial of ours
this gives back more accuracy than an epoch of training with labels (docs/recovery.md); the idea is layer-wise
reconstruction (He et al. 2017, arXiv:1707.06168), here for every contraction of a graph and with both sides cut.
"""

from __future__ import annotations

import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from foundation.editor import writes
from pipeline.channels.program.capture import Captured
from pipeline.channels.program.execute import last_uses
from pipeline.recovery import regression
from pipeline.recovery.contractions import Contraction, contraction, weight_of

aten = torch.ops.aten

ROWS = 4096
PER_COLUMN = 3
"""A weight is fitted on `ROWS` rows or `PER_COLUMN` for each of its columns, where the samples have so many."""
MOST = 1 << 26
"""Numbers in the rows of one weight: a quarter of a gigabyte."""
LEAST = 10
"""Samples, at the least: some of them are held back."""
CHUNK = 32
"""Samples that are computed at once."""
ON_DISK = 3 << 30
"""Bytes of activations of both networks together, beyond which further ones are kept in a file that is mapped."""

_NORMS: dict[Any, int] = {
    aten.batch_norm.default: 1, aten.layer_norm.default: 2, aten.group_norm.default: 2, aten.instance_norm.default: 1,
}  # fmt: skip
"""Norms with a shift -> the position of their scale; the shift comes next."""


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
    seed: int = 0,
    on_disk: int = ON_DISK,
    tick: Tick = lambda done, note: None,
) -> ClosedForm:
    """Fit the kept weights under `masks` to what `captured` computes, which is the dense network.

    `masks`: parameter name -> bool tensor, True = kept. `inputs`: the model's inputs, all samples in dimension 0 of
    each. `start`: the weights that the pruned network has by now, where they are not the dense ones; the fit is pulled
    to them. `tick(nodes done, name)` is called as it goes. Deterministic: the same inputs and seed give the same
    weights. Raises ValueError for fewer than `LEAST` samples, or activations that are not finite.
    """
    began = time.perf_counter()
    if len(inputs[0]) < LEAST:
        raise ValueError(f"{len(inputs[0])} samples are too few to fit weights to; it takes {LEAST}")
    walk = _Walk(captured, masks, {**captured.state, **(start or {})}, inputs, seed, on_disk)
    walk.run(tick)
    state = {**walk.start, **walk.result}
    return ClosedForm(state, tuple(walk.fitted), time.perf_counter() - began, walk.shelf.on_disk)


@dataclass
class _Shelf:
    """Where activations lie: in memory, or in mapped files once there are too many bytes of them."""

    limit: int
    held: int = 0
    on_disk: int = 0
    folder: Any = None
    sizes: dict[int, int] = field(default_factory=dict)

    def put(self, value: Any) -> Any:
        """`value`, moved into a file where it is a large tensor of its own and memory is full."""
        if not isinstance(value, Tensor) or value._base is not None or value.numel() < 1 << 16:
            return value
        size = value.numel() * value.element_size()
        if self.held + size <= self.limit or value.dtype == torch.bool:
            self.held += size
            self.sizes[id(value)] = size
            return value
        if self.folder is None:
            self.folder = tempfile.TemporaryDirectory(prefix="leanort-activations-")
        self.on_disk += size
        file = tempfile.NamedTemporaryFile(dir=self.folder.name, delete=False)  # noqa: SIM115  # mapped, then unlinked
        array = np.memmap(file, dtype=value.numpy().dtype, mode="w+", shape=tuple(value.shape))
        array[...] = value.contiguous().numpy()
        file.close()
        return torch.from_numpy(array)

    def drop(self, value: Any) -> None:
        """Forget a value that nobody reads any more."""
        self.held -= self.sizes.pop(id(value), 0)


class _Walk:
    """One pass over the graph with both networks' values of every chunk; where they are the same they are one."""

    def __init__(
        self,
        captured: Captured,
        masks: Mapping[str, Tensor],
        start: Mapping[str, Tensor],
        inputs: Sequence[Tensor],
        seed: int,
        on_disk: int,
    ) -> None:
        self.captured, self.seed, self.start = captured, seed, start
        self.graph = captured.program.graph
        self.names = {
            spec.arg.name: spec.target
            for spec in captured.program.graph_signature.input_specs
            if spec.target is not None
        }
        held: dict[str, Any] = {**captured.program.constants, **captured.program.state_dict, **captured.state}
        self.dense = {node: held[target] for node, target in self.names.items()}
        self.masks = {node: masks[target] for node, target in self.names.items() if target in masks}
        self.result: dict[str, Tensor] = {}
        self.fitted: list[Fitted] = []
        self.shelf = _Shelf(on_disk)
        self.chunks = self._chunks(inputs)
        samples = len(self.order)
        # The samples held back lie anywhere in the data: it may be sorted by class.
        draw = torch.Generator().manual_seed(seed)
        self.held_back = torch.zeros(samples, dtype=torch.bool)
        self.held_back[torch.randperm(samples, generator=draw)[: samples // regression.HELD_BACK]] = True

    def _chunks(self, inputs: Sequence[Tensor]) -> list[list[Tensor]]:
        count = len(inputs[0])
        size = CHUNK if self.captured.dynamic_batch else len(self.captured.example[0])
        starts = range(0, count - (0 if self.captured.dynamic_batch else size - 1), size)
        self.order = torch.arange(count if self.captured.dynamic_batch else len(starts) * size)
        chunks = [[x[start : start + size] for x in inputs] for start in starts]
        if self.captured.dynamic_batch and len(chunks) > 1 and len(chunks[-1][0]) == 1:
            last = chunks.pop()  # a batch of one is a case of its own to torch.export
            chunks[-1] = [torch.cat([a, b]) for a, b in zip(chunks[-1], last, strict=True)]
        return chunks

    def run(self, tick: Tick) -> None:
        """Compute, fit, forget, node by node."""
        pruned = {node: self.start.get(self.names[node], value) for node, value in self.dense.items()}
        pruned = {n: self.dense[n] if torch.equal(v, self.dense[n]) else v for n, v in pruned.items()}
        for node, mask in self.masks.items():
            pruned[node] = torch.where(mask, pruned[node], torch.zeros((), dtype=pruned[node].dtype))
        readers: dict[str, int] = {}
        for node in self.graph.nodes:
            held = weight_of(node)
            if held is not None:
                readers[held.name] = readers.get(held.name, 0) + 1
        values: dict[fx.Node, list[list[Any]]] = {}  # node -> [dense values, pruned values], each by chunk
        dies = last_uses(self.graph)
        inputs = iter(range(len(self.chunks[0])))
        fixed: dict[fx.Node, list[Any]] = {}  # parameters, buffers, constants: [dense, pruned]
        with torch.no_grad():
            for number, node in enumerate(self.graph.nodes):
                if node.op == "output":
                    break
                if node.op == "placeholder":
                    if node.name in self.dense:
                        fixed[node] = [self.dense[node.name], pruned[node.name]]
                    else:
                        at = next(inputs)
                        column = [chunk[at] for chunk in self.chunks]
                        values[node] = [column, column]
                    continue
                tick(number, node.name)
                self._node(node, values, fixed, readers)
                for dead in dies.get(node, ()):
                    for column in values.pop(dead, ()):
                        for value in column:
                            self.shelf.drop(value)
        for node in self.masks:
            name = self.names[node]
            if name not in self.result:
                continue
            # Originals stay under the masks.
            self.result[name] = torch.where(self.masks[node], self.result[name], self.start[name])

    def _node(
        self,
        node: fx.Node,
        values: dict[fx.Node, list[list[Any]]],
        fixed: dict[fx.Node, list[Any]],
        readers: Mapping[str, int],
    ) -> None:
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
            values[first] = [values[first][0], [v.clone() for v in values[first][0]]]
        dense = self._column(node, values, fixed, 0)
        if not changed:
            values[node] = [dense, dense]
            return
        if moved:
            self._fit(node, values, fixed, dense, readers)
        values[node] = [dense, self._column(node, values, fixed, 1)]
        if node.target in _NORMS:
            self._shift(node, values, fixed)

    def _column(
        self, node: fx.Node, values: dict[fx.Node, list[list[Any]]], fixed: dict[fx.Node, list[Any]], side: int
    ) -> list[Any]:
        made = []
        for chunk in range(len(self.chunks)):
            args = {s: values[s][side][chunk] if s in values else fixed[s][side] for s in node.all_input_nodes}
            made.append(self.shelf.put(self._call(node, args)))
        return made

    def _call(self, node: fx.Node, args: Mapping[fx.Node, Any]) -> Any:
        target: Any = node.target
        return target(*fx.node.map_arg(node.args, args.__getitem__), **fx.node.map_arg(node.kwargs, args.__getitem__))

    # ── fitting ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _fit(
        self,
        node: fx.Node,
        values: dict[fx.Node, list[list[Any]]],
        fixed: dict[fx.Node, list[Any]],
        dense: list[Any],
        readers: Mapping[str, int],
    ) -> None:
        held = weight_of(node)
        if held is None:
            return
        name = self.names.get(held.name)
        if name is None or held not in fixed:
            what = "is computed from others" if held in fixed else "depends on the input"
            self.fitted.append(Fitted(held.name, reason=f"the weight of {node.name} {what}"))
            return
        found = contraction(node, fixed[held][0])
        if found is None or found.x not in values:
            self.fitted.append(Fitted(name, reason="what it multiplies is no input"))
            return
        if readers[held.name] > 1:
            self.fitted.append(Fitted(name, reason=f"{readers[held.name]} operators read it"))
            return
        matrix = found.to_matrix(fixed[held][1])
        mask = self.masks.get(held.name, torch.ones_like(fixed[held][0], dtype=torch.bool))
        kept = found.to_matrix(mask)
        outputs, columns = kept.any(2), kept.any(1)
        if not torch.equal(kept, outputs.unsqueeze(2) & columns.unsqueeze(1)):
            self.fitted.append(Fitted(name, reason="single weights of it are masked, not channels"))
            return
        if not bool(kept.any()):
            self.fitted.append(Fitted(name, reason="nothing of it is kept"))
            return
        x, y, held_back = self._rows(node, found, values[found.x][1], dense)
        bias = found.bias
        own_bias = bias is not None and self.names.get(bias.name) is not None and readers.get(bias.name, 0) == 0
        intercept = own_bias or self._norm_follows(node)
        new, made = self._solve(x, y, matrix, outputs, columns, held_back, intercept)
        value = found.from_matrix(new)
        self.result[name] = value
        fixed[held] = [fixed[held][0], torch.where(mask, value, torch.zeros_like(value))]
        if own_bias and bias is not None:
            whole = fixed[bias][1].clone()
            whole[outputs.flatten()] = torch.cat([fit.bias.flatten() for fit in made if fit.bias is not None])
            self.result[self.names[bias.name]] = whole
            fixed[bias] = [fixed[bias][0], whole]
        total = sum(fit.error_before for fit in made), sum(fit.error_after for fit in made)
        self.fitted.append(
            Fitted(
                name=name,
                rows=len(x),
                columns=int(columns.sum(1).max()),
                strength=made[0].strength,
                error_before=total[0] / len(made),
                error_after=total[1] / len(made),
            )
        )

    def _norm_follows(self, node: fx.Node) -> bool:
        """Whether a norm with a shift is all that reads it, so that a wrong mean is mended there."""
        users = list(node.users)
        return len(users) == 1 and users[0].target in _NORMS

    def _rows(
        self, node: fx.Node, found: Contraction, inputs: list[Tensor], outputs: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (rows, groups, columns), targets (rows, groups, outputs), which rows are held back."""
        samples = len(self.order)
        count = found.count(outputs[0])
        columns = found.rows(inputs[0][:1], torch.zeros(1, dtype=torch.long))
        width = columns.shape[-1]
        wanted = min(max(ROWS, PER_COLUMN * width), max(1, MOST // columns[0, 0].numel()))
        each = min(count, -(-wanted // samples))
        draw = torch.Generator().manual_seed(self.seed + 1 + hash_of(node.name))
        xs, ys, held, start = [], [], [], 0
        for x, y in zip(inputs, outputs, strict=True):
            # The same places of every sample of a chunk, others in the next.
            places = torch.randperm(count, generator=draw)[:each]
            xs.append(found.rows(x, places).flatten(0, 1))
            ys.append(found.targets(y, places).flatten(0, 1))
            held.append(self.held_back[start : start + len(x)].repeat_interleave(each))
            start += len(x)
        return torch.cat(xs).float(), torch.cat(ys).float(), torch.cat(held)

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
        at = _NORMS[node.target] + 1
        shift = node.args[at] if len(node.args) > at else None
        if not isinstance(shift, fx.Node) or shift not in fixed or shift.name not in self.names:
            return
        if len(shift.users) > 1:
            return
        dense, pruned = values[node]
        axis = -1 if node.target is aten.layer_norm.default else 1
        size = fixed[shift][0].shape
        if len(size) != 1 or dense[0].shape[axis] != size[0]:
            return
        lack = torch.zeros(size[0], dtype=torch.float64)
        for a, b in zip(dense, pruned, strict=True):
            rest = [d for d in range(a.dim()) if d != axis % a.dim()]
            lack += (a.double() - b.double()).mean(rest) * len(a)
        lack /= len(self.order)
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


def hash_of(name: str) -> int:
    """A number of a node's name that is the same in every process."""
    return zlib.crc32(name.encode())
