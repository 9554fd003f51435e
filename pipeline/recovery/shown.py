"""How much of a wrong output shows behind the activation that follows it.

Layers are fitted to what shows. Where a target is not the only value that is as good, it moves: to the nearest one that
is, for an activation that cuts (Zhang et al. 2015, arXiv:1411.4229), or by a step downhill, for one that is smooth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from pipeline.recovery import sums

Elementwise = Callable[[Tensor], Tensor]
"""From a tensor to one of its shape, each number by itself."""

_REACH, _PROBES = 8.0, 4097
"""Between which values, on both sides of 0, and at how many of them an activation is asked for its steepest slope."""


class Shown(Protocol):
    """Of targets (rows, groups, outputs, or in any other order) what shows of predictions that are not they."""

    def gap(self, off: Tensor) -> Tensor:
        """What shows of being `off` by so much, in the unit of the targets."""

    def gap_and_slope(self, off: Tensor) -> tuple[Tensor, Tensor]:
        """That, and how it changes with `off`."""

    def nearest(self, off: Tensor) -> Tensor:
        """Where targets may move to, so that squares to them fall with the squares of the gap at `off`."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Shown:
        """Of other targets: `change` takes them from these, or orders them anew."""


@dataclass(frozen=True)
class Cut:
    """Behind a ReLU, a ReLU6 or a clamp: beyond the cut one value is as good as another. `low`, `high`: between which
    values a prediction may lie off its target for nothing.
    """

    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, room: Tensor) -> Cut:
        """`room`: how far each target may move until it gets through. Positive: anywhere below that is as good,
        negative: anywhere above.
        """
        return cls(torch.where(room > 0, -math.inf, room), torch.where(room < 0, math.inf, room))

    def gap(self, off: Tensor) -> Tensor:
        """What lies beyond the room."""
        return off - self.nearest(off)

    def gap_and_slope(self, off: Tensor) -> tuple[Tensor, Tensor]:
        """Beyond the room it grows as `off` does."""
        beyond = self.gap(off)
        return beyond, (beyond != 0).to(beyond.dtype)

    def nearest(self, off: Tensor) -> Tensor:
        """As far as there is room."""
        return torch.clamp(off, self.low, self.high)

    def map(self, change: Callable[[Tensor], Tensor]) -> Cut:
        """Of other targets."""
        return Cut(change(self.low), change(self.high))


@dataclass(frozen=True)
class Curved:
    """Behind a SiLU, a hard swish or another `activation` that is flat in some places.

    `reads`, `gives`: what it does where targets are met. `unit`: how much of a target makes one of what it reads, 0
    where nothing of it arrives, and `inverse`; None where all of them are one. `steepest`: the largest slope, squared.
    """

    activation: Elementwise
    reads: Tensor
    gives: Tensor
    unit: Tensor | None
    inverse: Tensor | None
    steepest: float

    @classmethod
    def of(cls, activation: Elementwise, there: Tensor, unit: Tensor | None = None) -> Curved:
        """`there`: what the activation reads where targets are met, in the unit of the targets."""
        inverse = None if unit is None else torch.where(unit == 0, 0.0, 1 / unit)
        reads = there if inverse is None else there * inverse
        return cls(activation, reads, activation(reads), unit, inverse, _steepest(activation))

    def gap(self, off: Tensor) -> Tensor:
        """The difference behind the activation, taken back to the targets' unit."""
        return self._taken_back(self.activation(self._at(off)))

    def gap_and_slope(self, off: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the activation's slope."""
        value, slope = _with_slope(self.activation, self._at(off))
        return self._taken_back(value), slope

    def nearest(self, off: Tensor) -> Tensor:
        """A step down the squares of the gap, as long as the steepest slope allows."""
        gap, slope = self.gap_and_slope(off)
        return torch.addcmul(off, gap, slope, value=-1 / self.steepest)

    def map(self, change: Callable[[Tensor], Tensor]) -> Curved:
        """Of other targets."""
        unit, inverse = (None if one is None else change(one) for one in (self.unit, self.inverse))
        return replace(self, reads=change(self.reads), gives=change(self.gives), unit=unit, inverse=inverse)

    def _at(self, off: Tensor) -> Tensor:
        """What the activation reads of a prediction that is off."""
        return self.reads + off if self.inverse is None else torch.addcmul(self.reads, off, self.inverse)

    def _taken_back(self, value: Tensor) -> Tensor:
        """How far `value`, which is written into, is from what the activation should give."""
        gap = value.sub_(self.gives)
        return gap if self.unit is None else gap.mul_(self.unit)


def lacking(rest: Tensor, shown: Shown | None) -> float:
    """Squares of what predictions leave of their targets, or of what shows of it."""
    return sums.squares(rest if shown is None else shown.gap(-rest))


def _with_slope(activation: Elementwise, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the activation gives, and its derivative."""
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        value = activation(at)
        (slope,) = torch.autograd.grad(value, at, torch.ones((), dtype=value.dtype).expand_as(value))
    return value.detach(), slope


def _steepest(activation: Elementwise) -> float:
    """The largest slope of an activation that is flat or straight far from 0, squared."""
    _, slope = _with_slope(activation, torch.linspace(-_REACH, _REACH, _PROBES))
    return float(slope.square().max())
