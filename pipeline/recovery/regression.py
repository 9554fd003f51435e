"""Ridge regression pulled to given weights, its strength chosen on samples that were held back."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.recovery import sums
from pipeline.recovery.shown import Shown, lacking
from pipeline.training.devices import ALONE, Together

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
"""Of the mean diagonal of the Gram matrix: from hardly any pull to as strong as the data."""
HELD_BACK = 5
"""One sample in so many chooses the strength."""
CLOSE = 1e-4
"""Of the first residual: where conjugate gradients end. What a fit is uncertain by is a hundred times as much."""
MOST_STEPS = 30
"""Where it takes more, to end early is one more pull to the old weights, judged on the rows held back like the rest."""
FLAT = 1e-5
"""Of a column's largest value: who varies by no more is constant."""
ROUNDING = 1e-12
"""Of the targets' squares: old weights that leave no more are right, but for what float32 rounds by."""
TURNS = 12
"""Of targets and weights, where an activation follows; twenty leave 2 % less (MobileNetV2, a half of the MACs)."""


@dataclass(frozen=True)
class Fit:
    """Fitted `weight` (groups, outputs, columns) and `bias` (groups, outputs), None without an intercept.

    `error_before` and `error_after`: sums of squares left on the samples held back, over those of the centred targets.
    `strength`: the one chosen; 0 where the old weights were best.
    """

    weight: Tensor
    bias: Tensor | None
    strength: float
    error_before: float
    error_after: float


def fit(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    held: Tensor,
    *,
    intercept: bool,
    kept: Tensor | None = None,
    shown: Shown | None = None,
    together: Together = ALONE,
) -> Fit:
    """Weights W' that minimise ‖X W'ᵀ + b - Y‖² + s·d·‖W' - W‖² for each group, d the mean of the diagonal of XᵀX.

    `x`: (rows, groups, columns) float32, `y`: (rows, groups, outputs), `weight`: (groups, outputs, columns), `held`:
    (rows,) bool, True = held back. The strength s is the one of `STRENGTHS` whose fit on the other rows leaves the
    least on those; where none leaves less than the old weights do (with the mean mended), these stay. Solved in
    float64, in the smaller of the two spaces (columns, or rows where there are fewer of them). Hoerl & Kennard 1970.
    `kept`: bool like `weight`, where single weights are zero and stay so, other ones in every output (as in SparseGPT,
    Frantar & Alistarh 2023, arXiv:2301.00774); `weight` has to be zero there.
    `shown`: what of each output, (rows, groups, outputs), shows behind an activation. Then strengths are judged, and
    the errors told, by that; the old weights stay where neither the best linear fit, nor what is made of it, leaves
    less.
    `together`: the processes that each have a part of the rows; all that the fit needs of them are sums.
    Raises ValueError for values that are not finite, and where no row, or every one, is held back.
    """
    rows, judges = (int(n) for n in together.sum(len(held), int(held.sum())))
    if judges in (0, rows):
        raise ValueError("rows have to be held back, and not all of them")
    if not together.every(all(sums.finite(v) for v in (x, y, weight))):
        raise ValueError("what weights are fitted to has to be finite")
    if kept is None and rows - judges < weight.shape[2]:  # solved in the space of the rows, of which few are there
        joined = functools.partial(together.joined, dim=0)
        x, y, held = map(joined, (x, y, held))
        shown = shown and shown.map(joined)
        together = ALONE
    x, y = x.movedim(1, 0), y.movedim(1, 0)  # groups first
    learn = ~held
    old = weight.float()
    mean_x, mean_y = (
        (together.added(sums.over(v[:, learn], 1, keepdim=True)) / (rows - judges)).float() for v in (x, y)
    )
    if not intercept:
        mean_x, mean_y = torch.zeros_like(mean_x), torch.zeros_like(mean_y)
    xs, ys = x - mean_x, y - mean_y
    # What is left of a constant column once its mean is gone is rounding, and no ground for a weight.
    most, largest = (together.largest(_largest(v)) for v in (xs, x))
    xs = xs.masked_fill(most <= FLAT * largest, 0.0)
    rest = ys - xs @ old.mT  # what the old weights leave
    shown = shown and shown.map(lambda v: v.movedim(1, 0))
    judged = shown and shown.map(lambda v: v[:, held])
    scale, before = together.sum(sums.squares(ys[:, held]), lacking(rest[:, held], judged))
    scale = scale or 1.0
    before /= scale
    best, strength, taken = math.inf, 0.0, None
    solver = _Solver(xs[:, learn], rest[:, learn], kept, together)
    solved = zip(STRENGTHS, _solved(solver, weight, together), strict=True) if before > ROUNDING else ()
    for candidate, change in solved:
        left = together.sum(lacking(rest[:, held] - xs[:, held] @ change.mT, judged))[0] / scale
        if left < best:
            best, strength, taken = left, candidate, change
    given = None  # of the targets, to what is as good
    if shown is not None and taken is not None:
        change, shift = _by_what_shows(solver, strength, taken, shown.map(lambda v: v[:, learn]), intercept)
        left = together.sum(lacking(rest[:, held] - xs[:, held] @ change.mT - shift, judged))[0] / scale
        if left < best:
            best = left
            given = shown.nearest(xs @ change.mT - rest + shift)
    if not best < before:
        best, strength, given = before, 0.0, None
    new = weight.double()
    if strength:
        # The rows held back are learnt from as well, about the mean of all.
        change = solver.joined(xs, rest, held, centre=intercept).solve(strength, given)
        if bool(change.isfinite().all()):
            new = new + change
        else:
            best, strength, given = before, 0.0, None
    if given is not None:
        y = y + given
    bias = None
    if intercept:
        all_x, all_y = (together.added(sums.over(v, 1)) / rows for v in (x, y))
        bias = (all_y - (new @ all_x.unsqueeze(2)).squeeze(2)).to(weight.dtype)
    return Fit(new.to(weight.dtype), bias, strength, before, best)


