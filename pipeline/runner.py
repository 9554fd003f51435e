"""Run the stages: reuse what was done before, resume what was killed, record everything, seal the version."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, get_type_hints

from torch import nn

from foundation.files import sha256
from pipeline import models
from pipeline.artifacts import Artifact, Exported, Optimized, Promoted, Shrunk, Validated
from pipeline.data import parts as datasets
from pipeline.data.parts import Data
from pipeline.errors import CaptureError, ConfigError, UserError, nearest
from pipeline.gate import measuring
from pipeline.models import ModelSource
from pipeline.progress import Progress
from pipeline.race.entrants import entrants
from pipeline.recipe import config as recipes
from pipeline.recipe.config import Config, Section
from pipeline.release import bundling, manifest, promotion, store
from pipeline.release.manifest import Manifest, StageRecord
from pipeline.report import pages as report
from pipeline.stages import STAGES, s4_shrink, s6_optimize

A = TypeVar("A", bound=Artifact)


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


@dataclass(frozen=True)
class Step:
    """What a run would do with one stage."""

    stage: str
    action: str
    reason: str


def stage_name(stage: ModuleType) -> str:
    """`pipeline.stages.s4_shrink` -> `4-shrink`, the folder's name."""
    return stage.__name__.rpartition(".")[2].removeprefix("s").replace("_", "-")


def deploy(
    model: str | nn.Module | Callable[[], nn.Module],
    data: object = None,
    config: Config | None = None,
    *,
    start: str | None = None,
    until: str | None = None,
    promote: bool = True,
    progress: Progress | None = None,
) -> Release | None:
    """Run the whole chain for one model and return the release; None when `until` stopped it before the end.

    `model` is a spec or a module, `data` a spec or data sets; both default to the recipe's. `start` names the first
    stage that must run although it could be reused. A version whose gate has passed becomes the current one, unless
    `promote` is False. A bad model, data set or recipe raises UserError before anything
    is written; a stage that fails raises its own error and leaves the stages before it for the next run to go on from.
    """
    progress = progress or Progress()
    config = config or Config()
    first, last = _range(start, until)
    measuring.metrics(config.gate)
    entrants(config.optimize)
    source, dataset = sources(model, data, config)
    folder = config.artifacts / (config.name or folder_name(model))
    with store.locked(folder, lambda: progress.say(f"Another run is building {folder}; waiting for it to end.")):
        partial = store.open_partial(folder)
        wires: dict[type, Any] = {ModelSource: source, Data: dataset, Progress: progress}
        digests = {"model": source.fingerprint, "data": dataset.fingerprint}
        done: list[tuple[StageRecord, str]] = []
        try:
            with store.disk_errors(folder):
                for number, stage in enumerate(STAGES[: last + 1]):
                    if Promoted in _wires(stage).values():
                        wires[Promoted] = _promoted(folder, digests)
                        digests["promoted"] = wires[Promoted].sha256
                    record, origin = _stage(stage, config, folder, wires, digests, number >= first, progress)
                    done.append((record, origin))
                if last + 1 < len(STAGES):
                    progress.say(f"Stopped after {stage_name(STAGES[last])}; the same command without --until goes on.")
                    return None
                return _finish(folder, partial, config, source, dataset, wires, done, promote, progress)
        except (UserError, CaptureError):
            if not any(manifest.read_stage(p) for p in partial.iterdir()):
                store.remove(partial)
            raise


def sources(model: str | nn.Module | Callable[[], nn.Module], data: object, config: Config) -> tuple[ModelSource, Data]:
    """The data set, and the model built for its classes and input size. Raises UserError when either is bad."""
    given = config.data.source if data is None else data
    dataset = datasets.load(given, input_size=config.data.input_size, seed=config.seed)
    source = models.load(model, num_classes=dataset.classes, input_size=dataset.input_size, seed=config.seed)
    return source, dataset


