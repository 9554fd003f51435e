"""Small versions that are whole in every respect the store looks at, made without running a stage."""

from datetime import UTC, datetime
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper

from foundation.files import sha256
from pipeline.artifacts import archive
from pipeline.artifacts.verdict import Validated
from pipeline.recipe.config import Config, to_toml
from pipeline.release import checks, journal, judging, records, store
from pipeline.release.opening import ARTIFACTS
from pipeline.release.records import Manifest, StageRecord
from validators.gates import Measured

SHA = "0" * 64


def made(artifacts: Path, outcome: str = "pass", parent: str = "", model: str = "m", **files: str) -> Path:
    """A sealed and logged version of `model` with a verdict, and the files that are given (in its last stage)."""
    folder = artifacts / model
    folder.mkdir(parents=True, exist_ok=True)
    partial = store.open_partial(folder)
    for kind in ARTIFACTS:
        (partial / kind.STAGE).mkdir()
    (partial / "0-baseline" / "weights.safetensors").write_bytes(b"weights")
    (partial / "0-baseline" / "dense.onnx").write_bytes(b"dense")
    archive.write(program(), partial / "4-shrink" / "shrunk.pt2")
    exported(partial / "5-export" / "model.onnx", sha256(partial / "0-baseline" / "weights.safetensors"))
    validated(partial / "7-validate", outcome)
    for name, text in files.items():
        (partial / "7-validate" / name).write_text(text)
    (partial / records.RECIPE).write_text(to_toml(Config(model=model)))
    seal_again(partial, name=model, number=len(list(folder.glob("v*"))) + 1, parent=parent)
    version = store.seal(folder, partial)
    journal.append(artifacts, "seal", model, version.name, manifest=records.seal_of(version))
    return version


def seal_again(version: Path, name: str = "", number: int = 0, parent: str = "") -> None:
    """Write every hash of a version anew, as whoever tampers with one would do; the log stays as it is."""
    known = records.read(version) if (version / records.MANIFEST).is_file() else None
    stages = []
    for kind in ARTIFACTS:
        stage = version / kind.STAGE
        record = StageRecord(
            stage=kind.STAGE, fingerprint=SHA, inputs={}, files=records.record_files(stage), seconds=0, metrics={}
        )
        (stage / records.RECORD).write_text(record.model_dump_json())
        stages.append(record)
    recipe = sha256(version / records.RECIPE)
    skip = (records.RECORD, records.MANIFEST, records.SEAL)
    outside = {n: f for n, f in records.record_files(version, skip).items() if n.partition("/")[0] not in STAGES}
    records.write(
        version,
        Manifest(
            project="0", name=known.name if known else name, model=known.model if known else name,
            version=known.version if known else f"v{number:04d}",
            created=datetime(2026, 1, 1, tzinfo=UTC), model_fingerprint="", data_fingerprint="", recipe=recipe,
            stages=tuple(stages), reused={"7-validate": parent} if parent else {}, files=outside,
            parents=checks.parents(stages, "", recipe), tools={}, host={}, git={},
        ),
    )  # fmt: skip


STAGES = tuple(kind.STAGE for kind in ARTIFACTS)


def writable(version: Path) -> Path:
    """Take a version's write protection off."""
    for path in (version, *version.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return version


def program() -> torch.export.ExportedProgram:
    return torch.export.export(torch.nn.Linear(2, 2).eval(), (torch.zeros(1, 2),))


def exported(path: Path, dense: str) -> None:
    """A model file of one operator that names the dense weights it came from."""
    shape = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    model = helper.make_model(helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", shape[:1], shape[1:]))
    model.metadata_props.add(key="leanort.dense_sha256", value=dense)
    model.metadata_props.add(key="leanort.recipe_sha256", value=records.recipe_digest([""] * 6))
    onnx.save(model, path)


def validated(folder: Path, outcome: str) -> None:
    """Measurements on which the standard limits give `outcome`: "pass", "fail", or "unmeasured" which fails, too."""
    ratio = {"pass": 0.5, "fail": 2.0}.get(outcome)
    measured = {
        f"{name} vs dense": None if ratio is None else Measured(value=value, low=value, high=value)
        for name, value in (("accuracy", 0.0), ("latency", ratio or 0.0), ("file_size", ratio or 0.0))
    }
    bare = Validated.model_construct(
        measurements=measured, hops=(), promoted="", crashed={}, dense_accuracy=None, accuracy=None,
        accuracy_drop_points=None, accuracy_drop_low=None, accuracy_drop_high=None,
    )  # fmt: skip
    Validated(
        folder=folder, verdict=judging.judge(bare, Config().gate)[0], hops=(), measurements=measured,
        dense_accuracy=1, accuracy=1, accuracy_drop_points=0, accuracy_drop_low=0, accuracy_drop_high=0,
        dense_latency_ms=1, latency_ms=ratio, latency_p95_ms=1, latency_p99_ms=1, latency_ratio=ratio,
        latency_ratio_low=1, latency_ratio_high=1, threads=1, dense_bytes=1, bytes=1, dense_load_ms=1, load_ms=1,
    ).save()  # fmt: skip
