"""Plots of what a stage found: zeros in each layer, a training's history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.artifacts.eager import Sparsity
from pipeline.training.history import Epoch
from validators.runners import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def sparsity_plot(layers: Sequence[Sparsity], path: Path) -> None:
    """Draw the share of zero weights per layer, as SVG; layers of many parameters only, since norms follow them."""
    from matplotlib.figure import Figure

    shown = [layer for layer in layers if len(layer.shape) > 1]
    figure = Figure(figsize=(7, max(1.5, 0.16 * len(shown) + 0.8)), layout="constrained")
    axes = figure.subplots()
    axes.barh([layer.parameter for layer in shown], [100 * layer.ratio for layer in shown])
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="zero weights, %")
    axes.tick_params(axis="y", labelsize=6)
    save(figure, path)


def history_plot(history: Sequence[Epoch], best_epoch: int, path: Path, score: str = "score") -> None:
    """Draw loss and `score` over the epochs, the best one marked; the suffix decides the format (.svg, .png)."""
    from matplotlib.figure import Figure

    epochs = [one.epoch for one in history]
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(epochs, [one.loss for one in history], label="training")
    left.plot(epochs, [one.calibration_loss for one in history], label="calibration")
    left.set(xlabel="epoch", ylabel="loss")
    right.plot(epochs, [one.train_score for one in history], label="training")
    right.plot(epochs, [one.calibration_score for one in history], label="calibration")
    right.set(xlabel="epoch", ylabel=score)
    for axes in (left, right):
        if best_epoch:
            axes.axvline(best_epoch, linestyle=":", color="grey", label="kept")
        axes.legend()
    save(figure, path)


def scatter_plot(predicted: Mapping[str, Array], path: Path) -> None:
    """Draw what "dense" and "shipped" predict over the "truth", each (points,)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.subplots()
    truth = predicted["truth"]
    ends = (float(truth.min()), float(truth.max()))
    axes.plot(ends, ends, color="grey", linewidth=1)
    for name, marker in (("dense", "o"), ("shipped", "x")):
        if name in predicted:
            axes.scatter(truth, predicted[name], s=10, marker=marker, alpha=0.6, linewidths=0.8, label=name)
    axes.set(xlabel="truth", ylabel="predicted")
    axes.legend()
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure, with a fixed salt and no date: the same figure gives the same file."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "leanort"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
