"""The shrunk model of a version as a module of the user's own: to be trained, subclassed, exported, deployed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from foundation.errors import StoreError
from pipeline.artifacts.eager import Folded
from pipeline.artifacts.program import Shrunk
from pipeline.channels.ledger import Ledger
from pipeline.release import checks, records
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
    from pipeline.rebuilding.rebuild import state_of
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
    folded = Folded.load(folder / Folded.STAGE).weights()
    state = state_of(program, ledger, folded, structure.biases, structure.kept)
    return restore.restructured(model, *restore.within(structure, state, within))


def _check(stage: Path) -> None:
    """Raise StoreError unless a stage is there, and as it was when it was written."""
    if records.read_stage(stage) is None:
        raise StoreError(f"{stage} is no stage of a version.", "Give a folder such as artifacts/resnet50/current.")
    if not checks.intact(stage):
        raise StoreError(f"{stage} is not as it was written.", "See `leanort verify`; deploy again, or roll back.")
