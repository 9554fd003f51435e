"""The samples that weights are fitted on: their chunks, those held back, and which rows of each weight are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pipeline.channels.program.capture import Captured
from pipeline.recovery import regression, sums
from pipeline.recovery.contractions import Contraction
from pipeline.recovery.recurrent import Drawn
from pipeline.recovery.sampling import batches, chunked, rows_wanted, seed_of
from pipeline.recovery.shelf import Shelf
from pipeline.training.devices import ALONE, Together

Gather = Callable[[Tensor], Tensor]
"""Of an activation, the rows that are looked at: (rows, ...), all channels in their order behind."""
Facts = Callable[[int, Gather], Tensor]
"""Of a chunk, what is known of each of the values that are gathered; see `behind.Behind`."""


class Samples:
    """Samples in `chunks` that the program takes, this process's part of all; `counted`: by chunk, which places hold
    something.

    `held_back`: bool, the samples that judge a fit, and choose its strength; `choosing`: others, that choose the
    strength where a fit is judged as a whole. `first`: how many chunks lie before this part; what is drawn for a chunk
    does not depend on who has it. `together`: the processes that have a part.
    """

    def __init__(
        self,
        captured: Captured,
        inputs: Sequence[Tensor],
        counted: Tensor | None,
        seed: int,
        together: Together = ALONE,
    ) -> None:
        self.captured, self.seed, self.together = captured, seed, together
        chunks = chunked(captured, inputs)
        sizes = [len(chunk[0]) for chunk in chunks]
        mine = together.mine(len(chunks))
        if not mine:
            raise ValueError(f"{len(chunks)} batches of samples do not feed {together.count} processes")
        part = slice(mine.start, mine.stop)
        self.first, self.chunks = mine.start, chunks[part]
        self.starts = [sum(sizes[:at]) for at in mine]
        every = None if counted is None else list(batches(captured, counted))
        self.counted = None if every is None else every[part]
        self._empty = 1.0  # places for each that holds something
        if every is not None:
            self._empty = sum(one.numel() for one in every) / max(1, sum(int(one.sum()) for one in every))
        # The samples held back lie anywhere in the data: it may be sorted by class.
        draw = torch.Generator().manual_seed(seed)
        self.held_back = torch.zeros(sum(sizes), dtype=torch.bool)
        self.held_back[torch.randperm(sum(sizes), generator=draw)[: sum(sizes) // regression.HELD_BACK]] = True
        learn = (~self.held_back).nonzero().flatten()
        self.choosing = torch.zeros_like(self.held_back)
        self.choosing[learn[torch.randperm(len(learn), generator=draw)[: len(learn) // regression.HELD_BACK]]] = True

    def of(self, at: int, entries: int) -> Tensor:
        """Of which sample each entry of the chunk `at` is: windows and frames lie beside each other, several of one."""
        return self.starts[at] + torch.arange(entries) * len(self.chunks[at][0]) // entries

    def held(self, at: int, entries: int) -> Tensor:
        """Which entries of the chunk `at` are held back."""
        return self.held_back[self.of(at, entries)]

    def axis(self, node: fx.Node) -> int:
        """The dimension of the samples in what a matrix multiplies; 0 where none shows."""
        value, fixed = node.meta.get("val"), -1 if self.captured.dynamic_batch else len(self.chunks[0][0])
        if isinstance(value, Tensor):
            for axis, size in enumerate(value.shape[:-1]):
                if size == fixed if isinstance(size, int) else self.captured.of_batch(size):
                    return axis
        return 0

    def rows(
        self,
        node: fx.Node,
        found: Contraction,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        matrix: Tensor,
        shelf: Shelf,
        share: int = 1,
        facts: Facts | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Rows (rows, groups, columns), targets (rows, groups, outputs), of which sample each row is; and the `facts`
        of the targets.

        One in `share` of the rows that a weight is fitted on, of several readers that have to do with these together.
        `shelf`: where `inputs` and `outputs` lie.
        """
        axis = self.axis(found.x)

        def samples_first(value: Tensor) -> Tensor:
            return value.movedim(axis, 0) if found.matrix else value

        inputs = [samples_first(x) for x in inputs]
        count = found.count(samples_first(outputs[0]))
        wanted = rows_wanted(matrix.shape[0], matrix.shape[2]) // share
        counted = self.counted if found.matrix and not axis else None
        if counted is not None and any(y.shape[:-1] != held.shape for y, held in zip(outputs, counted, strict=True)):
            counted = None
        elif counted is not None:  # enough of them when those that hold nothing are left out
            wanted = round(wanted * self._empty)
        each = min(count, -(-wanted // self.entries(inputs)))
        draw = self.drawing(node.name, count)
        xs, ys, of, known = [], [], [], []
        for at, (x, y) in enumerate(zip(inputs, outputs, strict=True)):
            # The same places of every sample of a chunk, others in the next.
            places = torch.randperm(count, generator=draw)[:each]
            held = slice(None) if counted is None else counted[at][:, places].flatten()

            def drawn(value: Tensor, places: Tensor = places, held: Any = held) -> Tensor:
                return found.targets(samples_first(value), places).flatten(0, 1)[held].float()

            xs.append(found.rows(x, places).flatten(0, 1)[held].float())
            ys.append(drawn(y))
            if facts is not None:
                known.append(facts(at, drawn))
            shelf.rest(x)
            shelf.rest(y)
            of.append(self.of(at, len(x)).repeat_interleave(each)[held])
        return torch.cat(xs), torch.cat(ys), torch.cat(of), torch.cat(known) if known else None

    def sequences(self, name: str, inputs: Sequence[Tensor], columns: int) -> Drawn | None:
        """Steps of a recurrent layer to look at, and sequences to hold back; None where too few can be.

        `inputs`: (steps, batch, ...) by chunk; `columns`: of the matrices, `name` that of the first.
        """
        wanted = -(-rows_wanted(1, columns) // self.entries([x.transpose(0, 1) for x in inputs]))
        draw = self.drawing(name, len(inputs[0]))
        steps, judges, chooses = [], [], []
        for at, x in enumerate(inputs):
            steps.append(torch.randperm(len(x), generator=draw)[: min(len(x), wanted)])
            of = self.of(at, x.shape[1])
            judges.append(self.held_back[of])
            chooses.append(self.choosing[of])
        judging, choosing = torch.cat(judges), torch.cat(chooses)
        kinds = (judging, choosing, ~(judging | choosing))
        if 0 in self.together.sum(*(int(kind.sum()) for kind in kinds)):
            return None
        return Drawn(steps, chooses, judges)

    def usable(self, held: Tensor) -> bool:
        """Whether some entries of all processes are `held`, and not every one."""
        count, some = self.together.sum(len(held), int(held.sum()))
        return 0 < some < count

    def finite(self, *values: Tensor) -> bool:
        """Whether every number is finite, on all processes."""
        return self.together.every(all(sums.finite(v) for v in values))

    def entries(self, inputs: Sequence[Tensor]) -> int:
        """How many entries the chunks of all processes have."""
        return int(self.together.sum(sum(len(x) for x in inputs))[0])

    def drawing(self, name: str, count: int) -> torch.Generator:
        """Draws for the chunks of this process; those before it have had theirs, out of `count` each."""
        draw = torch.Generator().manual_seed(self.seed + 1 + seed_of(name))
        for _ in range(self.first):
            torch.randperm(count, generator=draw)
        return draw