def plan(
    model: str | nn.Module | Callable[[], nn.Module], data: object = None, config: Config | None = None
) -> list[Step]:
    """What `deploy` would run and what it would reuse. Nothing is written."""
    config = config or Config()
    entrants(config.optimize)
    source, dataset = sources(model, data, config)
    folder = config.artifacts / (config.name or folder_name(model))
    digests = {"model": source.fingerprint, "data": dataset.fingerprint}
    steps: list[Step] = []
    for stage in STAGES:
        name = stage_name(stage)
        if Promoted in _wires(stage).values() and stage_name(s6_optimize) in digests:
            digests["promoted"] = _promoted(folder, digests).sha256
        wanted = _fingerprint(stage, config, digests)
        if wanted is None:
            steps.append(Step(name, "run", "an earlier stage runs"))
            continue
        found = next((p for p in _candidates(folder, name) if _matches(p, wanted)), None)
        if found is None:
            steps.append(Step(name, "run", "not done before with these inputs, settings, code and tools"))
            continue
        record = manifest.read_stage(found)
        assert record is not None
        digests[name] = record.digest
        steps.append(Step(name, "reuse", found.parent.name))
    return steps


def open_release(version: Path) -> Release:
    """A stored version, read back. Raises StoreError when its manifest is damaged."""
    made = manifest.read(version)
    artifacts = tuple(_produces(stage).load(version / stage_name(stage)) for stage in STAGES)
    return Release(version, made, artifacts)


def recipe(release: Release) -> Config:
    """The recipe that a version was made from."""
    return recipes.load(release.folder / manifest.RECIPE)


def folder_name(model: object) -> str:
    """The folder under artifacts/ for a model spec or object: `timm:resnet18` -> `timm-resnet18`."""
    text = model if isinstance(model, str) else type(model).__name__
    if ".py:" in text:
        path, _, attribute = text.rpartition(":")
        text = f"{Path(path).stem}-{attribute}"
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.") or "model"


def _range(start: str | None, until: str | None) -> tuple[int, int]:
    names = [stage_name(stage) for stage in STAGES]
    short = {name.partition("-")[2]: number for number, name in enumerate(names)}
    known = short | {name: number for number, name in enumerate(names)}
    for option, given in (("--from", start), ("--until", until)):
        if given is not None and given not in known:
            raise ConfigError(
                f"{option} {given}: no such stage.", nearest(given, short) or f"Stages: {', '.join(short)}."
            )
    first = known[start] if start else len(STAGES)
    last = known[until] if until else len(STAGES) - 1
    if start and first > last:
        raise ConfigError(f"--from {start} comes after --until {until}.", "Swap them.")
    return first, last


def _wires(stage: ModuleType) -> dict[str, type]:
    """Parameter name -> type of everything that the stage takes besides its section and its output folder."""
    hints = get_type_hints(stage.run)
    return {name: hint for name, hint in hints.items() if name not in ("cfg", "out", "return")}


def _produces(stage: ModuleType) -> type[Artifact]:
    produced: type[Artifact] = get_type_hints(stage.run)["return"]
    return produced


def _section(stage: ModuleType, config: Config) -> Section:
    """The stage's own part of the recipe, found by type."""
    wanted: type[Section] = get_type_hints(stage.run)["cfg"]
    return next(value for _, value in config if isinstance(value, wanted))


def _producer(kind: type) -> str | None:
    """The name under which an input's digest is known; None for what does not decide the result (progress)."""
    if kind is ModelSource:
        return "model"
    if kind is Data:
        return "data"
    if kind is Promoted:
        return "promoted"
    return next((stage_name(stage) for stage in STAGES if _produces(stage) is kind), None)


