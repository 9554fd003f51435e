"""Recover the accuracy under the masks, taught by the data and by the dense model."""

from __future__ import annotations

from pathlib import Path

from foundation.files import save_tensors
from pipeline.artifacts.eager import Baseline, Finetuned, Pruned
from pipeline.data.parts import Data
from pipeline.drawing.plots import history_plot
from pipeline.models.source import ModelSource
from pipeline.progress import Progress
from pipeline.recipe.train import FinetuneSection
from pipeline.tasks import classification
from pipeline.training import loop, masks
from pipeline.training.defaults import default_settings
from pipeline.training.history import history_csv


def run(
    cfg: FinetuneSection,
    out: Path,
    source: ModelSource,
    data: Data,
    baseline: Baseline,
    pruned: Pruned,
    progress: Progress,
) -> Finetuned:
    """Train with the masks held through every step; the best epoch by calibration accuracy is kept.

    Resumes from the last epoch after a kill. Raises MaskError when a masked weight is not zero, TrainingError when the
    loss is not finite.
    """
    chosen = pruned.masks()
    model = source.build()
    model.load_state_dict(pruned.weights())
    masks.apply(model, chosen)
    section = {"distill_weight": cfg.distill_weight, "distill_temperature": cfg.distill_temperature}
    section |= {} if cfg.epochs is None else {"epochs": cfg.epochs}
    given = cfg.train.model_dump(exclude_unset=True) if cfg.train else {}
    settings = default_settings(model, recovery=True, seed=cfg.seed).model_copy(update=section | given)
    teacher = None
    if settings.distill_weight > 0:
        teacher = source.build()
        teacher.load_state_dict(baseline.weights())
    result = loop.train(
        model, data, settings, teacher=teacher, masks=chosen, checkpoint=out / "training.pt", progress=progress
    )
    history_csv(result.history, out / "history.csv")
    history_plot(result.history, result.best_epoch, out / "history.svg")
    (out / "training.pt").unlink(missing_ok=True)
    save_tensors(masks.originals(model), out / Finetuned.WEIGHTS)
    return Finetuned(
        folder=out,
        epochs=settings.epochs,
        best_epoch=result.best_epoch,
        accuracy=classification.evaluate(model, data, "test").accuracy,
        calibration_accuracy=result.best_accuracy,
        training_seconds=result.seconds,
    )
