"""Weights of several readers over a walk: each one's rows are taken where it stands, and with the last comes the fit.

A reader that was passed has read the old weight, so that the new one is for the next walk. Where one reader alone takes
the weight turned, nobody has read it before, and the new one holds at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from pipeline.recovery import tied
from pipeline.recovery.contractions import whole_channels
from pipeline.recovery.fitted import NOT_FINITE, NOTHING_KEPT, TOO_FEW, Fitted, not_real, of_groups, without_samples
from pipeline.recovery.networks import Networks


@dataclass
class _Tie:
    """A weight of several readers, as far as they have been met."""

    key: Any
    held: fx.Node
    uses: tuple[tied.Use, ...]
    order: Tensor
    """Where in the flat weight the numbers of its matrices (groups, outputs, columns) are."""
    moved: bool = False
    """Whether any reader reads something changed."""
    reason: str = ""
    met: int = 0
    rows: list[tuple[tied.Use, Tensor, Tensor, Tensor]] = field(default_factory=list)
    lookups: list[Tensor] = field(default_factory=list)
    """For each, how often (learnt, held back) each row was looked up: (2, rows of the weight)."""


class SeveralReaders:
    """The weights that are fitted over all their readers.

    `settled`: what becomes of each in the next walk, by `Weights.key`; `new`: the values that it starts with, by name.
    """

    def __init__(self, networks: Networks) -> None:
        self.networks = networks
        self.settled: dict[Any, Fitted] = {}
        self.new: dict[str, Tensor] = {}
        self._uses: dict[fx.Node, tuple[_Tie, tied.Use]] = {}
        weights = networks.weights
        for key, (uses, order, _) in weights.shared.items():
            tie = _Tie(key, weights.placeholders[key][0], uses, order)
            self._uses.update({use.node: (tie, use) for use in uses})

    def meet(self, node: fx.Node, dense: list[Any], *, moved: bool) -> Fitted | None:
        """Take the rows of one reader; with those of the last one, fit the weight: for the next walk, or at once.

        `dense`: what `node` gives in the dense network, by chunk; `moved`: whether it reads something changed. None
        where the weight is not fitted yet, or for the next walk.
        """
        tie, use = self._uses[node]
        tie.met += 1
        tie.moved |= moved
        tie.reason = tie.reason or self._gather(tie, use, dense)
        if tie.met < len(tie.uses):
            return None
        made = self._finish(tie, use) if tie.moved else None
        tie.rows, tie.lookups = [], []
        return made

    def _finish(self, tie: _Tie, use: tied.Use) -> Fitted | None:
        """Fit the weight; None where that is for the next walk."""
        networks, names = self.networks, self.networks.weights.names
        name = names[tie.held.name]
        new: dict[fx.Node, Tensor] = {}
        made = Fitted(name, reason=tie.reason) if tie.reason else self._settle(tie, name, new)
        if len(tie.uses) > 1:
            self.settled[tie.key] = made
            self.new.update({names[node.name]: value for node, value in new.items()})
            return None
        for node, value in new.items():  # nobody has read the old one
            networks.put_weight(node, value)
        for turn in tied.turns(use.found.weight) if use.found else ():
            pruned = networks.call(turn, {n: networks.fixed[n][1] for n in turn.all_input_nodes})
            networks.fixed[turn] = [networks.fixed[turn][0], pruned]
        return made

    def _gather(self, tie: _Tie, use: tied.Use, dense: list[Any]) -> str:
        """Why the rows of one reader cannot be taken, "" where they are."""
        networks, samples, found = self.networks, self.networks.samples, use.found
        source = use.node.args[1] if found is None else found.x
        if not isinstance(source, fx.Node) or source not in networks.values:
            return f"what {use.node.name} reads does not depend on the samples"
        inputs = networks.values[source][1]
        if found is None:
            counts = torch.zeros(2, len(networks.fixed[tie.held][0]), dtype=torch.long)
            for at, tokens in enumerate(inputs):
                held = samples.held(at, len(tokens))
                for row, places in enumerate((tokens[~held], tokens[held])):
                    counts[row] += torch.bincount(places.flatten(), minlength=counts.shape[1])
            tie.lookups.append(samples.together.added(counts))
            return ""
        weight = networks.fixed[found.weight][1]
        reason = not_real(inputs[0], dense[0], weight) or without_samples(use.node, inputs[0], weight)
        if reason:
            return reason
        matrix = found.to_matrix(weight)
        x, y, of, _ = samples.rows(use.node, found, inputs, dense, matrix, networks.shelf, share=len(tie.uses))
        if not samples.finite(x, y):
            return NOT_FINITE
        held_back = samples.held_back[of]
        if not samples.usable(held_back):
            return TOO_FEW
        tie.rows.append((use, x, y, held_back))
        return ""

    def _settle(self, tie: _Tie, name: str, new: dict[fx.Node, Tensor]) -> Fitted:
        """Fit a weight to the rows of all its readers, and the biases that they alone read; put both into `new`."""
        fixed, weights, together = self.networks.fixed, self.networks.weights, self.networks.samples.together
        dense, old = fixed[tie.held]
        kept = weights.kept(tie.held).flatten()[tie.order]
        if not whole_channels(kept):
            return Fitted(name, reason=f"{tied.several(tie.uses)}, and single weights of it are masked")
        if not bool(kept.any()):
            return Fitted(name, reason=NOTHING_KEPT)
        matrix, wanted = old.flatten()[tie.order], dense.flatten()[tie.order]
        biases = {use.node: self._bias(tie, use) for use, *_ in tie.rows}
        new_biases = {bias: fixed[bias][1].clone().reshape(len(matrix), -1) for bias in biases.values() if bias}
        fits = []
        for group in kept.any(2).any(1).nonzero().flatten().tolist():
            outputs, columns = kept[group].any(1).nonzero().flatten(), kept[group].any(0).nonzero().flatten()
            parts = []
            for use, x, y, held in tie.rows:
                seen, given = (outputs, columns) if use.turned else (columns, outputs)
                bias = biases[use.node]
                parts.append(tied.Rows(x[:, group, seen], y[:, group, given], held, use.turned, bias))
            lookups = [
                tied.Lookups(learnt[outputs], held[outputs], wanted[group][outputs][:, columns])
                for learnt, held in tie.lookups
            ]
            made = tied.fit(parts, lookups, matrix[group][outputs][:, columns], together)
            matrix[group, outputs.unsqueeze(1), columns] = made.weight
            for use, *_ in tie.rows:
                bias = biases[use.node]
                if bias is not None:
                    new_biases[bias][group, columns if use.turned else outputs] = made.shifts[bias]
            fits.append(made)
        value = old.flatten().clone()
        value[tie.order.flatten()] = matrix.flatten()
        new[tie.held] = value.reshape(old.shape)
        for bias, shift in new_biases.items():
            shift = shift.flatten()
            new[bias] = weights.masked(bias, shift)
        rows = int(together.sum(sum(len(x) for _, x, _, _ in tie.rows))[0])
        return of_groups(name, rows, kept.any(1), fits)

    def _bias(self, tie: _Tie, use: tied.Use) -> fx.Node | None:
        """The bias of a reader where readers of the same weight alone read it, by its first node."""
        weights = self.networks.weights
        bias = use.found.bias if use.found else None
        if bias is None or bias.name not in weights.parameters:
            return None
        size = tie.order.shape[0] * tie.order.shape[2 if use.turned else 1]
        key = weights.key(bias)
        same = [o.found.bias for o in tie.uses if o.found and o.found.bias and o.found.bias.name in weights.names]
        same = [node for node in same if weights.key(node) == key]
        alone = len(same) == weights.readers[key]
        value = weights.dense[bias.name]
        return same[0] if alone and tuple(value.shape) == (size,) and value.is_floating_point() else None
