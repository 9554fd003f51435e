"""What a run finds in the store: stages done before, the version to compare with, what becomes current."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from pipeline.artifacts.program import Shrunk
from pipeline.artifacts.race import Optimized
from pipeline.artifacts.verdict import Promoted
from pipeline.progress import Progress
from pipeline.recipe.config import Config
from pipeline.release import journal, promotion, records, store
from pipeline.release.opening import Release


def make_current(release: Release, promote: bool, known: bool, progress: Progress) -> None:
    """Promote a version whose gate has passed, unless it is a `known` one that somebody rolled back."""
    folder = release.folder.parent
    with journal.locked(folder.parent):
        promotion.settle(folder.parent)
    if release.passed and promote and store.current(folder) != release.folder:
        if known and promotion.rolled_back(release.folder):
            name = release.folder.name
            progress.say(f"{name} was rolled back; `leanort promote {folder.name}/{name}` makes it current.")
        else:
            promotion.promote(release.folder, reason="deployed")


def folder_name(model: object) -> str:
    """The folder under artifacts/ for a model spec or object: `timm:resnet18` -> `timm-resnet18`."""
    text = model if isinstance(model, str) else type(model).__name__
    if ".py:" in text:
        path, _, attribute = text.rpartition(":")
        text = f"{Path(path).stem}-{attribute}"
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.") or "model"


def folder_of(config: Config, model: object = None) -> Path:
    """The folder of a recipe's versions; `model`: the spec or object, where the recipe does not name it."""
    return config.artifacts / (config.name or folder_name(config.model if model is None else model))


def compared_with(
    folder: Path, digests: Mapping[str, str], say: Callable[[str], None] = lambda words: None
) -> Promoted:
    """What the version being built is compared with: the current one.

    Where the current one ships the very same file, that would be no comparison: it is what that one was compared with.
    A damaged one is nothing to compare with, which is said.
    """
    current = store.current(folder)
    optimize = Optimized.STAGE
    seen: set[str] = set()
    while current is not None and current.name not in seen:
        seen.add(current.name)
        made = records.read_if_whole(current)
        if made is None:
            say(f"The manifest of {current} is damaged: the new version is not compared with it.")
            break
        record = next((record for record in made.stages if record.stage == optimize), None)
        if record is not None and record.digest != digests[optimize]:
            shipped, shrunk = Optimized.load(current / optimize), Shrunk.load(current / Shrunk.STAGE)
            digest = record.files[shipped.ships].sha256
            return Promoted(current.name, shipped.onnx, digest, macs=shrunk.macs_after, params=shrunk.params_after)
        before = made.parents.get("promoted version")
        current = folder / before if before and folder / before in store.versions(folder) else None
    return Promoted()


def candidates(folder: Path, name: str) -> list[Path]:
    """Where a finished stage may lie: in the version being built, then in the versions, newest first."""
    return [p / name for p in (folder / store.PARTIAL, *reversed(store.versions(folder))) if (p / name).is_dir()]


def matches(stage_folder: Path, wanted: str) -> bool:
    """Whether a stage there is complete and was run under the fingerprint `wanted`."""
    record = records.read_stage(stage_folder)
    # What broke off may have had a reason that is gone by now.
    return record is not None and record.fingerprint == wanted and record.metrics.get("complete", True) is True