def _promoted(folder: Path, digests: Mapping[str, str]) -> Promoted:
    """What the version being built is compared with: the current one.

    Where the current one ships the very same file, that would be no comparison: it is what that one was compared with.
    """
    current = store.current(folder)
    optimize = stage_name(s6_optimize)
    seen: set[str] = set()
    while current is not None and current.name not in seen:
        seen.add(current.name)
        made = manifest.read(current)
        record = next((record for record in made.stages if record.stage == optimize), None)
        if record is not None and record.digest != digests[optimize]:
            shipped, shrunk = Optimized.load(current / optimize), Shrunk.load(current / stage_name(s4_shrink))
            digest = record.files[shipped.ships].sha256
            return Promoted(current.name, shipped.onnx, digest, macs=shrunk.macs_after, params=shrunk.params_after)
        before = made.parents.get("promoted version")
        current = folder / before if before and folder / before in store.versions(folder) else None
    return Promoted()


def _fingerprint(stage: ModuleType, config: Config, digests: dict[str, str]) -> str | None:
    """None while a digest that it needs is not known yet."""
    producers = [name for name in map(_producer, _wires(stage).values()) if name is not None]
    if any(name not in digests for name in producers):
        return None
    cfg = _section(stage, config)
    section = cfg.model_dump(mode="json") | cfg.code()
    return manifest.fingerprint(stage, section, {name: digests[name] for name in producers})


def _candidates(folder: Path, name: str) -> list[Path]:
    """Where a finished stage may lie: in the version being built, then in the versions, newest first."""
    return [p / name for p in (folder / store.PARTIAL, *reversed(store.versions(folder))) if (p / name).is_dir()]


def _matches(stage_folder: Path, fingerprint: str) -> bool:
    record = manifest.read_stage(stage_folder)
    # What broke off may have had a reason that is gone by now.
    return record is not None and record.fingerprint == fingerprint and record.metrics.get("complete", True) is True


def _intact(stage_folder: Path) -> bool:
    record = manifest.read_stage(stage_folder)
    return record is not None and manifest.record_files(stage_folder) == record.files


def _stage(
    stage: ModuleType,
    config: Config,
    folder: Path,
    wires: dict[type, Any],
    digests: dict[str, str],
    forced: bool,
    progress: Progress,
) -> tuple[StageRecord, str]:
    """Bring one stage's folder into the partial version: kept, linked from a version, or run."""
    name = stage_name(stage)
    target = folder / store.PARTIAL / name
    fingerprint = _fingerprint(stage, config, digests)
    assert fingerprint is not None, f"{name} runs before a stage that it needs"
    found = None if forced else next((p for p in _candidates(folder, name) if _matches(p, fingerprint)), None)
    if found is not None and not _intact(found):
        progress.say(f"  {found} was changed since it was written; running the stage again.")
        found = None
    if found is None:
        origin = ""
        record = _run(stage, _section(stage, config), target, fingerprint, wires, digests, progress)
    else:
        origin = found.parent.name
        progress.say(f"{name}: reused from {'the interrupted run' if origin == store.PARTIAL else origin}")
        if found != target:
            store.remove(target)
            for relative, path in store.files_in(found).items():
                store.link(path, target / relative)
        kept = manifest.read_stage(target)
        assert kept is not None
        record = kept
    wires[_produces(stage)] = _produces(stage).load(target)
    digests[name] = record.digest
    return record, origin


def _run(
    stage: ModuleType,
    section: Section,
    target: Path,
    fingerprint: str,
    wires: dict[type, Any],
    digests: dict[str, str],
    progress: Progress,
) -> StageRecord:
    """Run the stage in a folder of its own that gets its real name only when complete.

    What a killed run of the very same stage left there (a training checkpoint) stays, so that the stage can go on.
    """
    work = target.with_name(f"{target.name}.building")
    note = work / ".fingerprint"
    store.remove(target)
    if not note.is_file() or note.read_text() != fingerprint:
        store.remove(work)
        work.mkdir()
        note.write_text(fingerprint)
    progress.say(f"{target.name}: {(stage.__doc__ or '').strip().splitlines()[0]}")
    began = time.perf_counter()
    inputs = {parameter: wires[kind] for parameter, kind in _wires(stage).items()}
    artifact: Artifact = stage.run(section, work, **inputs)
    artifact.save()
    note.unlink()
    producers = [name for name in map(_producer, _wires(stage).values()) if name is not None]
    record = StageRecord(
        stage=target.name,
        fingerprint=fingerprint,
        inputs={name: digests[name] for name in producers},
        files=manifest.record_files(work),
        seconds=round(time.perf_counter() - began, 3),
        metrics=artifact.scalars(),
    )
    (work / manifest.RECORD).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    work.rename(target)
    return record