def _by_what_shows(
    solver: _Solver, strength: float, change: Tensor, shown: Shown, intercept: bool
) -> tuple[Tensor, Tensor]:
    """The change of the weights, and the shift (groups, 1, outputs), that leave the least of what shows; begun at
    `change`.

    Each turn moves the targets to the nearest value that is as good as where the prediction lies, and solves again:
    squares to such targets lie above the loss and touch it (majorisation and minimisation, Zhang et al. 2015), here
    with the momentum of Beck & Teboulle 2009, doi:10.1137/080716542. Behind a smooth activation they are only near it
    where it bends and much is wrong; the rows held back say whether the turns helped.
    """
    together, x, rest = solver.together, solver.x, solver.rest
    rows = together.sum(x.shape[1])[0]
    shift = rest.new_zeros(rest.shape[0], 1, rest.shape[2])
    moved = ahead = (x @ change.mT).sub_(rest)
    pace = 1.0
    for _ in range(TURNS):
        given = shown.nearest(ahead)
        change = solver.solve(strength, given).float()
        if intercept:
            shift = together.added(given.sum(1, keepdim=True)) / rows
        last, moved = moved, (x @ change.mT).sub_(rest).add_(shift)
        faster = (1 + math.sqrt(1 + 4 * pace**2)) / 2
        ahead, pace = torch.lerp(last, moved, 1 + (pace - 1) / faster), faster
    return change, shift


def _solved(solver: _Solver, weight: Tensor, together: Together) -> Iterator[Tensor]:
    """The change of `weight` for each of `STRENGTHS`, which processes solve in turn, float32."""
    turns = [at % together.count for at in range(len(STRENGTHS))]
    own = {at: solver.solve(STRENGTHS[at]).float() for at, rank in enumerate(turns) if rank == together.rank}
    for at, rank in enumerate(turns):
        yield together.given(own.pop(at) if at in own else torch.empty(weight.shape), rank)


def _largest(x: Tensor) -> Tensor:
    """The largest value of each column, (groups, 1, columns); 0 where a process has no rows."""
    return x.abs().amax(1, keepdim=True) if x.shape[1] else x.new_zeros(x.shape[0], 1, x.shape[2])


