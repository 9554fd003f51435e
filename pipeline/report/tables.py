"""The table and the plot that more than one stage writes."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from pydantic import BaseModel

from pipeline.training.masks import Sparsity


def write_table(path: Path, rows: Sequence[BaseModel | Sparsity]) -> None:
    """Write rows of one type as CSV, a column per field; an empty file where there are no rows."""
    plain = [_plain(row) for row in rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        if plain:
            writer = csv.DictWriter(file, list(plain[0]))
            writer.writeheader()
            writer.writerows(plain)


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


def _plain(row: BaseModel | Sparsity) -> dict[str, Any]:
    return asdict(row) if is_dataclass(row) else row.model_dump()
