"""What a version says about itself: every stage's inputs and outputs by digest, tools, host, commit; and its check."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from exporters import host
from foundation.errors import first_line
from foundation.files import sha256
from pipeline.errors import StoreError
from pipeline.release import store

MANIFEST = "manifest.json"
RECIPE = "config.toml"
RECORD = "stage.json"
_PACKAGES = ("pipeline", "exporters", "validators", "foundation")
_TOOLS = ("numpy", "onnx", "onnxruntime", "onnxscript", "timm", "torch", "torchvision", "transformers")


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
    model: str
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


def digest(value: object) -> str:
    """sha256 of a JSON-able value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


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


def faults(version: Path) -> list[str]:
    """Everything wrong with a version on disk: changed, missing or extra files, and inputs that no stage produced.

    An empty list means that every byte is as it was when the version was sealed, and that the chain of digests leads
    from the shipped file back to the dense model.
    """
    manifest = read(version)
    expected: dict[str, FileRecord] = dict(manifest.files)
    for record in manifest.stages:
        expected |= {f"{record.stage}/{name}": file for name, file in record.files.items()}
    present = store.files_in(version)
    found = [f"{name} is missing" for name in expected if name not in present]
    sealed = {MANIFEST, *(f"{record.stage}/{RECORD}" for record in manifest.stages)}
    found += [f"{name} does not belong here" for name in present if name not in expected and name not in sealed]
    for name in sorted(expected.keys() & present.keys()):
        if sha256(present[name]) != expected[name].sha256:
            found.append(f"{name} was changed: its sha256 is not the recorded one")
    made = {record.stage: record.digest for record in manifest.stages}
    for record in manifest.stages:
        if read_stage(version / record.stage) != record:
            found.append(f"{record.stage}/{RECORD} does not agree with the manifest")
        for producer, wanted in record.inputs.items():
            if producer in made and made[producer] != wanted:
                found.append(f"{record.stage} was built from another {producer} than the one in this version")
    found += _parent_faults(version, manifest)
    if RECIPE in manifest.files and manifest.files[RECIPE].sha256 != manifest.recipe:
        found.append(f"{RECIPE} is not the recipe that was run")
    return found


def parents(stages: Iterable[StageRecord], data: str, recipe: str) -> dict[str, str]:
    """What a version came from, by digest: dense weights and model, data, recipe, each stage in between."""
    made = {record.stage: record for record in stages}
    dense = made["0-baseline"].files
    return {
        "dense weights": dense["weights.safetensors"].sha256,
        "dense model": dense["dense.onnx"].sha256,
        "data": data,
        "recipe": recipe,
    }


def _parent_faults(version: Path, manifest: Manifest) -> list[str]:
    """Where the digests that a version names for its parents are not those of the files that are there."""
    if not manifest.parents:
        return []
    found = [
        f"{name} is not the one that this version names as its parent"
        for name, wanted in parents(manifest.stages, manifest.data_fingerprint, manifest.recipe).items()
        if manifest.parents.get(name) != wanted
    ]
    other = version.parent / manifest.parents.get("promoted version", "")
    if other != version.parent and (other / MANIFEST).is_file():
        digests = {f.sha256 for r in read(other).stages if r.stage == "6-optimize" for f in r.files.values()}
        if manifest.parents.get("promoted model") not in digests:
            found.append(f"{other.name} is not the version that this one was compared with")
    exported = version / "5-export" / "model.onnx"
    if exported.is_file():
        metadata = {e.key: e.value for e in onnx.load(exported, load_external_data=False).metadata_props}
        if metadata.get("leanort.dense_sha256") != manifest.parents.get("dense weights"):
            found.append("5-export/model.onnx does not name the dense weights of this version")
    return found


def project_version() -> str:
    """This project's own version."""
    return importlib.metadata.version("leanort")


@functools.cache
def tools() -> dict[str, str]:
    """Versions of Python and of the libraries whose code decides the result."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _TOOLS}


@functools.cache
def host_facts() -> dict[str, str]:
    """The machine that measured."""
    return {"isa": host.isa(), "cpu": host.cpu_name(), "system": platform.system(), "machine": platform.machine()}


def git_facts() -> dict[str, str]:
    """Commit and state of the checkout that this code runs from; empty when it is no checkout."""
    here = Path(__file__).resolve().parent

    def ask(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        dirty = bool(ask("status", "--porcelain", "--untracked-files=no"))
        return {"commit": ask("rev-parse", "HEAD"), "dirty": str(dirty).lower()}
    except (OSError, subprocess.CalledProcessError):
        return {}


@functools.cache
def code_digest(module: ModuleType) -> str:
    """Digest of a module's source and of every module of this project that it imports, directly or not.

    A stage whose own code and whose helpers did not change can be reused although something else in the project did.
    """
    sources: dict[str, str] = {}
    waiting = [module.__name__]
    while waiting:
        name = waiting.pop()
        path = _source(name)
        if name in sources or path is None:
            continue
        text = path.read_text(encoding="utf-8")
        sources[name] = hashlib.sha256(text.encode()).hexdigest()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
    return digest(sources)


def _source(name: str) -> Path | None:
    """The file of a module of this project; None for anything else, such as a name that is no module."""
    if name.partition(".")[0] not in _PACKAGES:
        return None
    loaded = sys.modules.get(name)
    if loaded is not None:
        return Path(loaded.__file__) if loaded.__file__ else None
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec is not None and spec.origin else None


def fingerprint(stage: ModuleType, section: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """What decides a stage's result: its section of the recipe, its inputs' digests, its code, tools and host."""
    return digest(
        {
            "stage": stage.__name__,
            "section": section,
            "inputs": dict(inputs),
            "code": code_digest(stage),
            "tools": tools(),
            "host": host_facts(),
        }
    )
