"""From what the cards said to classes of atoms that go or stay together.

Solving: connected components over the ties; pins mark whole components; products are settled last, again and again:
  every factor pinned            -> pin the flat dimension
  the flat dimension pinned      -> pin the factors
  two places of the flat dimension tied, that differ along one factor only -> tie them in that factor
  all places of a factor tied    -> it cannot shrink: pin it
  exactly one factor free        -> tie the flat dimension to it along the others
  two or more free               -> the policy chooses (heads or head positions; else the factor of most classes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import fx

from pipeline.channels.operators.table import base_name
from pipeline.channels.operators.trace import Pin, Policy, Product, Role, Trace
from pipeline.channels.operators.values import PINNED, Atoms, Flags


@dataclass(frozen=True)
class Solution:
    """`class_of[atom]`: the atom's class. `reason_of[class]`: index into `pins`, or −1 = may go."""

    class_of: Atoms
    reason_of: Atoms
    pins: tuple[Pin, ...]

    def why(self, classes: Atoms) -> tuple[str, str, str]:
        """Why these classes stay: operator, node and reason of the most frequent pin ("-" where there is none)."""
        reasons = self.reason_of[classes]
        known = reasons[reasons >= 0]
        if not known.size or not self.pins:
            return "-", "-", "the recipe keeps this kind of group, or it is the only one of its kind"
        pin = self.pins[int(np.bincount(known).argmax())]
        op = "output" if pin.node.op == "output" else base_name(pin.node.target)
        return op, pin.node.name, pin.reason


def solve(t: Trace) -> Solution:
    """Classes and what is pinned, every product settled."""
    c = _Classes(t)
    waiting = list(t.products)
    while waiting:
        ties: list[Tie] = []
        still: list[Product] = []
        progress = False
        for product in waiting:
            step = _settle(c, product)
            progress |= step.settled or step.news
            ties += step.ties
            if not step.settled:
                still.append(product)
        c.merge(ties)
        if not progress and still:  # only a choice gets on from here; it may settle the others
            roles = classes_by_role(t, c.class_of, c.reason.shape[0])
            for product in _independent(c, still):
                _choose(c, product, roles, t.policy)
        waiting = still
    return c.solution()


Tie = tuple[Atoms, Atoms]
"""Classes to be joined pairwise."""


class _Classes:
    """Union of atoms, by repeated connected components; pinned classes carry the index of their first reason."""

    def __init__(self, t: Trace) -> None:
        self.class_of: Atoms = np.arange(t.count, dtype=np.int64)
        self.free = int(np.iinfo(np.int64).max)  # the "reason" of a class that may go: larger than any
        self.reason = np.full(t.count, self.free, np.int64)
        self.reason[PINNED] = -1
        self.pins = list(t.pins)
        self.merge(list(zip(t.left, t.right, strict=True)))
        for k, pin in enumerate(t.pins):
            self.pin(self.class_of[pin.atoms], k)

    def merge(self, ties: list[Tie]) -> None:
        """Join classes pairwise."""
        left = np.concatenate([np.zeros(0, np.int64), *(a for a, _ in ties)])
        right = np.concatenate([np.zeros(0, np.int64), *(b for _, b in ties)])
        size = self.reason.shape[0]
        if not left.size:
            return
        graph = coo_matrix((np.ones(left.shape[0], np.int8), (left, right)), shape=(size, size))
        count, label = connected_components(graph, directed=False)
        reason = np.full(count, self.free, np.int64)
        np.minimum.at(reason, label, self.reason)  # a joined class keeps the earliest reason to stay
        self.reason = reason
        self.class_of = label.astype(np.int64)[self.class_of]

    def pin(self, classes: Atoms, reason: int) -> None:
        """These classes stay because of `pins[reason]`, if not for an earlier one."""
        np.minimum.at(self.reason, classes, reason)

    def pin_for(self, classes: Atoms, node: fx.Node, reason: str) -> None:
        """These classes stay because of a relation between them, found only here."""
        self.pins.append(Pin(np.zeros(0, np.int64), node, reason))
        self.pin(classes, len(self.pins) - 1)

    def pinned(self, classes: Atoms) -> Flags:
        """Which of these classes stay."""
        pinned: Flags = self.reason[classes] != self.free
        return pinned

    def solution(self) -> Solution:
        """Everything as it stands."""
        reason = np.where(self.reason == self.free, -1, self.reason)
        always = self.class_of[PINNED]
        reason[always] = max(int(reason[always]), 0) if self.pins else 0
        return Solution(self.class_of, reason, tuple(self.pins))


@dataclass(frozen=True)
class _Step:
    """What one look at a product gave: whether it is settled, classes to tie, whether anything else became known."""

    settled: bool
    ties: tuple[Tie, ...] = ()
    news: bool = False


