"""The share of zeros in each layer, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from pipeline.artifacts.eager import Sparsity


def sparsity_plot(layers: Sequence[Sparsity], path: Path) -> None:
    """Draw the share of zero weights per layer, as SVG; layers of many parameters only, since norms follow them."""
    shown = [layer for layer in layers if len(layer.shape) > 1]
    figure = Figure(figsize=(7, max(1.5, 0.16 * len(shown) + 0.8)), layout="constrained")
    axes = figure.subplots()
    axes.barh([layer.parameter for layer in shown], [100 * layer.ratio for layer in shown])
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="zero weights, %")
    axes.tick_params(axis="y", labelsize=6)
    figure.savefig(path)
