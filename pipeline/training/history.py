"""The figures of every epoch: as a table, as a plot."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Epoch:
    """Figures of one pass over the training part; accuracies are shares in 0..1."""

    epoch: int
    lr: float
    loss: float
    train_accuracy: float
    calibration_loss: float
    calibration_accuracy: float
    seconds: float


def history_csv(history: Sequence[Epoch], path: Path) -> None:
    """Write one row per epoch."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Epoch)])
        writer.writeheader()
        writer.writerows(asdict(one) for one in history)


def history_plot(history: Sequence[Epoch], best_epoch: int, path: Path) -> None:
    """Draw loss and accuracy over the epochs, the best one marked; the suffix decides the format (.svg, .png)."""
    epochs = [one.epoch for one in history]
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(epochs, [one.loss for one in history], label="training")
    left.plot(epochs, [one.calibration_loss for one in history], label="calibration")
    left.set(xlabel="epoch", ylabel="loss")
    right.plot(epochs, [100 * one.train_accuracy for one in history], label="training")
    right.plot(epochs, [100 * one.calibration_accuracy for one in history], label="calibration")
    right.set(xlabel="epoch", ylabel="accuracy, %")
    for axes in (left, right):
        if best_epoch:
            axes.axvline(best_epoch, linestyle=":", color="grey", label="kept")
        axes.legend()
    # A fixed salt and no date: the same history gives the same file.
    with mpl.rc_context({"svg.hashsalt": "leanort"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
