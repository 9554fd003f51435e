"""One weight that several operators read, fitted once over all of them.

A reader may take the weight W (outputs × columns) as it is, X Wᵀ, or turned, X W: an embedding's lookup is the second,
with rows of which a single number is one. What all readers leave together is least where A and B, the Gram matrices of
the two kinds, solve the Sylvester equation ΔW (A + λ) + B ΔW = C; without turned readers that is ridge regression.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pipeline.recovery import sums
from pipeline.recovery.contractions import Contraction, contraction, weight_of
from pipeline.recovery.regression import STRENGTHS
from pipeline.training.devices import ALONE, Together

aten = torch.ops.aten

TURNS = (aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default, aten.mT.default)
"""What brings the numbers of a weight into another order, before an operator reads it."""
LARGEST = 4096
"""Columns, and outputs but for lookups, of a weight with turned readers: the time goes with the cube."""


@dataclass(frozen=True)
class Use:
    """One reader: `found` is None for a lookup. `turned`: whether it takes the weight's transpose."""

    node: fx.Node
    found: Contraction | None
    turned: bool


@dataclass(frozen=True)
class Rows:
    """What one reader sees and should give: `x` (rows, columns) and `y` (rows, outputs) of W, or of Wᵀ where `turned`.

    `held`: (rows,) bool, the rows held back. `shift`: which bias takes the mean, None for none.
    """

    x: Tensor
    y: Tensor
    held: Tensor
    turned: bool
    shift: Hashable = None


@dataclass(frozen=True)
class Lookups:
    """How often each row of W is looked up, to learn from and held back (outputs,), and what should be found."""

    learnt: Tensor
    held: Tensor
    wanted: Tensor


@dataclass(frozen=True)
class TiedFit:
    """`weight` (outputs, columns), the new value of each `shift`, and the rest as in `regression.Fit`."""

    weight: Tensor
    shifts: dict[Hashable, Tensor]
    strength: float
    error_before: float
    error_after: float


