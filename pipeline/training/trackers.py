"""The figures of each epoch in a tracker of the user's: TensorBoard, MLflow, W&B or Trackio, by Accelerate's own.

A tracker decides nothing, so it can stop nothing: it is spoken to from a thread of its own, and where it is not
installed, cannot be reached or fails, that is said once and training goes on.
"""

from __future__ import annotations

import importlib.util
import queue
import threading
from pathlib import Path
from typing import Any, Self

from foundation.errors import first_line
from pipeline.progress import Progress
from pipeline.recipe.train import TrainSettings
from pipeline.training.history import Epoch

PROJECT = "leanort"
FOLDER = Path("runs")
"""Where TensorBoard's files go, as by its own default."""
PATIENCE = 10.0
"""Seconds that the end of a run waits for what is still on its way."""
_MODULES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "mlflow": ("mlflow",),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}


class Nowhere:
    """No tracker."""

    def show(self, epoch: Epoch) -> None:
        """Hand on the figures of one epoch."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _Tracker(Nowhere):
    def __init__(self, name: str, run: str, settings: TrainSettings, progress: Progress) -> None:
        self.name, self.run, self.settings, self.progress = name, run, settings, progress
        self.waiting: queue.Queue[Epoch | None] = queue.Queue()
        self.failed = ""
        self.said = False
        self.thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self.thread.start()

    def show(self, epoch: Epoch) -> None:
        """Hand on the figures of one epoch."""
        self._say()
        self.waiting.put(epoch)

    def __exit__(self, *_: object) -> None:
        self.waiting.put(None)
        self.thread.join(PATIENCE)
        if self.thread.is_alive() and not self.failed:
            self.failed = f"it has not answered for {PATIENCE:g} s"
        self._say()

    def _say(self) -> None:
        if self.failed and not self.said:
            self.said = True
            self.progress.say(f"  {self.name} is not kept up to date: {self.failed}. Training goes on.")

    def _work(self) -> None:
        try:
            tracker = _opened(self.name, self.run)
            tracker.start()
            tracker.store_init_configuration(
                {name: value for name, value in self.settings.model_dump().items() if value is not None}
            )
            while (epoch := self.waiting.get()) is not None:
                tracker.log(_figures(epoch), step=epoch.epoch)
            tracker.finish()
        except BaseException as error:  # of a library that decides nothing here
            self.failed = f"{type(error).__name__}: {first_line(error)}"


def _opened(name: str, run: str) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        return kind(run, logging_dir=FOLDER / PROJECT)
    if name == "mlflow":
        return kind(PROJECT, run_name=run)
    return kind(PROJECT, **({"name": run} if name in ("wandb", "trackio") else {}))


def _figures(epoch: Epoch) -> dict[str, float]:
    return {
        "loss": epoch.loss,
        "score": epoch.train_score,
        "calibration_loss": epoch.calibration_loss,
        "calibration_score": epoch.calibration_score,
        "lr": epoch.lr,
        "seconds": epoch.seconds,
    }


def start(settings: TrainSettings, checkpoint: Path | None, progress: Progress) -> Nowhere:
    """The tracker of the settings; one that is not installed is said, and none."""
    name = settings.tracker
    if name is None:
        return Nowhere()
    if not any(importlib.util.find_spec(module) for module in _MODULES[name]):
        progress.say(f"  {name} is not installed: nothing is shown there. pip install {name}")
        return Nowhere()
    return _Tracker(name, _run_name(checkpoint), settings, progress)


def _run_name(checkpoint: Path | None) -> str:
    """Model and stage, as far as the folder tells: "resnet50 0-baseline"."""
    if checkpoint is None:
        return "training"
    stage = checkpoint.parent.name.removesuffix(".building")
    return f"{checkpoint.parent.parent.parent.name} {stage}".strip()
