"""The figures of every epoch."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Epoch:
    """Figures of one pass over the training part; a score is the one by which the task judges."""

    epoch: int
    lr: float
    loss: float
    train_score: float
    calibration_loss: float
    calibration_score: float
    seconds: float


def history_csv(history: Sequence[Epoch], path: Path) -> None:
    """Write one row per epoch."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Epoch)])
        writer.writeheader()
        writer.writerows(asdict(one) for one in history)
