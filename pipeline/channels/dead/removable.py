"""Residual branches that may go as a whole: which there are, and what has to be masked so that each adds nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, fx

from pipeline.channels.coupling.analyse import analyse
from pipeline.channels.coupling.groups import Analysis
from pipeline.channels.dead.branches import ADDITIONS, out_of_place, zero_sides
from pipeline.channels.operators.table import bind, find

ArrayMasks = Mapping[str, npt.NDArray[np.bool_]]
"""Name of a tensor -> False where it is to be zero."""


@dataclass(frozen=True)
class Branch:
    """One side of the addition `node`: it adds nothing once the tensors of `masks` are zero as a whole, and then the
    clusters `inside` it are gone, too. `name`: what its tensors' modules have in common.
    """

    name: str
    node: str
    tensors: tuple[str, ...]
    inside: tuple[str, ...]

    def masks(self, state: Mapping[str, Tensor]) -> ArrayMasks:
        """Name -> False in every element."""
        return {name: np.zeros(tuple(state[name].shape), np.bool_) for name in self.tensors}


def removable(analysis: Analysis, maskable: frozenset[str]) -> tuple[Branch, ...]:
    """Every residual branch of the analysed program that may go, in its order: its last layer, norm and scale can be
    masked, nothing else reads them, and with these at zero the addition is proven to be its other side.
    """
    plain = out_of_place(analysis.captured)
    targets = plain.targets
    readers = _readers(plain.program.graph, targets)
    found: dict[str, Branch] = {}
    sides: dict[str, str] = {}
    for node in plain.program.graph.nodes:
        if node.op != "call_function" or node.target not in ADDITIONS or len(node.args) < 2:
            continue
        options = []
        for side in node.args[:2]:
            if isinstance(side, fx.Node) and (ends := _ends(side, targets)):
                own = _exclusive(side, node)
                if ends <= maskable and _only_read_in(own, ends, readers):
                    options.append((len(own), side, ends, own))
        if not options:
            continue
        _, side, ends, own = max(options, key=lambda option: option[0])
        inside = tuple(c.name for c in analysis.clusters if _only_read_in(own, (name for name, _ in c.labels), readers))
        if inside:
            found[node.name] = Branch(_common(ends), node.name, tuple(sorted(ends)), inside)
            sides[node.name] = side.name
    if not found:
        return ()
    folded = plain
    for branch in found.values():
        folded = folded.fold(branch.masks(plain.state))
    proven = {node.name: side.name for node, (_, side) in zero_sides(analyse(folded, analysis.policy)).items()}
    return tuple(branch for name, branch in found.items() if proven.get(name) == sides[name])


def _ends(side: fx.Node, targets: Mapping[str, str]) -> frozenset[str]:
    """The parameters that make `side` zero: of a scale, a norm and the layer before them; nothing where the walk back
    meets anything that zero does not pass through.
    """
    ends: set[str] = set()
    node: Any = side
    while isinstance(node, fx.Node) and node.op == "call_function":
        card = find(node.target)
        held = {name: targets[arg.name] for name, arg in _held(node, targets).items()}
        if card is not None and card.weighted is not None:
            return frozenset(ends | set(held.values())) if "weight" in held else frozenset()
        if card is not None and card.kind == "norm":
            affine = {name for key, name in held.items() if key in ("weight", "bias")}
            if len(affine) < 2:
                return frozenset()
            ends |= affine
        elif held and card is not None and str(node.target).startswith("aten.mul"):
            ends |= set(held.values())
        operands = [arg for arg in node.all_input_nodes if arg.name not in targets]
        if len(operands) != 1 or (held and not ends):
            return frozenset()
        node = operands[0]
    return frozenset()


def _held(node: fx.Node, targets: Mapping[str, str]) -> dict[str, fx.Node]:
    """Argument name -> placeholder, of the tensors that a node reads from the model."""
    try:
        arguments = bind(node)
    except (KeyError, TypeError, AttributeError):
        return {}
    return {key: arg for key, arg in arguments.items() if isinstance(arg, fx.Node) and arg.name in targets}


def _exclusive(side: fx.Node, addition: fx.Node) -> set[fx.Node]:
    """Nodes whose values lead to the addition through `side` only."""
    own = {side} if set(side.users) == {addition} else set()
    waiting = list(own)
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in own and source.op == "call_function" and set(source.users) <= own:
                own.add(source)
                waiting.append(source)
    return own


def _only_read_in(own: set[fx.Node], names: Iterable[str], readers: Mapping[str, set[fx.Node]]) -> bool:
    """Whether tensors are read by nodes of `own` alone; of a name that no placeholder has, nothing is known."""
    return all(name in readers and readers[name] <= own for name in names)


def _readers(graph: fx.Graph, targets: Mapping[str, str]) -> dict[str, set[fx.Node]]:
    """Name of a tensor -> the nodes that read it, under whatever placeholder."""
    found: dict[str, set[fx.Node]] = {}
    for node in graph.nodes:
        if node.name in targets:
            found.setdefault(targets[node.name], set()).update(node.users)
    return found


def _common(names: Sequence[str] | frozenset[str]) -> str:
    """The modules that all names lie in: layer3.2 of layer3.2.conv3.weight and layer3.2.bn3.bias."""
    paths = [name.split(".")[:-1] for name in sorted(names)]
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in same) or sorted(names)[0]
