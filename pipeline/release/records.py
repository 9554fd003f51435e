"""What a version says about itself: every stage's inputs and outputs by digest, tools, host, commit."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from foundation.errors import StoreError, first_line
from foundation.files import sha256
from pipeline.recipe.section import Section
from pipeline.release import store

MANIFEST = store.MANIFEST
SEAL = "manifest.sha256"
"""The manifest's own digest, in the form that `sha256sum --check` reads."""
RECIPE = "config.toml"
RECORD = "stage.json"


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Plain):
    """One file of a stage."""

    sha256: str
    bytes: int


class StageRecord(_Plain):
    """One stage: what it read, what it wrote, and the fingerprint under which it can be reused."""

    stage: str
    fingerprint: str
    section: str = Field("", description="digest of the stage's section of the recipe, own files named in it included")
    inputs: dict[str, str] = Field(description="producer -> digest of what it wrote")
    files: dict[str, FileRecord]
    seconds: float
    metrics: dict[str, int | float | str | bool]

    @property
    def digest(self) -> str:
        """Digest of everything that the stage wrote."""
        return digest({name: file.sha256 for name, file in sorted(self.files.items())})


class Manifest(_Plain):
    """A whole version."""

    project: str
    name: str = Field(description="the model's folder below the artifacts folder")
    model: str = Field(description="the spec that it was built from")
    version: str
    created: datetime
    model_fingerprint: str
    data_fingerprint: str
    recipe: str = Field(description="sha256 of config.toml")
    stages: tuple[StageRecord, ...]
    reused: dict[str, str] = Field(description="stage -> the version it was taken from")
    files: dict[str, FileRecord] = Field(description="files outside the stages: reports")
    parents: dict[str, str] = Field({}, description="what this version came from, by digest")
    tools: dict[str, str]
    host: dict[str, str]
    git: dict[str, str]
    request: str = Field("", description="digest of all that was asked for, where that is known beforehand")


def digest(value: object) -> str:
    """sha256 of a JSON-able value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def section_digest(cfg: Section) -> str:
    """Digest of one section of a recipe and of the user's own files that it names."""
    return digest(cfg.model_dump(mode="json") | cfg.code())


def recipe_digest(sections: Iterable[str]) -> str:
    """Digest of the choices that led to an exported file: the `section_digest` of every stage up to the export.

    Neither timings nor hosts are in it, nor what is chosen afterwards: the same choices give the same bytes.
    """
    return digest(list(sections))


def record_files(folder: Path, skip: tuple[str, ...] = (RECORD,)) -> dict[str, FileRecord]:
    """Size and digest of every file below `folder` but those named in `skip`."""
    return {
        name: FileRecord(sha256=sha256(path), bytes=path.stat().st_size)
        for name, path in store.files_in(folder).items()
        if name not in skip
    }


def read_stage(folder: Path) -> StageRecord | None:
    """The record of a completed stage; None where the stage never completed."""
    try:
        return StageRecord.model_validate_json((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None


def read(version: Path) -> Manifest:
    """The manifest of a version; StoreError when it is missing or damaged."""
    try:
        return Manifest.model_validate_json((version / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise StoreError(f"The manifest of {version} cannot be read: {first_line(error)}.", "Deploy again.") from None


def write(version: Path, manifest: Manifest) -> None:
    """Write a manifest, and its digest beside it, so that no line of it can change unseen."""
    (version / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (version / SEAL).write_text(f"{sha256(version / MANIFEST)}  {MANIFEST}\n", encoding="utf-8")


def seal_of(version: Path) -> str:
    """The sha256 of a version's manifest."""
    return sha256(version / MANIFEST)


def read_if_whole(version: Path) -> Manifest | None:
    """The manifest of a version; None when it is missing or damaged."""
    try:
        return read(version)
    except StoreError:
        return None


def project_version() -> str:
    """This project's own version."""
    return importlib.metadata.version("leanort")
