"""What the readers of channels see: mean, second moment and Gram matrix of each column of their weights.

A reader is a contraction with a weight (`pipeline.recovery.contractions`) whose columns belong to a cluster. The
program runs once over the samples, in batches; of each layer's output positions as many are drawn as the closed form
draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from foundation.editor import writes
from foundation.errors import ModelError
from foundation.files import memory_of
from pipeline.channels.coupling.groups import Cluster
from pipeline.channels.program.capture import Captured
from pipeline.channels.program.execute import execute, feeds_of
from pipeline.recovery import sums
from pipeline.recovery.contractions import Contraction, contraction, weight_of
from pipeline.recovery.sampling import chunked, rows_wanted, seed_of

SAMPLES = 512
"""Samples, at the most, that readers are observed on."""
LARGEST_GRAM = 1 << 25
"""Numbers in one reader's Gram matrices (256 MiB in float64, 5,792 columns); a larger one is its diagonal."""
ALL_GRAMS = 1 << 28
"""Numbers in all readers' Gram matrices together (2 GiB); the largest ones are their diagonals, until that holds."""

WAITING = 1024
"""Rows of a reader whose products are added up at once."""
FLAT = 1e-10
"""Of a column's mean square: whose variance is no more is constant."""

aten = torch.ops.aten
_CENTRING = (aten.batch_norm.default, aten.instance_norm.default)


@dataclass(frozen=True)
class ReaderInput:
    """What one contraction reads, in the form (groups, columns) of its weight's matrix (groups, outputs, columns).

    `mean`, `square`: of the values and of their squares, over `rows` rows. `gram`: mean of the products (groups,
    columns, columns), None where nobody asked or where it would be too large, as `reason` says then. `bias`, or else
    `running_mean` of a norm behind it, can take what the mean lacks ("" where neither is there). `fold` is the
    contraction that tells the columns.
    """

    weight: str
    fold: Contraction
    rows: int
    mean: Tensor
    square: Tensor
    gram: Tensor | None
    bias: str = ""
    running_mean: str = ""
    reason: str = ""

    @property
    def takes_mean(self) -> bool:
        """Whether a change of what the mean gives can be undone."""
        return bool(self.bias or self.running_mean)

    @property
    def variance(self) -> Tensor:
        """Per column, over the rows."""
        return (self.square - self.mean.square()).clamp_min(0.0)

    def second(self) -> Tensor:
        """What a change of the weights costs: the Gram matrix, about the mean where that is taken, (groups, columns,
        columns), or its diagonal, (groups, columns), where nothing else is known. Columns that do not vary are exactly
        zero.
        """
        kept = self.variance if self.takes_mean else self.square
        # What is left of a constant column is rounding: products are of float32.
        flat = kept <= FLAT * self.square
        if self.gram is None:
            return torch.where(flat, 0.0, kept)
        found = self.gram - self.mean.unsqueeze(2) * self.mean.unsqueeze(1) if self.takes_mean else self.gram.clone()
        found.masked_fill_(flat.unsqueeze(1) | flat.unsqueeze(2), 0.0)
        found.diagonal(dim1=1, dim2=2).copy_(torch.where(flat, 0.0, kept))
        return found

    def columns(self, shape: Sequence[int], dim: int, labels: Tensor) -> Tensor | None:
        """Group of each column (groups, columns), -1 for none, given those of the weight's dimension `dim`; None where
        `dim` is no dimension that is read.
        """
        spread = labels.reshape([-1 if d == dim else 1 for d in range(len(shape))]).expand(*shape)
        matrix = self.fold.to_matrix(spread)
        return matrix[:, 0] if bool((matrix == matrix[:, :1]).all()) else None


