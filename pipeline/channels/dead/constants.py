"""Channels that hold one number whatever the input is, and the places where that number can go into a bias.

A norm whose scale is zero, or rows that are zero under a shift, leave a constant c in a channel; what is computed from
constants alone is constant too. A reader sums W·c over its inputs. Where that sum is one number per output channel,
the same for every sample and place, it is added to the reader's bias and the channel goes. It is not one number where
zero padding hides the channel at the border, where the channel meets another activation, or where it is normalised
over: there the channel stays, with the reason.

Whether an element depends on an input is decided by `dependence`, not by looking at outputs; the numbers themselves
are read off the same run, in float64.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from pipeline.channels.dead.dependence import follow
from pipeline.channels.operators.table import bind, find
from pipeline.channels.operators.trace import Contraction, Trace
from pipeline.channels.operators.values import Atoms, Flags, Value
from pipeline.channels.program.capture import Captured
from pipeline.channels.program.execute import feeds_of

Numbers = npt.NDArray[np.float64]

# Pooling and resizing average a constant with rounding; in float64 it stays far below this share of it.
SAME = 1e-12

BORDER = "a constant; zero padding makes its part in the sum differ at the border"
PLACES = "independent of the input, yet not the same at every place (padding before it)"
TAPS = "a constant; a transposed convolution adds it in differing amounts from place to place"
MEETS = "a constant that is multiplied with an activation here: no bias can stand for it"
AMONG = "a constant that is summed or normalised together with other channels here"
MIXED = "a constant up to here, where something that is not constant joins it"


@dataclass(frozen=True)
class Reader:
    """A node that sums over the channels in dimension `dim` of the activation `source`, times `weight` where given."""

    node: fx.Node
    source: fx.Node
    dim: int
    weight: fx.Node | None


@dataclass
class Survey:
    """What one run showed.

    `constant[(node, dim)]`: for every index its number, NaN where it is not one number. `fixed[(node, dim)]`: True
    where no input has a part in the slice. `weights`: full-size values of the readers' weights. `mixed[class]`: the
    node at which a class that was constant before stops being so. `fixed_classes`: classes that are constant, and
    not zero, in at least one activation.
    """

    trace: Trace
    class_of: Atoms
    constant: dict[tuple[fx.Node, int], Numbers] = field(default_factory=dict)
    fixed: dict[tuple[fx.Node, int], Flags] = field(default_factory=dict)
    weights: dict[fx.Node, Tensor] = field(default_factory=dict)
    mixed: dict[int, fx.Node] = field(default_factory=dict)
    fixed_classes: Flags = field(default_factory=lambda: np.zeros(0, np.bool_))

    def judge(self, contraction: Contraction) -> tuple[Flags, Flags, list[str]]:
        """(indices whose constant can go into a bias or is zero, indices that are constant, why the others cannot).

        The reasons are one per index, "" where there is none to give (the index is not constant at all).
        """
        size = contraction.atoms.shape[0]
        able, constant = np.zeros(size, np.bool_), np.zeros(size, np.bool_)
        reasons = [""] * size
        for reader in readers(contraction, self.trace):
            numbers, fixed = self.constant.get((reader.source, reader.dim)), self.fixed.get((reader.source, reader.dim))
            if numbers is None or fixed is None:
                continue
            why = _obstacles(self, reader, numbers.shape[0], alone=len(contraction.sides) == 1)
            known = ~np.isnan(numbers)
            okay = known & ((numbers == 0) | np.array([not w for w in why], np.bool_))
            groups = numbers.shape[0] // size  # a grouped convolution reads the same place of every group
            able |= okay.reshape(groups, size).all(axis=0)
            held = fixed.reshape(groups, size).all(axis=0)
            constant |= held
            for at in np.flatnonzero(held & ~able):
                flat = [at + g * size for g in range(groups)]
                reasons[at] = next((why[i] if known[i] else PLACES for i in flat if not okay[i]), "")
        return able, constant, reasons

    def shift(self, reader: Reader, gone: Flags) -> Shift | None:
        """What the channels flagged in `gone` give to the reader's sum; None where it is nothing."""
        held = self.constant[reader.source, reader.dim]
        numbers = np.where(gone & ~np.isnan(held), held, 0.0)
        if reader.weight is None or not numbers.any():
            return None
        w, c = self.weights[reader.node].to(torch.float64), torch.from_numpy(numbers)
        card = find(reader.node.target)
        assert card is not None
        weighted = card.weighted
        if weighted is not None and weighted.windows:
            taps = w.flatten(2).sum(-1)  # a convolution's [out, in of a group], transposed [in, out of a group]
            groups = bind(reader.node)["groups"]
            form = "gi,gio->go" if weighted.transposed else "gi,goi->go"
            amount = torch.einsum(form, c.reshape(groups, -1), taps.reshape(groups, -1, taps.shape[1])).reshape(-1)
            return Shift(amount, numbers)
        if w.dim() != 2:
            return None
        if weighted is not None:
            return Shift(w @ c, numbers)
        assert card.matrices is not None
        rows = reader.weight is reader.node.args[card.matrices[0]]  # weight · input
        return Shift(w @ c if rows else c @ w, numbers, rows)


