"""Whether a version is still what was sealed, byte by byte, and whether its parts belong together."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from foundation.errors import first_line
from foundation.files import sha256
from pipeline.artifacts import archive
from pipeline.artifacts.eager import Baseline
from pipeline.artifacts.program import Exported, Shrunk
from pipeline.artifacts.race import Optimized
from pipeline.artifacts.verdict import Validated
from pipeline.release import journal, store
from pipeline.release.opening import ARTIFACTS
from pipeline.release.records import (
    MANIFEST,
    RECIPE,
    RECORD,
    SEAL,
    FileRecord,
    Manifest,
    StageRecord,
    read,
    read_if_whole,
    read_stage,
    recipe_digest,
    record_files,
    seal_of,
)

_COMPARED = ("promoted version", "promoted model")
"""What a version was compared with; a version made while none was current names neither."""


def faults(version: Path) -> list[str]:
    """Everything wrong with a version on disk: changed, missing or extra files, and inputs that no stage produced.

    An empty list means that every byte is as it was when the version was sealed, that it is the version of the model
    that its folder says, that nothing in it would be run by reading it, and that the chain of digests leads from the
    shipped file back to the dense model. Raises StoreError for a manifest that cannot be read.
    """
    manifest = read(version)
    found = _identity_faults(version, manifest)
    stages = tuple(record.stage for record in manifest.stages)
    expected_stages = tuple(kind.STAGE for kind in ARTIFACTS)
    if stages != expected_stages:
        return [*found, f"{MANIFEST} lists the stages {', '.join(stages) or 'none'} instead of all eight"]
    expected: dict[str, FileRecord] = dict(manifest.files)
    for record in manifest.stages:
        expected |= {f"{record.stage}/{name}": file for name, file in record.files.items()}
    present = store.files_in(version)
    found += [f"{name} is missing" for name in expected if name not in present]
    sealed = {MANIFEST, SEAL, *(f"{record.stage}/{RECORD}" for record in manifest.stages)}
    found += [f"{name} does not belong here" for name in present if name not in expected and name not in sealed]
    found += [f"{name} is no plain file and no folder of any" for name in store.strays_in(version)]
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
    found += _bundle_faults(manifest)
    program = f"{Shrunk.STAGE}/{Shrunk.PROGRAM}"
    if program in present:
        found += [f"{program} would not be loaded: {fault}" for fault in archive.faults(present[program])]
    if RECIPE in manifest.files and manifest.files[RECIPE].sha256 != manifest.recipe:
        found.append(f"{RECIPE} is not the recipe that was run")
    return found


def intact(stage_folder: Path) -> bool:
    """Whether a stage's files are as they were written, and hold nothing that reading them would run."""
    record = read_stage(stage_folder)
    program = stage_folder / Shrunk.PROGRAM
    return (
        record is not None
        and record_files(stage_folder) == record.files
        and not store.strays_in(stage_folder)
        and not (program.exists() and archive.faults(program))
    )


def _identity_faults(version: Path, manifest: Manifest) -> list[str]:
    """Whether the manifest is the one that was sealed, as the file beside it and the log say, and of this version."""
    found = []
    if manifest.version != version.name or manifest.name != version.parent.name:
        here, there = f"{version.parent.name}/{version.name}", f"{manifest.name}/{manifest.version}"
        found.append(f"{MANIFEST} is that of {there}, and this is {here}")
    own = seal_of(version)
    try:
        beside = (version / SEAL).read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        beside = []
    if beside != [own, MANIFEST]:
        found.append(f"{MANIFEST} was changed: its sha256 is not the one in {SEAL}")
    logged = journal.manifest_of(version)
    if logged == "":
        found.append(f"{journal.FILE} knows nothing of it: it was not made here")
    elif logged not in (None, own):
        found.append(f"{MANIFEST} was changed: its sha256 is not the one in {journal.FILE}")
    return found


def _bundle_faults(manifest: Manifest) -> list[str]:
    """Every model that the bundle holds must be one of those that were raced and proven."""
    proven = {file.sha256 for r in manifest.stages if r.stage == Optimized.STAGE for file in r.files.values()}
    return [
        f"{name} is none of the files in {Optimized.STAGE}"
        for name, file in manifest.files.items()
        if name.startswith("bundle/") and name.endswith((".onnx", ".ort")) and file.sha256 not in proven
    ]


def parents(stages: Iterable[StageRecord], data: str, recipe: str) -> dict[str, str]:
    """What a version came from, by digest: dense weights and model, data, recipe, each stage in between."""
    made = {record.stage: record for record in stages}
    dense = made[Baseline.STAGE].files
    return {
        "dense weights": dense["weights.safetensors"].sha256,
        "dense model": dense["dense.onnx"].sha256,
        "data": data,
        "recipe": recipe,
    }


def _parent_faults(version: Path, manifest: Manifest) -> list[str]:
    """Where the digests that a version names for its parents are not those of the files that are there."""
    found = [
        f"{name} is not the one that this version names as its parent"
        for name, wanted in parents(manifest.stages, manifest.data_fingerprint, manifest.recipe).items()
        if manifest.parents.get(name) != wanted
    ]
    unknown = manifest.parents.keys() - {"dense weights", "dense model", "data", "recipe", *_COMPARED}
    found += [f"{MANIFEST} names a parent {name!r} that no version has" for name in sorted(unknown)]
    compared = next(record for record in manifest.stages if record.stage == Validated.STAGE).inputs.get("promoted", "")
    if manifest.parents.get(_COMPARED[1], "") != compared:
        found.append("the version that this one names as compared with it is not the one that it was measured against")
    other = version.parent / manifest.parents.get("promoted version", "")
    if other != version.parent and (other / MANIFEST).is_file():
        then = read_if_whole(other)
        digests = (
            {f.sha256 for r in then.stages if r.stage == Optimized.STAGE for f in r.files.values()} if then else ()
        )
        if manifest.parents.get("promoted model") not in digests:
            found.append(f"{other.name} is not the version that this one was compared with")
    exported = version / Exported.STAGE / "model.onnx"
    if exported.is_file():
        import onnx

        try:
            metadata = {e.key: e.value for e in onnx.load(exported, load_external_data=False).metadata_props}
        except Exception as error:  # protobuf's and onnx's own classes share no base
            return [*found, f"{Exported.STAGE}/model.onnx cannot be read: {first_line(error)}"]
        if metadata.get("leanort.dense_sha256") != manifest.parents.get("dense weights"):
            found.append(f"{Exported.STAGE}/model.onnx does not name the dense weights of this version")
        stages = [record.stage for record in manifest.stages]
        led = [record.section for record in manifest.stages[: stages.index(Exported.STAGE) + 1]]
        if metadata.get("leanort.recipe_sha256") != recipe_digest(led):
            found.append(f"{Exported.STAGE}/model.onnx does not name the recipe of this version")
    return found
