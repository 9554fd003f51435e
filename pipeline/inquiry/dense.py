"""The dense model as a deploy would prune it, for questions that are asked before one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from pipeline.artifacts.eager import Baseline
from pipeline.models import plain, weights
from pipeline.models.source import ModelSource, example
from pipeline.recipe.source import BaselineSection
from pipeline.release.reuse import candidates
from pipeline.runner import Step


def dense_model(
    cfg: BaselineSection, source: ModelSource, folder: Path, steps: Sequence[Step]
) -> tuple[nn.Module, str]:
    """The model and where its weights come from, in words; "" where a deploy would have to train it first.

    `folder`: of the model's versions, `steps`: what a deploy would do with each stage; a baseline that it would reuse
    is read. Raises WeightsError as the baseline would.
    """
    (step,) = (one for one in steps if one.stage == Baseline.STAGE)
    if step.action == "reuse":
        place = next(path for path in candidates(folder, Baseline.STAGE) if path.parent.name == step.reason)
        model = source.build()
        model.load_state_dict(Baseline.load(place).weights())
        return model, f"the baseline of {step.reason}"
    pretrained = cfg.weights == "pretrained" or (cfg.weights == "auto" and source.origin.brings)
    if cfg.weights in ("auto", "train") and not pretrained:
        own = cfg.weights == "auto" and (not source.initial or weights.comes_with(source))
        return source.build(), "as given" if own else ""
    model = source.build_as_given()
    if pretrained:
        weights.load_pretrained(model, source)
    else:
        weights.load_weights(model, cfg.weights)
    plain.fold_checked(model, example(source), source.spec)
    return model, source.spec if cfg.weights == "auto" else cfg.weights