@dataclass(frozen=True)
class Shift:
    """`amount`: float64, one number per output channel at full size. `constants`: c per index of the reader's source.

    `rows`: the output channel is the last dimension but one (weight · input), not the last.
    """

    amount: Tensor
    constants: Numbers
    rows: bool = False


def readers(contraction: Contraction, trace: Trace) -> list[Reader]:
    """The contraction as weight times activation: one for every activation side that a weight stands beside."""
    node = contraction.node
    card = find(node.target)
    if card is not None and card.weighted is not None and card.weighted.input_dim is not None:
        a = bind(node)
        source = a[card.weighted.input]
        x = trace.value(source)
        if x.derived or isinstance(a.get("groups"), fx.Node):  # weights of its own for every sample
            return []
        return [Reader(node, source, card.weighted.input_dim % len(x.shape), a[card.weighted.weight])]
    if card is not None and card.matrices is not None and len(contraction.sides) == 2:
        left, right = contraction.sides
        return [
            Reader(node, source, dim, weight)
            for (source, dim), (weight, _) in ((left, right), (right, left))
            if trace.value(weight).derived and not trace.value(source).derived
        ]
    return [Reader(node, s, d, None) for s, d in contraction.sides if not trace.value(s).derived]


def _obstacles(survey: Survey, reader: Reader, size: int, alone: bool) -> list[str]:
    """For every index, why its constant cannot go into a bias of the reader; "" where it can."""
    if reader.weight is None:
        return [AMONG if alone else MEETS] * size
    w = survey.weights[reader.node]
    card = find(reader.node.target)
    weighted = card.weighted if card is not None else None
    if weighted is None or not weighted.windows:
        return ["" if w.dim() == 2 else MEETS] * size
    if not weighted.transposed:
        return [BORDER if hidden else "" for hidden in _hidden(survey, reader, size)]
    a = bind(reader.node)
    plain = set(w.shape[2:]) == set(_each(a["stride"])) == {1} and not any(_each(a["padding"]))
    return ["" if plain else TAPS] * size


def _each(entry: Any) -> list[int]:
    return [entry] if isinstance(entry, int) else list(entry)


