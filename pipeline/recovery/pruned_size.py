"""Recover at the pruned price: with whole channels masked, the masked and the shrunk model are one function, so the
shrunk one is trained, and what it learnt is written back under the masks' other side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foundation.errors import RefusedError, first_line
from pipeline import channels
from pipeline.channels.coupling.analyse import analyse
from pipeline.channels.dead.liveness import liveness
from pipeline.channels.operators.trace import Policy
from pipeline.channels.program.capture import Captured
from pipeline.rebuilding.rebuild import rebuild
from pipeline.training import masks as masking
from pipeline.training.masks import Masks

Kept = Mapping[str, Mapping[int, tuple[int, ...]]]
"""Tensor -> dimension -> the indices that it has left, where some went."""


@dataclass(frozen=True)
class PrunedSize:
    """A smaller instance of a masked model's class, plain weights; `masks`: what is still masked within it."""

    model: nn.Module
    masks: Masks
    kept: Kept

    def write_back(self, masked: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Put `state`, of the smaller model by plain names, into `masked` in place; what lies under its masks stays."""
        known = masking.originals(masked)
        masking.load_originals(masked, {name: self._whole(name, known[name], state[name]) for name in known})

    def _whole(self, name: str, held: Tensor, part: Tensor) -> Tensor:
        if name not in self.kept:
            return part
        whole = held.detach().clone()
        whole[self._places(name, whole)] = part
        return whole

    def _places(self, name: str, tensor: Tensor) -> tuple[Tensor, ...]:
        """Indices that pick the part of a full tensor which is left."""
        left = self.kept[name]
        each = [torch.tensor(left.get(dim, range(size))) for dim, size in enumerate(tensor.shape)]
        return tuple(torch.meshgrid(*each, indexing="ij"))


def at_pruned_size(
    masked: nn.Module, dense: nn.Module, captured: Captured, masks: Masks, policy: Policy
) -> tuple[PrunedSize | None, str]:
    """(the smaller model to train in place of `masked`, in words how small) or (None, why the masked one is trained).

    `masked`: with `masks` on; it stays as it is. `dense`: the same model without them, plain, with any values; it gets
    those of `masked`. `captured`: its graph.
    """
    dense.load_state_dict(masking.originals(masked))
    captured = captured.with_state(dense.state_dict()).fold(masks)
    try:
        analysis = analyse(captured, policy)
        # What the masks remove, and not what happens to be zero now: that may still learn.
        alive = {name: torch.ones_like(captured.state[name]) for name in captured.program.graph_signature.parameters}
        live = liveness(analysis, captured.with_state(alive).fold(masks).state)
        shrunk = channels.shrink(captured, analysis, live.dead, refused=live.refusals)
    except RefusedError as error:
        return None, first_line(error)
    if not shrunk.ledger.kept:
        return None, "no whole channel is masked"
    if shrunk.ledger.folds:  # biases that training would move along with the constants in them
        return None, "constants of dead channels are in its biases"
    made, structure = rebuild(dense, captured, analysis, live.dead, shrunk, precise=False)  # stage 4 proves
    if made is None:
        return None, structure.why
    kept = {**shrunk.ledger.kept, **structure.kept}
    inner = {name: _part(mask, kept.get(name, {})) for name, mask in masks.items()}
    before, after = (sum(p.numel() for p in one.parameters()) for one in (dense, made))
    left = {name: mask for name, mask in inner.items() if not bool(mask.all())}
    under = {name: _part(dense.state_dict()[name], kept.get(name, {})) for name in left}
    made.load_state_dict({**made.state_dict(), **under})  # not the zeros that were folded in
    return PrunedSize(made, left, kept), f"{after:,} of {before:,} parameters"


def _part(tensor: Tensor, kept: Mapping[int, tuple[int, ...]]) -> Tensor:
    for dim, indices in kept.items():
        tensor = tensor.index_select(dim, torch.tensor(indices))
    return tensor