class _Solver:
    """ΔW = Rᵀ X (XᵀX + λ)⁻¹ for several λ, of one X and R; with `kept`, the best ΔW that is zero elsewhere.

    In the space of the columns, X and R may lie in parts on several processes.
    """

    def __init__(self, x: Tensor, rest: Tensor, kept: Tensor | None = None, together: Together = ALONE) -> None:
        self.x, self.rest, self.kept, self.together = x, rest, kept, together
        self.dual = together.count == 1 and kept is None and x.shape[1] < x.shape[2]
        self.gram = (x @ x.mT).double() if self.dual else together.added(sums.products(x, x))
        traces = self.gram.diagonal(dim1=1, dim2=2).sum(1)  # the same in both spaces
        self.mean = (traces / x.shape[2]).clamp_min(1e-30)
        self.product = None if self.dual else together.added(sums.products(x, rest))
        self.factor: tuple[float, Tensor] | None = None
        self.middle: Tensor | None = None  # of the rows of X, that products are about

    def joined(self, x: Tensor, rest: Tensor, more: Tensor, *, centre: bool) -> _Solver:
        """The solver of all rows of `x` and `rest`, about their mean where `centre`; it knew those that are not `more`.

        The products of rows that it knew are not formed again.
        """
        if self.product is None:
            return _Solver(*((v - v.mean(1, keepdim=True) for v in (x, rest)) if centre else (x, rest)))
        made, added = copy.copy(self), self.together.added
        made.x, made.factor = x, None
        further, left = x[:, more], rest[:, more]
        made.gram = self.gram + added(sums.products(further, further))
        made.product = self.product + added(sums.products(further, left))
        if centre:
            rows = self.together.sum(x.shape[1])[0]
            mean_x, mean_rest = (added(sums.over(v, 1, keepdim=True)) / rows for v in (x, rest))
            made.gram = made.gram - rows * mean_x.mT @ mean_x
            made.product = made.product - rows * mean_x.mT @ mean_rest
            made.middle = mean_x
        made.mean = made.gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
        return made

    def solve(self, strength: float, more: Tensor | None = None) -> Tensor:
        """(groups, outputs, columns); the strength is raised tenfold while the matrix cannot be factored.

        `more`: what is added to the targets, like R.
        """
        if self.kept is not None:
            return self._sparse(strength, more)
        if self.factor is None or self.factor[0] != strength:
            self.factor = strength, self._factored(strength)
        factor = self.factor[1]
        if self.dual:
            rest = self.rest if more is None else self.rest + more  # whose mean does nothing where X is centred
            return (self.x.double().mT @ torch.cholesky_solve(rest.double(), factor)).mT
        return torch.cholesky_solve(self._product(more), factor).mT

    def _product(self, more: Tensor | None) -> Tensor:
        assert self.product is not None
        if more is None:
            return self.product
        added = self.together.added
        product: Tensor = self.product + added(sums.products(self.x, more))
        if self.middle is not None:
            product -= self.middle.mT @ added(sums.over(more, 1, keepdim=True))
        return product

    def _factored(self, strength: float) -> Tensor:
        factor: Tensor
        for _ in range(6):
            loaded = self.gram + (strength * self.mean).reshape(-1, 1, 1) * torch.eye(
                self.gram.shape[1], dtype=torch.float64
            )
            factor, failed = torch.linalg.cholesky_ex(loaded)
            if not bool(failed.any()):
                break
            strength *= 10
        return factor

    def _sparse(self, strength: float, more: Tensor | None) -> Tensor:
        """Every output has columns of its own: conjugate gradients for all outputs at once, so that the one Gram matrix
        serves them all (Hestenes & Stiefel 1952, preconditioned by the diagonal).
        """
        assert self.kept is not None
        gram = self.gram.float()  # in float64 a step takes twice as long, and finds nothing else
        load = (strength * self.mean).float().reshape(-1, 1, 1)
        scale = gram.diagonal(dim1=1, dim2=2).unsqueeze(1) + load
        change = torch.zeros_like(self.kept, dtype=torch.float32)
        left = torch.where(self.kept, self._product(more).mT.float(), 0.0)
        step = left / scale
        power = (left * step).sum(2, keepdim=True)
        enough = power.amax() * CLOSE**2
        for _ in range(MOST_STEPS):
            if not float(power.amax()) > float(enough):
                break
            moved = torch.where(self.kept, step @ gram + load * step, 0.0)
            length = power / (step * moved).sum(2, keepdim=True).clamp_min(1e-30)
            change += length * step
            left -= length * moved
            before, power = power, (left * left / scale).sum(2, keepdim=True)
            step = left / scale + power / before.clamp_min(1e-30) * step
        return change.double()
