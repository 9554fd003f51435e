"""LSTM, GRU and plain recurrent layers: what their gates are fed, fitted one layer and direction after the other.

The gates see x Wᵢᵀ + h Wₕᵀ + b, linear in the input and in the state before: both matrices are one ridge regression to
what fed the gates of the dense layer. The candidate of a GRU takes the two parts one by one. Which states the pruned
layer has depends on the weights that are asked for. So they are fitted on the states of the dense layer first, which
the pruned one has where the fit is good, then on its own, as long as the sequences held back come nearer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from pipeline.recovery import regression, sums
from pipeline.training.devices import ALONE, Together

aten = torch.ops.aten

GATES: dict[Any, int] = {aten.lstm.input: 4, aten.gru.input: 3, aten.rnn_tanh.input: 1, aten.rnn_relu.input: 1}
"""Operator -> gates of a unit, stacked in dimension 0 of the weights."""
ROUNDS = 3
"""Fits of one cell: on the states of the dense layer, then on its own."""


@dataclass(frozen=True)
class Cell:
    """One layer in one direction of the operator `target`; `number`: which of its initial states it starts from.

    Weights come in the operator's own order: input, hidden, the two biases where `biases`, the projection where there
    is one.
    """

    target: Any
    number: int
    reverse: bool
    nodes: tuple[fx.Node, ...]
    biases: bool

    @property
    def matrices(self) -> tuple[int, ...]:
        """Which of the weights are matrices."""
        return tuple(at for at in range(len(self.nodes)) if not (self.biases and at in (2, 3)))

    @property
    def projection(self) -> int | None:
        """Which of the weights is the projection."""
        return self.matrices[2] if len(self.matrices) > 2 else None


def layers(node: fx.Node) -> list[list[Cell]]:
    """The cells of a recurrent operator: for every layer one, or one for each direction."""
    args: Any = node.args
    weights, biases, count, directions = args[2], bool(args[3]), int(args[4]), 2 if args[7] else 1
    per = len(weights) // (count * directions)
    cells = [
        Cell(node.target, at, at % directions == 1, tuple(weights[at * per : (at + 1) * per]), biases)
        for at in range(count * directions)
    ]
    return [cells[at : at + directions] for at in range(0, len(cells), directions)]


@dataclass(frozen=True)
class Side:
    """One network's part of a cell, by chunk: inputs (steps, batch, inputs), initial states as the operator takes them
    (h, or h and c), each (1, batch, units); and its weights.
    """

    x: Sequence[Tensor]
    initial: Sequence[Sequence[Tensor]]
    weights: tuple[Tensor, ...]


@dataclass(frozen=True)
class Drawn:
    """What is looked at, by chunk: steps (steps drawn,), and bool (batch,) which sequences choose the strength
    (`chooses`) and which judge the fit (`judges`); the others are learnt from.
    """

    steps: Sequence[Tensor]
    chooses: Sequence[Tensor]
    judges: Sequence[Tensor]


@dataclass(frozen=True)
class CellFit:
    """New weights, and the states (steps, batch, units) that they and the dense ones give, by chunk.

    `error_before` and `error_after`: squares that the states of the sequences which judge lack, of the kept units, over
    those of the centred dense ones. `strength` 0 where the old weights stay.
    """

    weights: tuple[Tensor, ...]
    dense: list[Tensor]
    pruned: list[Tensor]
    rows: int
    columns: int
    strength: float
    error_before: float
    error_after: float


def states(cell: Cell, side: Side) -> list[Tensor]:
    """What a cell gives at every step, by chunk: (steps, batch, units, or rows of the projection)."""
    made = []
    for x, initial in zip(side.x, side.initial, strict=True):
        start = list(initial) if len(initial) > 1 else initial[0]
        read = x.flip(0) if cell.reverse else x
        y = cell.target(read, start, list(side.weights), cell.biases, 1, 0.0, False, False, False)[0]
        made.append(y.flip(0) if cell.reverse else y)
    return made


def fit(
    cell: Cell,
    dense: Side,
    pruned: Side,
    kept: Sequence[Tensor],
    free: Sequence[bool],
    drawn: Drawn,
    together: Together = ALONE,
) -> CellFit | None:
    """Fit the weights of a cell; `kept`: masks like its weights; `free`: which of the weights may change; `together`:
    the processes that each have a part of the sequences.

    None where something that is read or given is not finite. Raises ValueError where no sequence judges, chooses or is
    left to learn from.
    """
    wanted = states(cell, dense)
    first = states(cell, pruned)
    given = kept[-1 if cell.projection else 1].any(1)
    unit = given if cell.projection else given.reshape(GATES[cell.target], -1).any(0)
    if not together.every(all(sums.finite(v) for v in (*wanted, *dense.x, *pruned.x))):
        return None
    before = best = _lack(wanted, first, drawn.judges, unit, together)
    weights, own, strength, rows = pruned.weights, first, 0.0, 0
    target = _fed(dense.weights, cell, *_seen(cell, dense, wanted, drawn))
    for turn in range(ROUNDS):
        if turn and not math.isfinite(best):
            break
        at = wanted if turn == 0 else own
        made = _refitted(cell, pruned, weights, at, wanted, target, kept, free, drawn, together)
        if made is None:
            break
        candidate, used, rows = made
        reached = states(cell, replace(pruned, weights=candidate))
        left = _lack(wanted, reached, drawn.judges, unit, together)
        if left < best:
            best, weights, own, strength = left, candidate, reached, max(strength, used)
        elif turn:
            break
    if not math.isfinite(best):
        return None
    columns = sum(int(kept[at].any(0).sum()) for at in (0, 1))
    return CellFit(weights, wanted, own, rows, columns, strength, before, best)


def _lack(
    wanted: list[Tensor], reached: list[Tensor], judges: Sequence[Tensor], unit: Tensor, together: Together
) -> float:
    """Squares that the states lack over those of the centred wanted ones; infinite where any state is no number."""
    if not together.every(all(map(sums.finite, reached))):
        return math.inf
    pairs = [(a[:, j][..., unit].double(), b[:, j][..., unit].double())
             for a, b, j in zip(wanted, reached, judges, strict=True)]  # fmt: skip
    count = together.sum(sum(a.shape[0] * a.shape[1] for a, _ in pairs))[0]
    if not count:
        raise ValueError("sequences have to be held back")
    mean = together.added(sum((a.sum((0, 1)) for a, _ in pairs), torch.zeros((), dtype=torch.float64))) / count
    total, lack = together.sum(
        sum(float((a - mean).square().sum()) for a, _ in pairs), sum(float((a - b).square().sum()) for a, b in pairs)
    )
    lack /= total or 1.0
    return lack if math.isfinite(lack) else math.inf


def _before(cell: Cell, given: Tensor, initial: Tensor) -> Tensor:
    """The states that the cell reads at every step."""
    return torch.cat([given[1:], initial] if cell.reverse else [initial, given[:-1]])


def _seen(cell: Cell, side: Side, given: list[Tensor], drawn: Drawn) -> tuple[Tensor, Tensor]:
    """Inputs and states before, (rows, inputs) and (rows, units), at the steps that are drawn."""
    xs, hs = [], []
    for x, y, initial, steps in zip(side.x, given, side.initial, drawn.steps, strict=True):
        xs.append(x[steps].flatten(0, 1).float())
        hs.append(_before(cell, y, initial[0])[steps].flatten(0, 1).float())
    return torch.cat(xs), torch.cat(hs)


def _fed(weights: tuple[Tensor, ...], cell: Cell, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """What the input and what the state before feed to the gates, biases included: (rows, gates · units) each."""
    of_x, of_h = x @ weights[0].float().mT, h @ weights[1].float().mT
    return (of_x + weights[2].float(), of_h + weights[3].float()) if cell.biases else (of_x, of_h)


def _refitted(
    cell: Cell,
    pruned: Side,
    old: tuple[Tensor, ...],
    at: list[Tensor],
    wanted: list[Tensor],
    target: tuple[Tensor, Tensor],
    kept: Sequence[Tensor],
    free: Sequence[bool],
    drawn: Drawn,
    together: Together,
) -> tuple[tuple[Tensor, ...], float, int] | None:
    """Weights fitted where the states are `at`, with the largest strength of all parts and the rows learnt from; None
    where numbers grow beyond what a float holds.
    """
    masks = [j.repeat(len(s)) for j, s in zip(drawn.judges, drawn.steps, strict=True)]
    learn = ~torch.cat(masks)
    chooses = torch.cat([c.repeat(len(s)) for c, s in zip(drawn.chooses, drawn.steps, strict=True)])[learn]
    seen = [v[learn] for v in _seen(cell, pruned, at, drawn)]
    fed = [v[learn] for v in target]
    new = [w.clone() for w in old]
    rows, units = len(old[0]), len(old[0]) // GATES[cell.target]
    # Of a GRU the last gate multiplies the state's part, before the input's is added.
    apart = slice(rows - units, rows) if cell.target is aten.gru.input else slice(rows, rows)
    strengths = []
    for part, sides in ((slice(0, apart.start), (0, 1)), (apart, (0,)), (apart, (1,))):
        kept_here = torch.cat([kept[s][part] for s in sides], 1)
        if not bool(kept_here.any()):
            continue
        y = sum((fed[s][:, part] for s in sides), torch.zeros(()))
        # Inputs may be of another size than states, which are below one; the pull is one number for both.
        sizes = [_size(seen[s], together) for s in sides]
        x = torch.cat([seen[s] / size for s, size in zip(sides, sizes, strict=True)], 1)
        matrix = torch.cat([old[s][part].float() * size for s, size in zip(sides, sizes, strict=True)], 1)
        shift = 2 + sides[0]  # of two biases that are summed, the first takes the mean
        intercept = cell.biases and free[shift]
        others = [2 + s for s in sides if cell.biases and not (intercept and 2 + s == shift)]
        y = y - sum((old[b][part].float() for b in others), torch.zeros(()))
        if not together.every(all(map(sums.finite, (x, y, matrix)))):
            return None
        made, outputs = _solve(x, y, matrix, kept_here, chooses, together, intercept=intercept)
        strengths.append(made.strength)
        columns = torch.split(made.weight[0], [old[s].shape[1] for s in sides], 1)
        for s, size, value in zip(sides, sizes, columns, strict=True):
            new[s][part] = (value / size).to(new[s].dtype)
        if made.bias is not None:
            inside = new[shift][part]
            inside[outputs] = torch.where(kept[shift][part][outputs], made.bias[0].to(inside.dtype), 0.0)
    if cell.projection is not None:
        hidden = _inside(cell, replace(pruned, weights=tuple(new)), at)
        p = cell.projection
        x = torch.cat([v[s].flatten(0, 1) for v, s in zip(hidden, drawn.steps, strict=True)]).float()[learn]
        y = torch.cat([v[s].flatten(0, 1) for v, s in zip(wanted, drawn.steps, strict=True)]).float()[learn]
        if not together.every(all(map(sums.finite, (x, y)))):
            return None
        made, _ = _solve(x, y, old[p].float(), kept[p], chooses, together, intercept=False)
        new[p] = made.weight[0].to(new[p].dtype)
        strengths.append(made.strength)
    return tuple(new), max(strengths, default=0.0), int(together.sum(int(learn.sum()))[0])


def _size(x: Tensor, together: Together) -> float:
    """The root of the mean square; 1 where all is zero."""
    squares, count = together.sum(sums.squares(x), x.numel())
    return math.sqrt(squares / max(count, 1)) or 1.0


def _solve(
    x: Tensor, y: Tensor, matrix: Tensor, kept: Tensor, held: Tensor, together: Together, *, intercept: bool
) -> tuple[regression.Fit, Tensor]:
    """The fit of a whole matrix, the same where it is masked, and which of its outputs (outputs,) are kept."""
    outputs, columns = kept.any(1), kept.any(0)
    if not torch.equal(kept, outputs.unsqueeze(1) & columns):
        return (
            regression.fit(
                x.unsqueeze(1),
                y.unsqueeze(1),
                matrix.unsqueeze(0),
                held,
                intercept=intercept,
                kept=kept.unsqueeze(0),
                together=together,
            ),
            torch.ones_like(outputs),
        )
    made = regression.fit(
        x[:, columns].unsqueeze(1), y[:, outputs].unsqueeze(1), matrix[outputs][:, columns].unsqueeze(0), held,
        intercept=intercept, together=together,
    )  # fmt: skip
    whole = matrix.clone()
    whole[outputs.nonzero(), columns.nonzero().flatten()] = made.weight[0]
    return replace(made, weight=whole.unsqueeze(0)), outputs


def _inside(cell: Cell, side: Side, given: list[Tensor]) -> list[Tensor]:
    """The units of an LSTM with a projection, which the operator does not give out, where it reads the states `given`:
    (steps, batch, units), by chunk.
    """
    made = []
    for x, y, initial in zip(side.x, given, side.initial, strict=True):
        fed = sum(_fed(side.weights, cell, x.float(), _before(cell, y, initial[0]).float()), torch.zeros(()))
        come, stay, value, out = fed.chunk(4, -1)
        come, new = come.sigmoid() * value.tanh(), torch.empty_like(value)
        kept, c = stay.sigmoid(), initial[1][0].float()
        for step in reversed(range(len(x))) if cell.reverse else range(len(x)):
            c = kept[step] * c + come[step]
            new[step] = c
        made.append(out.sigmoid() * new.tanh())
    return made