def _hidden(survey: Survey, reader: Reader, size: int) -> Flags:
    """Input channels of a convolution for which a weight that is not zero meets the zero padding at some place."""
    a, w = bind(reader.node), survey.weights[reader.node]
    space = survey.trace.shape(reader.source)[2:]
    kernel = tuple(w.shape[2:])
    rank = len(kernel)

    def per_dim(entry: Any) -> list[int]:
        given = _each(entry)
        return given * rank if len(given) == 1 else given

    stride, dilation = per_dim(a["stride"]), per_dim(a["dilation"])
    if a["padding"] == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        before, after = [t // 2 for t in total], [t - t // 2 for t in total]
    elif a["padding"] == "valid":
        before = after = [0] * rank
    else:
        before = after = per_dim(a["padding"])
    outside = []
    for d in range(rank):
        places = (space[d] + before[d] + after[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d]  # the last one
        taps = np.arange(kernel[d]) * dilation[d] - before[d]
        outside.append((taps < 0) | (taps + places * stride[d] >= space[d]))
    touches = np.array([any(outside[d][k] for d, k in enumerate(at)) for at in product(*map(range, kernel))])
    inside = w.shape[1]
    groups = size // inside
    weighs = (w != 0).reshape(groups, -1, inside, *kernel).any(dim=1).numpy()  # [groups, inside, *kernel]
    hidden: Flags = (weighs & touches.reshape(kernel)).reshape(size, -1).any(axis=1)
    return hidden


def survey(captured: Captured, trace: Trace, class_of: Atoms, contractions: Iterable[Contraction]) -> Survey:
    """Run `captured` once and see what is constant; `contractions` are those that will be judged."""
    watch = _Watch(captured, trace, class_of, contractions)
    follow(captured, watch.seen)
    return watch.found


class _Watch:
    """One run, tensor by tensor: what a survey keeps of it."""

    def __init__(self, captured: Captured, trace: Trace, class_of: Atoms, contractions: Iterable[Contraction]) -> None:
        self.found = Survey(trace, class_of, fixed_classes=np.zeros(int(class_of.max()) + 1, np.bool_))
        self.wanted: dict[fx.Node, set[int]] = {}  # activation -> dimensions whose numbers a reader needs
        self.weight_of: dict[fx.Node, list[fx.Node]] = {}  # weight -> its readers
        for contraction in contractions:
            for reader in readers(contraction, trace):
                self.wanted.setdefault(reader.source, set()).add(reader.dim)
                if reader.weight is not None:
                    self.weight_of.setdefault(reader.weight, []).append(reader.node)
        self.summing = {contraction.node for contraction in trace.contractions}
        self.feeds = feeds_of(captured.program, captured.example, captured.state)  # as they are, not in float64
        self.last_user = {source: user for user in captured.program.graph.nodes for source in user.all_input_nodes}
        self.constant_in: dict[fx.Node, Flags] = {}  # activation -> which classes are constant in it

    def seen(self, node: fx.Node, value: Tensor, depends: Tensor) -> None:
        """One tensor of the run."""
        for reader in self.weight_of.get(node, ()):
            self.found.weights[reader] = self.feeds[node.name] if node.op == "placeholder" else value.detach()
        known = self.found.trace.values.get(node)
        if not isinstance(known, Value) or known.derived or value.dim() != len(known.shape):
            return
        constant = np.zeros_like(self.found.fixed_classes)
        varying = np.zeros_like(constant)
        for dim, atoms in enumerate(known.atoms):
            if atoms is not None and atoms.shape[0] == value.shape[dim]:
                fixed, not_zero = self._slices(node, dim, value, depends)
                constant[self.found.class_of[atoms[not_zero]]] = True
                varying[self.found.class_of[atoms[~fixed]]] = True
        self.constant_in[node] = constant
        self.found.fixed_classes |= constant
        self._mixed(node, varying)

    def _slices(self, node: fx.Node, dim: int, value: Tensor, depends: Tensor) -> tuple[Flags, Flags]:
        """For every index of `dim`: whether no input has a part in it, and whether it is then not all zero.

        Where a reader needs them, the numbers are kept too.
        """
        others = [d for d in range(value.dim()) if d != dim]
        moves = depends.to(torch.uint8).amax(dim=others) if others else depends
        fixed: Flags = ~moves.bool().numpy()
        wanted = dim in self.wanted.get(node, ())
        if not fixed.any() and not wanted:
            return fixed, fixed
        low, high = (value.amin(others).numpy(), value.amax(others).numpy()) if others else (value.numpy(),) * 2
        if wanted:
            one = fixed & (high - low <= SAME * np.maximum(1.0, np.abs(high))) & np.isfinite(high)
            self.found.fixed[node, dim] = fixed
            # Averaging rounds: the middle, but an exact number as it is.
            self.found.constant[node, dim] = np.where(one, np.where(low == high, high, (low + high) / 2), np.nan)
        return fixed, fixed & ((low != 0) | (high != 0))

    def _mixed(self, node: fx.Node, varying: Flags) -> None:
        """Note classes that were constant in an operand and vary in the node, where that is no sum over them."""
        for source in node.all_input_nodes:
            before = self.constant_in.get(source)
            if before is not None and node not in self.summing:
                for cls in np.flatnonzero(before & varying):
                    self.found.mixed.setdefault(int(cls), node)
            if self.last_user[source] is node:
                self.constant_in.pop(source, None)


def shifts(found: Survey, contractions: Iterable[Contraction], gone: Flags) -> dict[fx.Node, tuple[Reader, Shift]]:
    """Reader node -> what it has to add once the atoms flagged in `gone` are away."""
    amounts: dict[fx.Node, tuple[Reader, Shift]] = {}
    for contraction in contractions:
        for reader in readers(contraction, found.trace):
            atoms = found.trace.value(reader.source).atoms[reader.dim]
            if reader.node in amounts or atoms is None or (reader.source, reader.dim) not in found.constant:
                continue
            shift = found.shift(reader, gone[atoms])
            if shift is not None and bool((shift.amount != 0).any()):
                amounts[reader.node] = reader, shift
    return amounts
