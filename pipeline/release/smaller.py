"""The shrunk model of a version as a module of the user's own: to be trained, subclassed, exported, deployed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from foundation.errors import StoreError
from pipeline.artifacts.eager import Folded
from pipeline.artifacts.program import Shrunk
from pipeline.channels.ledger import Ledger
from pipeline.release import records
from pipeline.release.opening import Release

if TYPE_CHECKING:
    from torch import nn


def smaller(version: Release | Path | str, model: nn.Module | None = None) -> nn.Module:
    """The shrunk model of `version` as a module in eval mode, its weights those that were shipped (float32).

    An instance of the model's original class with smaller layers, where the class's own `forward` then computes exactly
    the shrunk program, which was measured when the version was made; else the program, with parameters under their
    original names. `module.leanort_structure.original` says which, and `.why` why.

    `version`: what `deploy` returned, or a folder such as `artifacts/resnet50/current`. `model`: a dense instance of
    the class, which is changed in place; left out, it is built from the name that was deployed.
    Raises StoreError where the version's files are not as they were sealed, or were made before there was such a
    module; ModelError where the model cannot be built, or is of another kind.
    """
    from pipeline.channels.removal.recover import Trainable
    from pipeline.rebuilding import restore
    from pipeline.rebuilding.structure import Structure

    folder = version.folder if isinstance(version, Release) else Path(version).resolve()
    for stage in (Shrunk.STAGE, Folded.STAGE):
        _check(folder / stage)
    structure = Structure.read(folder / Shrunk.STAGE)
    program = Shrunk.load(folder / Shrunk.STAGE).program()
    if not structure.original:
        return restore.marked(Trainable(program), structure)
    ledger = Ledger.from_json((folder / Shrunk.STAGE / Shrunk.LEDGER).read_text(encoding="utf-8"))
    within = ""
    if model is None:
        model, within = restore.dense_instance(structure)
    state = restore.values(program, ledger, Folded.load(folder / Folded.STAGE).weights(), structure)
    return restore.restructured(model, *restore.within(structure, state, within))


def _check(stage: Path) -> None:
    """Raise StoreError unless every file of a stage is as it was when it was written."""
    record = records.read_stage(stage)
    if record is None:
        raise StoreError(f"{stage} is no stage of a version.", "Give a folder such as artifacts/resnet50/current.")
    if records.record_files(stage) != record.files:
        raise StoreError(f"{stage} is not as it was written.", "See `leanort verify`; deploy again, or roll back.")
