"""Masks become weights: hooks and originals are gone, the output is exactly that of the masked model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from foundation.errors import MaskError
from foundation.files import save_tensors
from pipeline.artifacts.base import write_table
from pipeline.artifacts.eager import Finetuned, Folded, Pruned
from pipeline.data.parts import Data
from pipeline.models.calling import named
from pipeline.models.source import ModelSource, example
from pipeline.recipe.removal import FoldSection
from pipeline.tasks.evaluation import evaluate
from pipeline.tasks.task import Task
from pipeline.training import masks


def run(
    cfg: FoldSection, out: Path, source: ModelSource, data: Data, pruned: Pruned, finetuned: Finetuned, task: Task
) -> Folded:
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
    worst = max(_difference(a[name], b[name]) for a, b in zip(before, after, strict=True) for name in a)
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
        score=evaluate(task, model, data, "test").score,
        max_abs_diff_to_masked=worst,
    )


def _difference(before: Tensor, after: Tensor) -> float:
    """The largest difference; NaN in both, such as the logarithm of a random negative number, is none."""
    apart = (before - after).abs()[(before != after) & ~(before.isnan() & after.isnan())]
    return float(apart.nan_to_num(nan=torch.inf).max()) if apart.numel() else 0.0


def _outputs(model: nn.Module, feed: tuple[Tensor, ...]) -> dict[str, Tensor]:
    with torch.no_grad():
        return named(model.eval()(*feed))
