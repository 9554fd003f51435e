"""One pass over the graph with both networks: each node is computed for all samples, and what it reads is fitted there.

What follows a fit is computed with the new weights, so that each fit makes up for what those before it left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pipeline.recovery import cells, one_reader, recurrent, scores, shifts, sums
from pipeline.recovery.fitted import Fitted
from pipeline.recovery.networks import Networks
from pipeline.recovery.rows import Samples
from pipeline.recovery.several_readers import SeveralReaders
from pipeline.recovery.shelf import Shelf
from pipeline.recovery.weights import Weights

Tick = Callable[[int, str], None]


@dataclass(frozen=True)
class Walked:
    """What a walk ends in.

    `state`: every parameter by name, with what was fitted. `left`: squares of what the outputs differ by, for the
    samples held back, over those of the dense ones. `settled`: what becomes of the weights of several readers in
    another walk, by `Weights.key`; `following`: the parameters which that one starts with, None where it has nothing
    to do.
    """

    state: Mapping[str, Tensor]
    fitted: tuple[Fitted, ...]
    left: float
    settled: Mapping[Any, Fitted]
    following: Mapping[str, Tensor] | None


class Walk:
    """Runs once. `fitted`: what became of the weights so far."""

    def __init__(self, weights: Weights, samples: Samples, shelf: Shelf) -> None:
        self.weights, self.samples = weights, samples
        self.networks = Networks(weights, samples, shelf)
        self.several = SeveralReaders(self.networks)
        self.fitted: list[Fitted] = []
        self._scores = scores.find(weights)
        self.networks.outlive({node: one.queries.needed() | one.keys.needed() for node, one in self._scores.items()})

    @torch.no_grad()
    def run(self, tick: Tick) -> Walked:
        """Compute, fit, forget, node by node. Raises ValueError where an operator does not take its operands."""
        left = 0.0
        for number, node in enumerate(self.weights.graph.nodes):
            if node.op == "output":
                left = self._left(node)
                break
            if node.op == "placeholder":
                self.networks.enter(node)
                continue
            if node.op != "call_function":
                raise ValueError(f"the graph holds a {node.op} node ({node.name}), which has no values of its own")
            tick(number, node.name)
            self.visit(node)
            self.networks.forget(node)
        state, several = self.weights.state, self.several
        following = state(several.new) if several.new else None
        fitted = (*self.fitted, *self.weights.unread())
        return Walked(state(self.weights.new), fitted, left, several.settled, following)

    def visit(self, node: fx.Node) -> None:
        """Compute one node on both sides, and fit what it reads in between."""
        networks = self.networks
        if networks.of_weights_alone(node):
            networks.compute_fixed(node)
            return
        moved, changed = networks.moved(node), networks.changed(node)
        together = node in self.weights.together
        if changed:
            networks.part(node)
            self._fit_before(node)
        dense = networks.column(node, 0, whole=not changed and not together)
        if together:
            made = self.several.meet(node, dense, moved=moved)
            self.fitted += [made] if made else []
        if not changed:
            networks.values[node] = [dense, dense]
            return
        if moved or one_reader.thinned(node, networks):
            self.fitted += one_reader.fit(node, dense, networks)
        pruned = networks.column(node, 1, whole=True)
        # A size is the same number in both, however they differ.
        alike = all(isinstance(v, int) for v in dense) and dense == pruned
        networks.values[node] = [dense, dense if alike else pruned]
        if node.target in shifts.NORMS:
            shifts.mend(node, networks)

    def _fit_before(self, node: fx.Node) -> None:
        """The fits that need what the dense network reads, which may be gone once `node` is computed."""
        if node.target in recurrent.GATES:
            self.fitted += cells.fit(node, self.networks)
        if node in self._scores:
            made, nearer = scores.fit(self._scores[node], self.networks)
            names = {one.name for one in made}
            if nearer:
                self.fitted = [one for one in self.fitted if one.name not in names]
            told = {one.name for one in self.fitted}
            self.fitted += [one for one in made if one.name not in told]

    def _left(self, output: fx.Node) -> float:
        """Squares of what the outputs lack on the samples held back, over those of the dense ones; the mean of them."""
        shares = []
        for node in output.all_input_nodes:
            wrong = total = 0.0
            for at, (dense, pruned) in enumerate(zip(*self.networks.values.get(node, [[], []]), strict=True)):
                if isinstance(dense, Tensor) and dense.dim() and dense.is_floating_point():
                    held = self.samples.held(at, len(dense))
                    wrong += sums.squares(pruned[held].double() - dense[held].double())
                    total += sums.squares(dense[held])
            wrong, total = self.samples.together.sum(wrong, total)
            shares.append(wrong / (total or 1.0))
        mean = sum(shares) / max(len(shares), 1)
        return mean if math.isfinite(mean) else math.inf
