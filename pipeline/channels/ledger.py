"""What a removal did, as plain JSON: kept indices, rewritten constants, refusals.

With it a dense checkpoint of the same architecture is shrunk the same way again, a shrunk one is mapped back to full
size, and a person can ask which channels of a layer went, and why.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from foundation.errors import WeightsError

if TYPE_CHECKING:  # a stored ledger is read without torch
    from torch import Tensor

FORMAT = "leanort-ledger/1"


@dataclass(frozen=True)
class Refusal:
    """Groups of a cluster that stayed although they were asked to go."""

    cluster: str
    groups: tuple[int, ...]
    op: str
    node: str
    reason: str


@dataclass(frozen=True)
class Rewrite:
    """One constant of the graph that changed: the node, the argument, before and after."""

    node: str
    op: str
    argument: str
    before: Any
    after: Any


@dataclass(frozen=True)
class Fold:
    """Constant channels that went into a bias: `amounts` were added to `parameter`, one per index that it has left.

    `node`, an `op`, is the reader whose bias it is. `created`: the dense model has no such parameter, it was put in.
    `constants`: cluster name -> {group: the number that the reader saw in that channel}.
    """

    parameter: str
    op: str
    node: str
    created: bool
    amounts: tuple[float, ...]
    constants: Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Branch:
    """An addition that went because one side of it was zero: its `node`, the side that goes on (`kept`), the one that
    was `zero`, and the tensors that nothing reads any more.
    """

    node: str
    kept: str
    zero: str
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ledger:
    """One removal.

    `shapes`: tensor name -> shape before. `kept`: tensor name -> {dimension: kept indices}, only where something went.
    `groups`: cluster name -> groups that went. `spared`: cluster name -> groups that were to go and stayed, because a
    tensor would have become empty (half of a chunk, one input of a concatenation).
    `frozen`: tensors computed from parameters once, new name -> what they stand for.
    `folds`: constants of removed channels that went into biases.
    `branches`: whole branches that added nothing; their tensors are among `dropped`, and `kept` says what of them is
    not zero, for a class that cannot do without them.
    `dropped`: names of the dense state that the shrunk program no longer has. `rounded`: whether values that the
    dense graph computes on the fly (frozen weights, position tables) are stored, rounded to their own precision.
    """

    shapes: Mapping[str, tuple[int, ...]]
    kept: Mapping[str, Mapping[int, tuple[int, ...]]]
    groups: Mapping[str, tuple[int, ...]]
    rewrites: tuple[Rewrite, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    folds: tuple[Fold, ...] = ()
    frozen: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    rounded: bool = False
    spared: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    branches: tuple[Branch, ...] = ()

    def with_branches(self, whole: Ledger, branches: tuple[Branch, ...], inside: Mapping[str, int]) -> Ledger:
        """This ledger of a program without `branches`, for the dense model; `whole`: that of the program with them.
        `inside`: cluster -> groups, of those that went with the branches.
        """
        gone = {name for branch in branches for name in branch.tensors}
        groups = {name: tuple(range(size)) for name, size in inside.items()}
        return replace(
            self,
            shapes={**whole.shapes, **self.shapes},
            kept={**self.kept, **{name: where for name, where in whole.kept.items() if name in gone}},
            groups={**self.groups, **groups},
            dropped=tuple(dict.fromkeys((*self.dropped, *whole.dropped, *sorted(gone)))),
            branches=branches,
        )

    def to_json(self) -> str:
        """JSON text, keys sorted, no code in it."""
        data = {"format": FORMAT, **asdict(self)}
        return json.dumps(data, indent=1, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Ledger:
        """The ledger in `text`. Raises WeightsError where it is not one."""
        try:
            data = json.loads(text)
            if data.pop("format") != FORMAT:
                raise ValueError("another format")
            return Ledger(
                shapes={n: tuple(int(i) for i in s) for n, s in data["shapes"].items()},
                kept={
                    n: {int(d): tuple(int(i) for i in k) for d, k in dims.items()} for n, dims in data["kept"].items()
                },
                groups={n: tuple(int(i) for i in g) for n, g in data["groups"].items()},
                rewrites=tuple(Rewrite(**r) for r in data["rewrites"]),
                refusals=tuple(Refusal(**{**r, "groups": tuple(r["groups"])}) for r in data["refusals"]),
                folds=tuple(_fold(f) for f in data.get("folds", ())),
                frozen=dict(data["frozen"]),
                dropped=tuple(data["dropped"]),
                rounded=bool(data["rounded"]),
                spared={n: tuple(int(i) for i in g) for n, g in data.get("spared", {}).items()},
                branches=tuple(Branch(**{**b, "tensors": tuple(b["tensors"])}) for b in data.get("branches", ())),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(
                f"This is not a {FORMAT} ledger ({error}).", "Use the ledger.json of a shrink."
            ) from error

    def shrink_state(self, dense: Mapping[str, Tensor], *, constants: bool = True) -> dict[str, Tensor]:
        """A dense checkpoint of the same architecture, cut the same way (shapes are checked; values are the
        caller's to prove).

        `constants`: add what constant channels gave to biases, as this removal did; a state that `restore_state` gave
        has it in its biases already. Tensors that stand for a computation (`frozen`), or were created, are not made.
        """
        import torch

        shrunk: dict[str, Tensor] = {}
        for name, shape in self.shapes.items():
            if name in self.dropped:
                continue
            if name not in dense:
                raise WeightsError(f"The checkpoint has no '{name}'.", "Give one of the same architecture.")
            value = dense[name]
            if tuple(value.shape) != tuple(shape):
                raise WeightsError(
                    f"'{name}' has shape {tuple(value.shape)}, the ledger expects {tuple(shape)}.",
                    "Give a checkpoint of the same architecture.",
                )
            for dim, indices in self.kept.get(name, {}).items():
                value = value.index_select(dim, torch.tensor(indices, dtype=torch.long))
            shrunk[name] = value
        for fold in self.folds if constants else ():
            amounts = torch.tensor(fold.amounts, dtype=torch.float64)
            if not fold.created:
                held = shrunk[fold.parameter]
                shrunk[fold.parameter] = (held.to(torch.float64) + amounts).to(held.dtype)
        return shrunk

    def restore_state(self, shrunk: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A shrunk checkpoint at full size, zeros where channels went.

        It computes what the shrunk model does, constants included, as long as no bias had to be created for them
        (`folds`): the dense architecture has no place for such a bias, and that alone is lost.
        """
        import torch

        dense: dict[str, Tensor] = {}
        for name, shape in self.shapes.items():
            if name in self.dropped or name not in shrunk:
                continue
            value = shrunk[name]
            full = list(value.shape)
            for dim, indices in sorted(self.kept.get(name, {}).items()):
                full[dim] = shape[dim]
                wide = torch.zeros(full, dtype=value.dtype)
                value = wide.index_copy_(dim, torch.tensor(indices, dtype=torch.long), value)
            dense[name] = value
        return dense

    def why(self, name: str) -> dict[str, Any]:
        """What went from the layer or tensor `name`: per tensor and dimension the indices, the clusters,
        refusals, rewrites.
        """
        removed = {
            f"{tensor}[{dim}]": sorted(set(range(self.shapes[tensor][dim])) - set(indices))
            for tensor, dims in self.kept.items()
            if tensor == name or tensor.startswith(f"{name}.")
            for dim, indices in dims.items()
        }
        named = (*self.groups, *self.spared, *(r.cluster for r in self.refusals))
        mine = {c for c in named if c.partition("@")[0] == name}
        return {
            "removed": removed,
            "groups": {c: list(g) for c, g in self.groups.items() if c in mine},
            "refused": [asdict(r) for r in self.refusals if r.cluster in mine],
            "spared": {c: list(g) for c, g in self.spared.items() if c in mine},
            "folded": [
                asdict(f)
                for f in self.folds
                if f.parameter == name or f.parameter.rpartition(".")[0] == name or mine & set(f.constants)
            ],
        }


def _fold(data: Mapping[str, Any]) -> Fold:
    return Fold(
        parameter=str(data["parameter"]),
        op=str(data["op"]),
        node=str(data["node"]),
        created=bool(data["created"]),
        amounts=tuple(float(a) for a in data["amounts"]),
        constants={str(c): {int(g): float(v) for g, v in groups.items()} for c, groups in data["constants"].items()},
    )