def observe_readers(
    captured: Captured, clusters: Sequence[Cluster], samples: Sequence[Tensor], *, grams: bool, seed: int = 0
) -> dict[str, tuple[ReaderInput, ...]]:
    """Weight -> what each contraction with it reads, for the weights that read channels of `clusters`.

    One pass over `samples` (a tensor for each input) on the weights of `captured`; sums in float64. A weight that no
    contraction with a rule reads is absent. Deterministic. Raises ModelError, naming the layer, where a value is not
    finite.
    """
    wanted = {name for cluster in clusters for name, _ in cluster.readers}
    watched = _watched(captured, wanted)
    chunks = chunked(captured, samples)
    sums = {node: _Sums(*found) for node, found in watched.items()}
    if grams:
        _allow_grams(list(sums.values()))
    count = sum(len(chunk[0]) for chunk in chunks)
    with torch.random.fork_rng(devices=[]):
        for number, chunk in enumerate(chunks):
            _pass(captured, chunk, sums, count, seed + number)
    made: dict[str, list[ReaderInput]] = {}
    for one in sums.values():
        if one.rows:
            made.setdefault(one.weight, []).append(one.finished(grams))
    aliases = {memory_of(name, value): name for name, value in captured.state.items() if name in made}
    tied = {name: aliases.get(memory_of(name, captured.state[name]), name) for name in wanted if name in captured.state}
    return {name: tuple(made[first]) for name, first in tied.items() if first in made}


def norm_scales(captured: Captured) -> frozenset[str]:
    """Parameters that scale what a norm gives, by every name they have."""
    named = captured.targets
    found = set()
    for node in captured.program.graph.nodes:
        at = _SCALES.get(node.target)
        scale = node.args[at] if at is not None and len(node.args) > at else None
        if isinstance(scale, fx.Node) and named.get(scale.name) in captured.state:
            target = named[scale.name]
            found.add(memory_of(target, captured.state[target]))
    return frozenset(name for name, value in captured.state.items() if memory_of(name, value) in found)


_SCALES: dict[Any, int] = {
    aten.batch_norm.default: 1, aten.layer_norm.default: 2, aten.group_norm.default: 2, aten.instance_norm.default: 1,
    aten.rms_norm.default: 2,
}  # fmt: skip


