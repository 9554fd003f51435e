"""Whether a version is still what was sealed, byte by byte, and whether its parts belong together."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from foundation.files import sha256
from pipeline.artifacts.eager import Baseline
from pipeline.artifacts.program import Exported
from pipeline.artifacts.race import Optimized
from pipeline.release import store
from pipeline.release.records import MANIFEST, RECIPE, RECORD, FileRecord, Manifest, StageRecord, read, read_stage


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
    dense = made[Baseline.STAGE].files
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
        digests = {f.sha256 for r in read(other).stages if r.stage == Optimized.STAGE for f in r.files.values()}
        if manifest.parents.get("promoted model") not in digests:
            found.append(f"{other.name} is not the version that this one was compared with")
    exported = version / Exported.STAGE / "model.onnx"
    if exported.is_file():
        import onnx

        metadata = {e.key: e.value for e in onnx.load(exported, load_external_data=False).metadata_props}
        if metadata.get("leanort.dense_sha256") != manifest.parents.get("dense weights"):
            found.append(f"{Exported.STAGE}/model.onnx does not name the dense weights of this version")
    return found
