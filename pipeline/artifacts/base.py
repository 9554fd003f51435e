"""What each stage hands to the next: one type per stage, each with exactly one producer, so the types are the wires.

An artifact is a folder of files plus `artifact.json`, the typed figures below. A stage writes it once; afterwards it is
only read. Accuracies are shares in 0..1, latencies milliseconds, sizes bytes, MACs multiply-accumulates per sample.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field

FIGURES = "artifact.json"


class Artifact(BaseModel):
    """Base: the folder that holds the files, and typed figures about them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    STAGE: ClassVar[str]
    """The stage that makes it, and the name of its folder in a version; `4-shrink` is made by `stages/s4_shrink.py`."""

    folder: Path = Field(exclude=True)

    def save(self) -> Self:
        """Write the figures beside the files."""
        (self.folder / FIGURES).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return self

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the figures that `save` wrote into `folder`."""
        figures: dict[str, Any] = json.loads((folder / FIGURES).read_text(encoding="utf-8"))
        return cls.model_validate({**figures, "folder": folder})

    def scalars(self) -> dict[str, int | float | str | bool]:
        """The scalar figures, for the manifest and for tables."""
        return {k: v for k, v in self.model_dump(mode="json").items() if isinstance(v, int | float | str | bool)}


class WidthChange(BaseModel):
    """One channel cluster: how many of its groups there were and how many stay."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cluster: str
    kind: str
    before: int
    after: int
    unit: int


def write_json(path: Path, value: object) -> None:
    """Write plain values as JSON that a person can read."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def write_table(path: Path, rows: Sequence[Any]) -> None:
    """Write rows of one type, dataclasses or pydantic models, as CSV, a column per field; empty without rows."""
    plain = [asdict(row) if is_dataclass(row) and not isinstance(row, type) else row.model_dump() for row in rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        if plain:
            writer = csv.DictWriter(file, list(plain[0]))
            writer.writeheader()
            writer.writerows(plain)
