"""A stored version, read back as typed figures; nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pipeline.artifacts.base import Artifact
from pipeline.artifacts.eager import Baseline, Finetuned, Folded, Pruned
from pipeline.artifacts.program import Exported, Shrunk
from pipeline.artifacts.race import Optimized
from pipeline.artifacts.verdict import Validated
from pipeline.recipe import config
from pipeline.recipe.config import Config
from pipeline.release import records
from pipeline.release.records import Manifest

A = TypeVar("A", bound=Artifact)

ARTIFACTS: tuple[type[Artifact], ...] = (
    Baseline, Pruned, Finetuned, Folded, Shrunk, Exported, Optimized, Validated,
)  # fmt: skip
"""Everything that a version holds, in the order of its stages."""


@dataclass(frozen=True)
class Release:
    """A complete version: where it is, what it says about itself, and each stage's typed figures."""

    folder: Path
    manifest: Manifest
    artifacts: tuple[Artifact, ...]

    def __getitem__(self, kind: type[A]) -> A:
        """The artifact of one type: `release[Validated].verdict`."""
        return next(a for a in self.artifacts if isinstance(a, kind))

    @property
    def passed(self) -> bool:
        """Whether every required limit was met."""
        return self[Validated].verdict.outcome == "pass"


def open_release(version: Path) -> Release:
    """A stored version, read back. Raises StoreError when its manifest is damaged.

    `version` may be `artifacts/MODEL/current`: it is resolved once, here, so that all that is read through the answer
    is of one version, whatever is promoted meanwhile.
    """
    version = version.resolve() if version.is_symlink() else version
    made = records.read(version)
    return Release(version, made, tuple(kind.load(version / kind.STAGE) for kind in ARTIFACTS))


def recipe(release: Release) -> Config:
    """The recipe that a version was made from."""
    return config.load(release.folder / records.RECIPE)