class _Sums:
    """Sums over the rows of one contraction."""

    def __init__(self, weight: str, fold: Contraction, shape: tuple[int, int], shifts: tuple[str, str]) -> None:
        self.weight, self.fold, self.shape, self.shifts = weight, fold, shape, shifts
        self.rows = 0
        self.total = torch.zeros(shape, dtype=torch.float64)
        self.squares = torch.zeros(shape, dtype=torch.float64)
        self.gram: Tensor | None = None
        self.waiting: list[Tensor] = []
        self.reason = ""

    @property
    def numbers(self) -> int:
        """In the Gram matrices."""
        return self.shape[0] * self.shape[1] ** 2

    def add(self, x: Tensor, y: Tensor, samples: int, of: int, draw: torch.Generator) -> None:
        """Count the rows of a batch of `samples`, `of` which there are in all."""
        if self.fold.matrix:
            x = x.reshape(1, -1, x.shape[-1])
            count = x.shape[1]
        else:
            count = self.fold.count(y)
        groups, width = self.shape
        each = -(-rows_wanted(groups, width) // of) * (samples if self.fold.matrix else 1)
        places = torch.arange(count) if each >= count else torch.randperm(count, generator=draw)[:each]
        rows = self.fold.rows(x, places).flatten(0, 1).movedim(1, 0)  # groups, rows, columns
        self.rows += rows.shape[1]
        exact = rows.double()
        self.total += exact.sum(1)
        self.squares += exact.square().sum(1)
        if self.gram is not None:
            self.waiting.append(rows.float())
            if sum(part.shape[1] for part in self.waiting) >= min(width, WAITING):
                self._multiply()

    def _multiply(self) -> None:
        """Add the products of the rows that wait: adding up a large matrix for every few rows would take longest."""
        if self.gram is not None and self.waiting:
            rows = torch.cat(self.waiting, 1)
            self.gram += sums.products(rows, rows)
            self.waiting.clear()

    def finished(self, asked: bool) -> ReaderInput:
        """The means. Raises ModelError where they are not finite."""
        self._multiply()
        mean, square = self.total / self.rows, self.squares / self.rows
        gram = None if self.gram is None else self.gram.div_(self.rows)  # in place: it may be large
        if not bool(square.isfinite().all()) or not bool(mean.isfinite().all()) or _broken(gram):
            raise ModelError(
                f"{self.weight.rpartition('.')[0] or self.weight} reads values that are NaN, infinite or too large.",
                "Check the weights and the calibration samples, or look at the weights only: "
                "--set prune.criterion=l2 --set prune.refit=false",
            )
        return ReaderInput(
            self.weight, self.fold, self.rows, mean, square, gram, *self.shifts, self.reason if asked else ""
        )


def _broken(gram: Tensor | None) -> bool:
    return gram is not None and not bool(gram.isfinite().all())


def _watched(
    captured: Captured, wanted: set[str]
) -> dict[fx.Node, tuple[str, Contraction, tuple[int, int], tuple[str, str]]]:
    """Contraction -> its weight's name, its form, (groups, columns), names of its bias and of the mean of a norm behind
    it; only of weights that are `wanted`.
    """
    named = captured.targets
    keys = {memory_of(name, captured.state[name]): name for name in wanted if name in captured.state}
    found = {}
    for node in captured.program.graph.nodes:
        held = weight_of(node)
        target = named.get(held.name) if held is not None else None
        if target is None or target not in captured.state:
            continue
        value = captured.state[target]
        name, fold = keys.get(memory_of(target, value)), contraction(node, value)
        if name is not None and fold is not None and value.is_floating_point():
            matrix = fold.to_matrix(value)
            found[node] = (name, fold, (matrix.shape[0], matrix.shape[2]), _shifts(node, fold, named, captured.state))
    return found


def _shifts(
    node: fx.Node, fold: Contraction, named: Mapping[str, str | None], state: Mapping[str, Tensor]
) -> tuple[str, str]:
    """Names of the bias, and of the running mean of a norm that is all that reads `node`; "" for what is not there."""
    bias = named.get(fold.bias.name) if fold.bias is not None else None
    users = list(node.users)
    mean = users[0].args[3] if len(users) == 1 and users[0].target in _CENTRING and len(users[0].args) > 3 else None
    running = named.get(mean.name) if isinstance(mean, fx.Node) else None
    return (bias or "" if bias in state else ""), (running or "" if running in state else "")


def _allow_grams(sums: Sequence[_Sums]) -> None:
    """Give Gram matrices to those for which there is room, the smallest first."""
    room = ALL_GRAMS
    for one in sorted(sums, key=lambda s: s.numbers):
        if one.numbers > min(LARGEST_GRAM, room):
            one.reason = f"the products of its {one.shape[1]:,} columns are too many: only their squares were kept"
            continue
        room -= one.numbers
        one.gram = torch.zeros(one.shape[0], one.shape[1], one.shape[1], dtype=torch.float64)


def _pass(captured: Captured, chunk: Sequence[Tensor], sums: Mapping[fx.Node, _Sums], of: int, seed: int) -> None:
    """One batch through the program; what it writes into is its own."""
    graph = captured.program.graph
    feeds = feeds_of(captured.program, tuple(chunk), captured.state)
    for node in graph.nodes:
        if node.op == "placeholder" and any(writes(user) for user in node.users):
            value = feeds[node.name]
            feeds[node.name] = value.clone() if isinstance(value, Tensor) else value

    def compute(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target: Any = node.target
        if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()):
            torch.manual_seed(seed + seed_of(node.name))
        one = sums.get(node)
        x: Any = args[list(node.args).index(one.fold.x)] if one is not None else None
        made = target(*args, **kwargs)
        # Convolutions also take one sample without a dimension for the batch; nothing is counted of such.
        if one is not None and (one.fold.matrix or x.dim() == captured.state[one.weight].dim()):
            draw = torch.Generator().manual_seed(seed + seed_of(node.name))
            one.add(x, made, len(chunk[0]), of, draw)
        return made

    execute(graph, feeds, compute=compute)
