"""Masks become weights: hooks and originals are gone, the output is exactly that of the masked model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from foundation.errors import MaskError
from foundation.files import save_tensors
from pipeline.artifacts.base import write_table
from pipeline.artifacts.eager import Finetuned, Folded, Pruned
from pipeline.data.parts import Data
from pipeline.models.source import ModelSource, example
from pipeline.recipe.removal import FoldSection
from pipeline.training import masks


def run(cfg: FoldSection, out: Path, source: ModelSource, data: Data, pruned: Pruned, finetuned: Finetuned) -> Folded:
    """Multiply the masks in and prove it: bit-equal outputs on random and real inputs.

    Raises MaskError when the folded model differs, or a weight under a mask is not zero.
    """
    chosen = pruned.masks()
    model = source.build()
    model.load_state_dict(finetuned.weights())
    masks.apply(model, chosen)
    feeds = [example(source, batch=2, seed=cfg.seed), data.sample("calibration", 8)]
    before = [_outputs(model, feed) for feed in feeds]
    masks.fold(model)
    masks.check_held(model, chosen)
    after = [_outputs(model, feed) for feed in feeds]
    worst = max(
        _difference(a, b) for one, other in zip(before, after, strict=True) for a, b in zip(one, other, strict=True)
    )
    if worst != 0.0:
        raise MaskError(f"Folding changed the output by {worst:.3g}.", "Please report this model.")
    state = model.state_dict()
    save_tensors(state, out / Folded.WEIGHTS)
    write_table(out / "sparsity.csv", masks.sparsity({name: state[name] for name in chosen}))
    params = sum(p.numel() for p in model.parameters())
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    return Folded(
        folder=out,
        sparsity=zeros / params,
        zeros=zeros,
        params=params,
        score=finetuned.score,  # the outputs are the same, bit by bit
        max_abs_diff_to_masked=worst,
    )


def _difference(before: Tensor, after: Tensor) -> float:
    """The largest difference; NaN in both, such as the logarithm of a random negative number, is none."""
    apart = (before - after).abs()[(before != after) & ~(before.isnan() & after.isnan())]
    return float(apart.nan_to_num(nan=torch.inf).max()) if apart.numel() else 0.0


def _outputs(model: nn.Module, feed: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return [one for one in pytree.tree_leaves(model.eval()(*feed)) if isinstance(one, Tensor)]
