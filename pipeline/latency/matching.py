"""Which operator of one measured model is which of another, and on which widths it hangs that a model has it.

Models of one network cut to other widths have nearly the same operators in nearly the same order, but not the same
names: exporter and runtime number them anew, and a norm over features that are gone needs operators beside it that one
over all of them does not.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.latency.sizes import Numbers

Flags = npt.NDArray[np.bool_]

SIZES, NAME = 0.5, 0.25
"""What a pair of one kind gains in an alignment where all sizes, or the names, are the same, beside 1 for the kind."""
CLOSE = 8
"""Operators between two that are one, at the most, where models run them in another order."""
OFTEN = 0.75
"""An operator counts as every model's when it is in at least this share of the measured ones."""
STRAY = 0.15
"""Share of the measured models that may contradict a rule by which others have an operator or not."""


@dataclass(frozen=True)
class Operator:
    """One of the runtime's operators as it was measured, `share` of the dense model's time."""

    name: str
    kind: str
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    share: float

    @property
    def letter(self) -> Hashable:
        """What no width changes: the kind, how many dimensions its tensors have, a convolution's kernel."""
        kernels = [shape[2:] for shape in self.inputs[1:] if len(shape) > 2] if "Conv" in self.kind else []
        return self.kind, tuple(map(len, self.inputs)), tuple(map(len, self.outputs)), *kernels[:1]

    @property
    def numbers(self) -> list[int]:
        """All sizes, one after another."""
        return [size for shape in (*self.inputs, *self.outputs) for size in shape]


Seen = list[tuple[int, Operator]]
"""One operator in all models that have it: (number of the model, how it was measured there)."""


def matched(models: Sequence[Sequence[Operator]]) -> list[Seen]:
    """The operators of all `models`, each given in the order in which it runs them, and in which of them each is."""
    columns: list[Seen] = []
    for number, operators in enumerate(models):
        columns = joined(columns, number, operators)
    return columns


def joined(
    columns: Sequence[Seen], number: int, operators: Sequence[Operator], stays: Sequence[bool] | None = None
) -> list[Seen]:
    """`columns` with the operators of model `number`, in the order in which it runs them. It has none of those columns
    that do not `stay`, where that is known: of blocks that look alike, a model without branches has the others.
    """
    places = [at for at in range(len(columns)) if stays is None or stays[at]]
    first = [columns[at][0][1] for at in places]
    found = dict(_alignment(first, operators))
    taken = set(found.values())
    by_name = {(o.name, o.letter): at for at, o in enumerate(operators) if at not in taken}
    for at, one in enumerate(first):  # in another order, but by the same name
        if at not in found:
            same = by_name.pop((one.name, one.letter), None)
            if same is not None:
                found[at] = same
    found |= _near(first, operators, found)
    pairs = {places[at]: there for at, there in found.items()}
    new = sorted(set(range(len(operators))) - set(pairs.values()))
    made: list[Seen] = []
    for at, column in enumerate(columns):
        here = pairs.get(at)
        if here is None:
            made.append(column)
            continue
        while new and new[0] < here:
            made.append([(number, operators[new.pop(0)])])
        made.append([*column, (number, operators[here])])
    return made + [[(number, operators[at])] for at in new]


def _near(first: Sequence[Operator], second: Sequence[Operator], pairs: Mapping[int, int]) -> dict[int, int]:
    """Pairs of what is in none of `pairs`, of one letter and close to each other: which of two branches runs first
    hangs on what the widths let the runtime do with each, and an alignment keeps the order.
    """
    if not pairs:
        return {}
    waiting: dict[Hashable, list[int]] = {}
    for at, one in enumerate(first):
        if at not in pairs:
            waiting.setdefault(one.letter, []).append(at)
    at_number = dict(sorted((number, at) for at, number in pairs.items()))
    numbers, places = list(at_number), list(at_number.values())
    options = [
        (away, at, number)
        for number, one in enumerate(second)
        if number not in at_number
        for at in waiting.get(one.letter, ())
        if (away := abs(at - float(np.interp(number, numbers, places)))) <= CLOSE
    ]
    found: dict[int, int] = {}
    for _, at, number in sorted(options):
        if at not in found and number not in found.values():
            found[at] = number
    return found


