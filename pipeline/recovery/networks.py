"""Both networks side by side: the values of every node that somebody still reads, computed node by node."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from foundation.editor import writes
from pipeline.channels.program.execute import last_uses
from pipeline.recovery.rows import Samples
from pipeline.recovery.sampling import seed_of
from pipeline.recovery.shelf import Shelf
from pipeline.recovery.weights import Weights


class Networks:
    """The dense and the pruned network, as far as they have been computed.

    `values`: node -> [dense values, pruned values], each by chunk; where they are the same they are one list. `fixed`:
    parameters, buffers, constants, and what is computed from these alone -> [dense, pruned].
    """

    def __init__(self, weights: Weights, samples: Samples, shelf: Shelf) -> None:
        self.weights, self.samples, self.shelf = weights, samples, shelf
        self.values: dict[fx.Node, list[list[Any]]] = {}
        self.fixed: dict[fx.Node, list[Any]] = {}
        self._dies = last_uses(weights.graph)
        self._pruned = weights.pruned()
        self._inputs = 0

    def outlive(self, needed: Mapping[fx.Node, Iterable[fx.Node]]) -> None:
        """Keep what `needed` says of a node until that one is computed."""
        order = {node: at for at, node in enumerate(self.weights.graph.nodes)}
        last = {node: user for user, nodes in self._dies.items() for node in nodes}
        for reader, nodes in needed.items():
            for node in nodes:
                if order[last[node]] < order[reader]:
                    self._dies[last[node]].remove(node)
                    self._dies.setdefault(reader, []).append(node)
                    last[node] = reader

    def enter(self, node: fx.Node) -> None:
        """The value of a placeholder: a weight, or the next input."""
        # A graph may write into its inputs and its state; ours are no one else's.
        written = any(writes(user) for user in node.users)
        if node.name in self.weights.dense:
            sides = [self.weights.dense[node.name], self._pruned[node.name]]
            if written:
                sides = [v.clone() if isinstance(v, Tensor) else v for v in sides]
            self.fixed[node] = sides
            return
        column = [chunk[self._inputs] for chunk in self.samples.chunks]
        self._inputs += 1
        if written:
            column = [self.shelf.put(value.clone()) for value in column]
        self.values[node] = [column, column]

    def of_weights_alone(self, node: fx.Node) -> bool:
        """Whether nothing that `node` reads depends on the samples."""
        return all(source in self.fixed for source in node.all_input_nodes)

    def compute_fixed(self, node: fx.Node) -> None:
        """The value of a node of weights alone."""
        sources = node.all_input_nodes
        if all(self.fixed[s][0] is self.fixed[s][1] for s in sources):  # once: it may write into what both share
            value = self.call(node, {s: self.fixed[s][0] for s in sources})
            self.fixed[node] = [value, value]
            return
        first = self.fixed[sources[0]]
        if writes(node) and first[0] is first[1]:
            self.fixed[sources[0]] = [first[0], first[0].clone()]
        self.fixed[node] = [self.call(node, {s: self.fixed[s][side] for s in sources}) for side in (0, 1)]

    def moved(self, node: fx.Node) -> bool:
        """Whether `node` reads activations that differ."""
        return any(self.values[s][0] is not self.values[s][1] for s in node.all_input_nodes if s in self.values)

    def changed(self, node: fx.Node) -> bool:
        """Whether `node` reads anything that differs."""
        return self.moved(node) or any(
            self.fixed[s][0] is not self.fixed[s][1] for s in node.all_input_nodes if s in self.fixed
        )

    def part(self, node: fx.Node) -> None:
        """Where `node` writes into what both networks share, give the pruned one its own."""
        first = node.all_input_nodes[0] if node.all_input_nodes else None
        if writes(node) and first in self.values and self.values[first][0] is self.values[first][1]:
            shared = self.values[first][0]
            self.values[first] = [shared, [self.shelf.put(v.clone()) for v in shared]]

    def column(self, node: fx.Node, side: int, *, whole: bool) -> list[Any]:
        """What `node` gives on one side. What is read for the last time goes chunk by chunk, so that large activations
        of two nodes are never there at once; what both sides share only where this is the last side (`whole`).
        """
        values, made = self.values, []
        dying = [
            values[dead][side]
            for dead in self._dies.get(node, ())
            if dead in values and (whole or values[dead][0] is not values[dead][1])
        ]
        target: Any = node.target
        random = torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
        for chunk in range(len(self.samples.chunks)):
            if random:  # the same noise in both networks, in every run, and whichever process has the chunk
                torch.manual_seed(self.samples.seed + self.samples.first + chunk + seed_of(node.name))
            args = {s: values[s][side][chunk] if s in values else self.fixed[s][side] for s in node.all_input_nodes}
            value = self.call(node, args)
            made.append(self.shelf.put(value, move=not writes(node)))  # other nodes have what is written in place
            for used in args.values():
                self.shelf.rest(used)
            for column in dying:
                self.shelf.drop(column[chunk])
                column[chunk] = None
        return made

    def call(self, node: fx.Node, args: Mapping[fx.Node, Any]) -> Any:
        """What `node` gives for `args`. Raises ValueError where the operator does not take them."""
        target: Any = node.target
        positional = fx.node.map_arg(node.args, args.__getitem__)
        try:
            return target(*positional, **fx.node.map_arg(node.kwargs, args.__getitem__))
        except (RuntimeError, TypeError, IndexError) as error:
            raise ValueError(f"{node.name} cannot be run by itself: {str(error).splitlines()[0]}") from error

    def forget(self, node: fx.Node) -> None:
        """Drop what nobody reads after `node`."""
        for dead in self._dies.get(node, ()):
            gone = self.values.pop(dead, [])
            for column in gone if gone and gone[0] is not gone[1] else gone[:1]:
                for value in column:
                    self.shelf.drop(value)

    def put_weight(self, node: fx.Node, value: Tensor) -> None:
        """Give a parameter of the pruned network a new value, zero where it is masked."""
        value = self.weights.masked(node, value)
        self.weights.new[self.weights.names[node.name]] = value
        self.fixed[node] = [self.fixed[node][0], value]

    def put_pruned(self, node: fx.Node, values: list[Any]) -> None:
        """Give a node that has been computed other values in the pruned network."""
        dense, old = self.values[node]
        for value in old if old is not dense else ():
            self.shelf.drop(value)
        self.values[node] = [dense, [self.shelf.put(value) for value in values]]