def _finish(
    folder: Path,
    partial: Path,
    config: Config,
    source: ModelSource,
    dataset: Data,
    wires: dict[type, Any],
    done: list[tuple[StageRecord, str]],
    promote: bool,
    progress: Progress,
) -> Release:
    """Write recipe, reports and manifest, and seal the version; a run that changed nothing returns the old one."""
    recipe = recipes.to_toml(config.model_copy(update={"model": source.spec, "artifacts": Path("artifacts")}))
    same = _same_version(folder, recipe, [record for record, _ in done])
    if same is not None:
        store.remove(partial)
        progress.say(f"Nothing changed since {same.name}.")
        release = open_release(same)
    else:
        for leftover in [p for p in partial.iterdir() if p.name not in {record.stage for record, _ in done}]:
            store.remove(leftover) if leftover.is_dir() else leftover.unlink()
        (partial / manifest.RECIPE).write_text(recipe, encoding="utf-8")
        artifacts = tuple(wires[_produces(stage)] for stage in STAGES)
        known = store.versions(folder)
        made = Manifest(
            project=manifest.project_version(),
            model=source.spec,
            version=f"v{int(known[-1].name[1:]) + 1 if known else 1:04d}",
            created=datetime.now(UTC),
            model_fingerprint=source.fingerprint,
            data_fingerprint=dataset.fingerprint,
            recipe=sha256(partial / manifest.RECIPE),
            stages=tuple(record for record, _ in done),
            reused={record.stage: origin for record, origin in done if origin not in ("", store.PARTIAL)},
            files={},
            parents=_parents([record for record, _ in done], dataset, sha256(partial / manifest.RECIPE), wires),
            tools=manifest.tools(),
            host=manifest.host_facts(),
            git=manifest.git_facts(),
        )
        if wires[Validated].verdict.outcome == "pass":
            progress.say("  bundle: golden answers and self-test")
            kinds = (Shrunk, Exported, Optimized, Validated)
            bundling.write(partial / bundling.FOLDER, source, dataset, *(wires[kind] for kind in kinds))
        report.write(partial, made, artifacts)
        stages = tuple(record.stage for record in made.stages)
        outside = {n: f for n, f in manifest.record_files(partial).items() if n.partition("/")[0] not in stages}
        made = made.model_copy(update={"files": outside})
        (partial / manifest.MANIFEST).write_text(made.model_dump_json(indent=2) + "\n", encoding="utf-8")
        release = open_release(store.seal(folder, partial))
    if release.passed and promote and store.current(folder) != release.folder:
        if same is not None and promotion.rolled_back(same):
            progress.say(f"{same.name} was rolled back; `leanort promote {folder.name}/{same.name}` makes it current.")
        else:
            promotion.promote(release.folder, reason="deployed")
    return release


def _parents(records: list[StageRecord], dataset: Data, recipe: str, wires: dict[type, Any]) -> dict[str, str]:
    """The digests that lead back from a version to what it was made from and compared with."""
    compared: Promoted = wires[Promoted]
    other = {"promoted version": compared.version, "promoted model": compared.sha256} if compared.version else {}
    return manifest.parents(records, dataset.fingerprint, recipe) | other


def _same_version(folder: Path, recipe: str, records: list[StageRecord]) -> Path | None:
    """A version with the same recipe and the very same stages, and every byte still as it was."""
    for version in reversed(store.versions(folder)):
        if (version / manifest.RECIPE).is_file() and (version / manifest.RECIPE).read_text(encoding="utf-8") == recipe:
            made = manifest.read(version)
            if list(made.stages) == records and not manifest.faults(version):
                return version
    return None