def _alignment(first: Sequence[Operator], second: Sequence[Operator]) -> list[tuple[int, int]]:
    """Pairs of the same operator, in the order of both, with the largest sum of likenesses (Needleman and Wunsch 1970,
    gaps free).
    """
    alike = np.zeros((len(first), len(second)))
    letters: dict[Hashable, tuple[list[int], list[int]]] = {}
    for side, operators in enumerate((first, second)):
        for at, one in enumerate(operators):
            letters.setdefault(one.letter, ([], []))[side].append(at)
    names = [np.array([one.name for one in operators]) for operators in (first, second)]
    for rows, columns in letters.values():
        if rows and columns:
            sizes = [np.array([side[at].numbers for at in own]) for side, own in ((first, rows), (second, columns))]
            same = (sizes[0][:, None] == sizes[1]).mean(axis=-1) if sizes[0].shape[1] else 1.0
            named = names[0][rows][:, None] == names[1][columns]
            alike[np.ix_(rows, columns)] = 1 + SIZES * same + NAME * named
    best = np.zeros((len(first) + 1, len(second) + 1))
    for at, row in enumerate(alike, start=1):
        both = np.where(row > 0, best[at - 1, :-1] + row, 0.0)
        best[at, 1:] = np.maximum.accumulate(np.maximum(best[at - 1, 1:], both))
    pairs = []
    a, b = len(first), len(second)
    while a and b:
        if alike[a - 1, b - 1] and best[a, b] == best[a - 1, b - 1] + alike[a - 1, b - 1]:  # of equals the last
            a, b = a - 1, b - 1
            pairs.append((a, b))
        elif best[a, b] == best[a - 1, b]:
            a -= 1
        else:
            b -= 1
    return pairs[::-1]


@dataclass(frozen=True)
class Where:
    """Which choices of widths have an operator: those that keep cluster number `of` whole, or, without `whole`, those
    that do not; all where `of` is None.
    """

    of: int | None = None
    whole: bool = True

    def at(self, whole: Flags) -> Flags:
        """(choices, clusters) whether a cluster is whole -> (choices,)."""
        if self.of is None:
            return np.ones(len(whole), np.bool_)
        found: Flags = whole[:, self.of] == self.whole
        return found


class BranchClusters(NamedTuple):
    """A residual branch that may go as a whole: the numbers of the `clusters` inside it, and the program's dimension
    number `of` that is zero once it is gone.
    """

    clusters: frozenset[int]
    of: int


@dataclass(frozen=True)
class WithBranch:
    """Operators that no width of a branch tells of, but that go with it, as an addition does: they are there as long as
    dimension number `of` is not zero, or, without `present`, only where it is; always where `of` is None.
    """

    of: int | None = None
    present: bool = True

    def at(self, dimensions: Numbers) -> Flags:
        """(choices, dimensions) -> (choices,)."""
        if self.of is None:
            return np.ones(len(dimensions), np.bool_)
        found: Flags = (dimensions[:, self.of] > 0) == self.present
        return found


def nearest(at: int, followed: Sequence[frozenset[int]], branches: Sequence[BranchClusters]) -> int | None:
    """The dimension of the branch whose clusters the operators nearest to number `at` follow; of two that are as near
    the one before. `followed`: the clusters that the sizes of each operator follow.
    """
    for number in sorted(range(len(followed)), key=lambda n: abs(n - at)):
        for branch in branches:
            if followed[number] & branch.clusters:
                return branch.of
    return None


def where(present: Flags, whole: Flags) -> tuple[Where, ...]:
    """The rules, equally good, by which measured models have an operator, `present` (models,), given which clusters are
    `whole` (models, clusters); none where none holds, and most do not have it.
    """
    always = int((~present).sum())
    if not always:
        return (Where(),)
    wrong = np.concatenate([(present[:, None] != whole).sum(axis=0), (present[:, None] == whole).sum(axis=0)])
    if wrong.size and wrong.min() < always and wrong.min() <= STRAY * len(present):
        clusters = whole.shape[1]
        return tuple(Where(int(at) % clusters, bool(at < clusters)) for at in np.flatnonzero(wrong == wrong.min()))
    return (Where(),) if always <= (1 - OFTEN) * len(present) else ()


def likeliest(rules: Sequence[Where], at: int, followed: Sequence[frozenset[int]]) -> Where:
    """Of equally good `rules` for operator number `at` the one of a cluster that the operators nearest to it follow;
    `followed`: the clusters that the sizes of each operator follow.
    """
    by_cluster = {rule.of: rule for rule in reversed(rules)}
    nearest = sorted(range(len(followed) if len(rules) > 1 else 0), key=lambda n: abs(n - at))
    found = (cluster for n in nearest for cluster in sorted(followed[n]) if cluster in by_cluster)
    return by_cluster[next(found, rules[0].of)]