def readers(placeholders: Sequence[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
    """Every operator that reads one of these nodes, as it is or turned, and the node that it reads it from."""
    found: list[tuple[fx.Node, fx.Node]] = []
    for held in placeholders:
        for user in held.users:
            found.extend(readers([user]) if user.target in TURNS else [(user, held)])
    return found


def uses(placeholders: Sequence[fx.Node], weight: Tensor) -> tuple[tuple[Use, ...], Tensor, str]:
    """The readers of a weight that is read several times or turned, with the reason where they cannot be fitted.

    The tensor says where in the flat weight the numbers of its form (groups, outputs, columns) are. No readers where
    the weight has one alone that takes it as it is, or none that contracts.
    """
    found = readers(placeholders)
    contracting = [(node, held) for node, held in found if weight_of(node) is held]
    order = torch.empty(0)
    if not contracting or (len(found) == 1 and contracting[0][1] in placeholders):
        return (), order, ""
    index = torch.arange(weight.numel(), dtype=torch.int32 if weight.numel() < 1 << 31 else torch.int64)
    made: list[Use] = []
    # The first contraction sets the form.
    for node, held in [*contracting, *(pair for pair in found if pair not in contracting)]:
        place = index.reshape(weight.shape)
        for turn in turns(held):
            target: Any = turn.target
            place = target(place, *turn.args[1:], **turn.kwargs)
        one = contraction(node, place) if (node, held) in contracting else None
        looked_up = node.target is aten.embedding.default and held in placeholders and node.args[0] is held
        if one is not None:
            form = one.to_matrix(place)
        elif looked_up and weight.dim() == 2:
            form = place.mT.unsqueeze(0)
        else:
            return (), order, f"{several(found)}, of which there is no rule for {node.target} ({node.name})"
        order = order if made else form
        if torch.equal(form, order):
            made.append(Use(node, one, turned=False))
        elif torch.equal(form.mT, order):
            made.append(Use(node, one, turned=True))
        else:
            return (), order, f"{several(found)}, and {node.name} in an order of its own"
    if any(use.turned for use in made):
        largest = max(order.shape[1:] if any(use.turned and use.found for use in made) else order.shape[2:])
        if largest > LARGEST:
            return (), order, f"{several(found)}, some of them turned, and it is too large for that ({largest:,})"
    return tuple(made), order.contiguous(), ""


def several(found: Sequence[Any]) -> str:
    """The start of a reason."""
    return "1 operator reads it turned" if len(found) == 1 else f"{len(found)} operators read it"


def turns(held: fx.Node) -> list[fx.Node]:
    """From the weight to `held`, in the order of their execution."""
    return [*turns(held.all_input_nodes[0]), held] if held.target in TURNS else []


def fit(parts: Sequence[Rows], lookups: Sequence[Lookups], weight: Tensor, together: Together = ALONE) -> TiedFit:
    """Fit `weight` (outputs, columns) to all readers; each counts alike, by the share of its targets' variance left.

    As in `regression.fit`, the strength of the pull is chosen on the rows held back, and the old weights stay where
    none leaves less of them. `together`: the processes that each have a part of the rows; `lookups` are those of all.
    Raises ValueError for values that are not finite, and where no row of a reader, or every
    one, is held back.
    """
    if any(judges in (0, rows) for rows, judges in (together.sum(len(p.held), int(p.held.sum())) for p in parts)):
        raise ValueError("rows have to be held back, and not all of them")
    if not together.every(all(sums.finite(v) for v in (weight, *(v for part in parts for v in (part.x, part.y))))):
        raise ValueError("what weights are fitted to has to be finite")
    old = weight.double()
    means = _means(parts, together)
    whole = any(part.turned for part in parts)
    learn, held = _System.empty(old, whole=whole), _System.empty(old, whole=whole)
    for part in parts:
        mean_x, mean_y = means[part.shift] if part.shift is not None else (0.0, 0.0)
        x, y = part.x - mean_x, part.y - mean_y
        rest = y - x @ (weight if part.turned else weight.mT).to(x.dtype)
        share = 1.0 / (together.sum(sums.squares(y))[0] or 1.0)
        for system, rows in ((learn, ~part.held), (held, part.held)):
            system.add(x[rows], y[rows], rest[rows], share, turned=part.turned)
    learn, held = learn.added(together), held.added(together)
    for one in lookups:
        wanted = one.wanted.double()
        spread = (wanted - wanted.mean(0)).square().sum(1)
        share = 1.0 / (float((one.learnt + one.held).double() @ spread) or 1.0)
        learn.look(one.learnt.double() * share, wanted - old, spread)
        held.look(one.held.double() * share, wanted - old, spread)
    before = best = held.left(torch.zeros_like(old))
    strength = 0.0
    solve = learn.solver()
    for candidate in STRENGTHS:
        left = held.left(solve(candidate))
        if left < best:
            best, strength = left, candidate
    new = old
    if strength:
        change = learn.joined(held).solver()(strength)
        if bool(change.isfinite().all()):
            new = old + change
        else:
            best, strength = before, 0.0
    shifts: dict[Hashable, Tensor] = {}
    for part in parts:
        if part.shift is not None:
            mean_x, mean_y = means[part.shift]
            value = new if part.turned else new.mT
            shifts[part.shift] = (mean_y.double() - mean_x.double() @ value).to(weight.dtype)
    return TiedFit(new.to(weight.dtype), shifts, strength, before, best)


def _means(parts: Sequence[Rows], together: Together) -> dict[Hashable, tuple[Tensor, Tensor]]:
    """Of what the readers with one shift see and should give, over all their rows."""
    made: dict[Hashable, tuple[Tensor, Tensor]] = {}
    for shift in {part.shift: None for part in parts if part.shift is not None}:
        same = [part for part in parts if part.shift == shift]
        count = together.sum(sum(len(part.x) for part in same))[0]
        mean_x, mean_y = (together.added(sum((sums.over(v, 0) for v in side), torch.zeros(()))) / count
                          for side in ([part.x for part in same], [part.y for part in same]))  # fmt: skip
        made[shift] = mean_x.float(), mean_y.float()
    return made


@dataclass
class _System:
    """Sums over rows: A, B (its diagonal alone where every turned reader is a lookup), C, and squares of what the old
    weights leave and of the targets. What ΔW leaves is a quadratic form of these.
    """

    straight: Tensor
    turned: Tensor
    product: Tensor
    rest: float = 0.0
    total: float = 0.0

    @classmethod
    def empty(cls, weight: Tensor, *, whole: bool) -> _System:
        outputs, columns = weight.shape
        turned = weight.new_zeros(outputs, outputs) if whole else weight.new_zeros(outputs)
        return cls(weight.new_zeros(columns, columns), turned, torch.zeros_like(weight))

    def add(self, x: Tensor, y: Tensor, rest: Tensor, share: float, *, turned: bool) -> None:
        """Rows of a reader, each square counted `share` times."""
        gram, product = (share * sums.products(one[None], x[None])[0] for one in (x, rest))
        if turned:
            self.turned += gram
            self.product += product.mT
        else:
            self.straight += gram
            self.product += product
        self.rest += share * sums.squares(rest)
        self.total += share * sums.squares(y)

    def look(self, counts: Tensor, lack: Tensor, spread: Tensor) -> None:
        """Each row of W `counts` times (outputs,), of which `lack` (outputs, columns) is missing."""
        self.turned += torch.diag(counts) if self.turned.dim() == 2 else counts
        self.product += counts.unsqueeze(1) * lack
        self.rest += float(counts @ lack.square().sum(1))
        self.total += float(counts @ spread)

    def added(self, together: Together) -> _System:
        """The sums over the rows of all processes."""
        straight, turned, product = (together.added(one) for one in (self.straight, self.turned, self.product))
        return _System(straight, turned, product, *together.sum(self.rest, self.total))

    def joined(self, other: _System) -> _System:
        """The sums over the rows of both."""
        return _System(
            self.straight + other.straight, self.turned + other.turned, self.product + other.product,
            self.rest + other.rest, self.total + other.total,
        )  # fmt: skip

    def left(self, change: Tensor) -> float:
        """Squares left by W + `change`, over those of the targets."""
        turned = self.turned @ change if self.turned.dim() == 2 else self.turned.unsqueeze(1) * change
        moved = change @ self.straight + turned - 2.0 * self.product
        return (self.rest + float((change * moved).sum())) / (self.total or 1.0)

    def solver(self) -> Callable[[float], Tensor]:
        """ΔW for a strength: λ is so much of the mean diagonals of A and B."""
        diagonal = self.turned.diagonal() if self.turned.dim() == 2 else self.turned
        load = max(float(self.straight.diagonal().mean() + diagonal.mean()), 1e-30)
        if not bool(diagonal.any()):
            unit = torch.eye(len(self.straight), dtype=torch.float64)

            def straight(strength: float) -> Tensor:
                factor = torch.linalg.cholesky(self.straight + strength * load * unit)
                change: Tensor = torch.cholesky_solve(self.product.mT, factor).mT
                return change

            return straight
        a, right = torch.linalg.eigh(self.straight)
        b, left = torch.linalg.eigh(self.turned) if self.turned.dim() == 2 else (self.turned, None)
        inside = (self.product if left is None else left.mT @ self.product) @ right
        # Rounding may leave a number below zero where there is none.
        weights = a.clamp_min(0).unsqueeze(0) + b.clamp_min(0).unsqueeze(1)

        def solve(strength: float) -> Tensor:
            change: Tensor = inside / (weights + strength * load)
            change = change @ right.mT
            return change if left is None else torch.matmul(left, change)

        return solve