def _settle(c: _Classes, p: Product) -> _Step:
    """One step on one product: the rows of the table above, from the top, but for the last."""
    flat = c.class_of[p.flat].reshape(p.sizes)
    factors = [None if f is None else c.class_of[f] for f in p.factors]
    news = _pin_factors(c, flat, factors)
    free = [d for d, f in enumerate(factors) if f is not None and not c.pinned(f).all()]
    if not free:
        _pin_flat(c, p, flat, factors)
        return _Step(settled=True, news=True)
    if len(free) == 1:
        along = [1] * len(p.sizes)
        along[free[0]] = p.sizes[free[0]]
        only = factors[free[0]]
        assert only is not None
        spread = np.broadcast_to(only.reshape(along), p.sizes)
        return _Step(settled=True, ties=((flat.reshape(-1), np.ascontiguousarray(spread).reshape(-1)),))
    ties: list[Tie] = []
    for d in free:
        places = factors[d]
        assert places is not None
        if (places == places[0]).all():  # all or nothing
            c.pin_for(places, p.node, "its places are tied to one another")
            news = True
            continue
        ties += _ties_along(flat, places, d)
    return _Step(settled=False, ties=tuple(ties), news=news or bool(ties))


def _pin_factors(c: _Classes, flat: Atoms, factors: list[Atoms | None]) -> bool:
    """A flat index that stays keeps its place along every factor. Returns whether a place was not pinned before."""
    flat_pinned = c.pinned(flat)
    if not flat_pinned.any():
        return False
    news = False
    for d, f in enumerate(factors):
        if f is not None:
            others = tuple(k for k in range(flat.ndim) if k != d)
            hit = flat_pinned.any(axis=others) & ~c.pinned(f)
            if hit.any():
                c.pin(f[hit], int(c.reason[flat[flat_pinned]].min()))
                news = True
    return news


def _pin_flat(c: _Classes, p: Product, flat: Atoms, factors: list[Atoms | None]) -> None:
    """No factor may go, so no flat index may; the reason is the factors', if there are any."""
    rest = flat[~c.pinned(flat)]
    if not rest.size:
        return
    reasons = [int(c.reason[f].min()) for f in factors if f is not None]
    if not reasons:
        c.pins.append(Pin(p.flat, p.node, "merged from fixed dimensions"))
        reasons = [len(c.pins) - 1]
    c.pin(rest, max(min(reasons), 0))


def _ties_along(flat: Atoms, places: Atoms, d: int) -> list[Tie]:
    """Places of factor `d` at which the flat dimension holds one class, all other factors being equal."""
    # Sorted along d, equal classes lie side by side: neighbours that are equal tie their places.
    order = np.argsort(flat, axis=d, kind="stable")
    ordered = np.moveaxis(np.take_along_axis(flat, order, axis=d), d, 0)
    place = np.moveaxis(places[order], d, 0)
    tied = (ordered[1:] == ordered[:-1]) & (place[1:] != place[:-1])
    return [(place[1:][tied], place[:-1][tied])] if tied.any() else []


def _independent(c: _Classes, products: list[Product]) -> list[Product]:
    """The first product of every set that hangs together by classes that may still go.

    A choice in one set cannot touch another, so that one round chooses in them all: rounds do not grow with depth.
    """
    found = [
        np.concatenate([c.class_of[a].reshape(-1) for a in (p.flat, *p.factors) if a is not None]) for p in products
    ]
    rows = np.repeat(np.arange(len(products)), [f.shape[0] for f in found])
    classes = np.concatenate(found)
    free = ~c.pinned(classes)
    size = len(products) + c.reason.shape[0]
    links = coo_matrix(
        (np.ones(int(free.sum()), np.int8), (rows[free], len(products) + classes[free])), shape=(size, size)
    )
    _, label = connected_components(links, directed=False)
    _, first = np.unique(label[: len(products)], return_index=True)
    return [products[i] for i in np.sort(first)]


def classes_by_role(t: Trace, class_of: Atoms, count: int) -> dict[Role, Flags]:
    """Role -> which of `count` classes have it."""
    found: dict[Role, Flags] = {r: np.zeros(count, np.bool_) for r in get_args(Role)}
    for role, atoms in t.roles:
        found[role][class_of[atoms]] = True
    return found


def _choose(c: _Classes, p: Product, roles: dict[Role, Flags], policy: Policy) -> None:
    """Two or more factors could shrink: keep one free."""
    factors = {d: c.class_of[f] for d, f in enumerate(p.factors) if f is not None}
    free = [d for d, f in factors.items() if not c.pinned(f).all()]
    heads = [d for d in free if roles["head"][factors[d]].any()]
    positions = [d for d in free if roles["position"][factors[d]].any() and d not in heads]
    stay: int | None
    if positions and (heads or len(free) > len(positions)):
        others = heads or [d for d in free if d not in positions]
        stay = others[0] if policy.heads else positions[0] if policy.head_positions else None
    else:
        stay = max(free, key=lambda d: (np.unique(factors[d]).size, -d))
    what = "the other factor of the view goes instead" if stay is not None else "the recipe keeps heads and positions"
    for d in free:
        if d != stay:
            c.pin_for(factors[d], p.node, what)
