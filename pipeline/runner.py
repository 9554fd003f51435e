"""Run the stages: reuse what was done before, resume what was killed, record everything, seal the version."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from torch import nn

from foundation.errors import CaptureError, ConfigError, UserError, nearest
from foundation.files import sha256
from pipeline import measurements
from pipeline.artifacts.base import Artifact
from pipeline.artifacts.eager import Baseline
from pipeline.artifacts.program import Exported, Shrunk
from pipeline.artifacts.race import Optimized
from pipeline.artifacts.verdict import Promoted, Validated
from pipeline.data import find as datasets
from pipeline.data import made_up
from pipeline.data.parts import Data
from pipeline.data.samples import Reading
from pipeline.gate import measuring
from pipeline.measurements import Measurements
from pipeline.models import find as models
from pipeline.models import published
from pipeline.models.dense import dense
from pipeline.models.source import ModelSource
from pipeline.models.trial import UnsuitedError
from pipeline.progress import Progress
from pipeline.race.entrants import entrants
from pipeline.recipe import config as recipes
from pipeline.recipe.config import Config
from pipeline.recipe.section import Section
from pipeline.recipe.train import TrainSettings
from pipeline.recovery.following import follow
from pipeline.release import bundling, checks, fingerprint, journal, records, store
from pipeline.release.opening import Release, open_release
from pipeline.release.records import Manifest, StageRecord
from pipeline.release.reuse import candidates, compared_with, folder_of, make_current, matches
from pipeline.report import pages as report
from pipeline.selection import criteria, schedules, targets
from pipeline.selection.choose import check_overrides
from pipeline.stages.order import STAGES
from pipeline.tasks import find as tasks
from pipeline.tasks.entry import meet
from pipeline.tasks.task import Task
from pipeline.training import devices, jobs, launched, loop, own, processes


@dataclass(frozen=True)
class Step:
    """What a run would do with one stage."""

    stage: str
    action: str
    reason: str


def run(
    model: str | nn.Module | Callable[[], nn.Module],
    data: object,
    config: Config,
    *,
    start: str | None,
    until: str | None,
    promote: bool,
    request: str,
    progress: Progress,
) -> Release | None:
    """Run the stages that have to run, reuse the others, seal the version; see `pipeline.deployment.deploy`."""
    place = launched.place()
    if place is None:
        first, last = _range(start, until)
        check(config)
        found = sources(model, data, config)
        _check_against(config, found, _measurements(model, config), progress)
        return _build(model, config, found, first, last, promote, request, progress)
    try:
        with processes.joined(place) as group:
            first, last = group.agreed(lambda: _checked(start, until, config), lambda _: _versions())
            found = group.agreed(lambda: sources(model, data, config), _fingerprints)
            # A target is measured by one process alone, the others would take its cores.
            measured = _measurements(model, config) if group.leads else None
            group.agreed(lambda: _check_against(config, found, measured, progress))
            if not group.leads:
                follow(*found)
                return None
            made = _build(model, config, found, first, last, promote, request, progress)
            jobs.over()
            return made
    except processes.Over:
        return None


def _checked(start: str | None, until: str | None, config: Config) -> tuple[int, int]:
    check(config)
    return _range(start, until)


def _measurements(model: object, config: Config) -> Measurements:
    """Where what is measured of a model is kept for all its versions."""
    return Measurements(folder_of(config, model) / measurements.FOLDER)


def _check_against(
    config: Config, found: tuple[ModelSource, Data, Task], kept: Measurements | None, progress: Progress
) -> None:
    """What of a recipe shows itself wrong only beside the model and the data, before anything is spent on them.

    `kept`: None where another process of the run looks whether a target can be met.
    """
    source, dataset, _ = found
    check_overrides(config.prune, source)
    for settings in _trainings(config):
        devices.check_rows(len(dataset.train), settings)
    if kept is not None:
        targets.check_before(config.prune, source, kept, progress)


def _trainings(config: Config) -> tuple[TrainSettings, ...]:
    return tuple(one or TrainSettings() for one in (config.baseline.train, config.prune.train, config.finetune.train))


def _versions() -> dict[str, str]:
    """What processes that train together must have in common before they load anything."""
    return {
        "version of leanort": fingerprint.project_digest(),
        "version of a library": records.digest(fingerprint.tools()),
    }


def _fingerprints(found: tuple[ModelSource, Data, Task]) -> dict[str, str]:
    source, dataset, task = found
    return {"model": source.fingerprint, "data set": dataset.fingerprint, "task": _task_digest(task)}


def _build(
    model: str | nn.Module | Callable[[], nn.Module],
    config: Config,
    found: tuple[ModelSource, Data, Task],
    first: int,
    last: int,
    promote: bool,
    request: str,
    progress: Progress,
) -> Release | None:
    """Run the stages from number `first` to `last` anew, or reuse them, and seal the version."""
    source, dataset, task = found
    folder = folder_of(config, model)
    with store.locked(folder, lambda: progress.say(f"Another run is building {folder}; waiting for it to end.")):
        if store.versions(folder):
            with journal.locked(folder.parent):  # a pointer that is just being moved is none of what a kill left
                store.tidy(folder)
        partial = store.open_partial(folder)
        wires: dict[type, Any] = {
            ModelSource: source,
            Data: dataset,
            Task: task,
            Progress: progress,
            Measurements: Measurements(folder / measurements.FOLDER),
        }
        digests = {"model": source.fingerprint, "data": dataset.fingerprint, "task": _task_digest(task)}
        done: list[tuple[StageRecord, str]] = []
        try:
            with store.disk_errors(folder):
                for number, stage in enumerate(STAGES[: last + 1]):
                    if Promoted in _wires(stage).values():
                        wires[Promoted] = compared_with(folder, digests, progress.say)
                        digests["promoted"] = wires[Promoted].sha256
                    record, origin = _stage(stage, config, folder, wires, digests, number >= first, progress)
                    if _produces(stage) is Baseline and not dataset.labelled:
                        wires[Data] = _with_answers(dataset, task, source, wires[Baseline])
                        digests["data"] = _answered(digests)
                    done.append((record, origin))
                if last + 1 < len(STAGES):
                    progress.say(
                        f"Stopped after {_produces(STAGES[last]).STAGE}; the same command without --until goes on."
                    )
                    return None
                return _finish(
                    folder,
                    partial,
                    config,
                    source,
                    dataset,
                    wires,
                    done,
                    promote,
                    request,
                    progress,
                )
        except (UserError, CaptureError):
            if not any(records.read_stage(p) for p in partial.iterdir()):
                store.remove(partial)
            raise


def check(config: Config) -> None:
    """Whatever a recipe names that only a table knows, looked up before anything is spent. Raises ConfigError."""
    criteria.find(config.prune.criterion)
    schedules.find(config.prune.schedule)
    entrants(config.optimize)
    measuring.metrics(config.gate)
    for settings in _trainings(config):
        devices.check(settings)
    tasks.check(config.task)
    own.check(config.baseline.loop, config.finetune.loop)


def sources(
    model: str | nn.Module | Callable[[], nn.Module], data: object, config: Config
) -> tuple[ModelSource, Data, Task]:
    """Data set, model and task, tried together on one batch. Raises UserError when any is bad, or they do not fit."""
    reading = Reading(
        inputs=config.data.inputs,
        target=config.data.target,
        dims=config.data.dims,
        targets=tasks.targets_of(config.task),
        pad=tasks.pad_of(config.task),
        tokenizer=config.data.tokenizer or published.folder(model),
        names=published.class_names(model),
        pixels=published.pixels(model),
        max_tokens=config.data.max_tokens,
        sample_rate=config.data.sample_rate,
        seconds=config.data.seconds,
        images=isinstance(model, str) and (":" not in model or model.startswith("timm:")),
    )
    try:
        return _met(model, data, config, reading)
    except UnsuitedError:
        if reading.images:
            raise
        try:  # a matrix of floats may stand for an image of one channel
            return _met(model, data, config, replace(reading, images=True))
        except UserError:
            pass
        raise


def _met(
    model: str | nn.Module | Callable[[], nn.Module], data: object, config: Config, reading: Reading
) -> tuple[ModelSource, Data, Task]:
    given = config.data.source if data is None else data
    if given == made_up.NONE:
        return _without_data(model, config)
    dataset = datasets.load(given, input_size=config.data.input_size, seed=config.seed, reading=reading)
    classes = (dataset.classes or len(dataset.names) or None) if dataset.labelled else config.data.classes
    if dataset.labelled and config.data.classes not in (None, classes):
        has = f"labels of {classes} classes" if classes else "targets that are no class numbers"
        raise ConfigError(
            f"data.classes is {config.data.classes}, and {dataset.name} has {has}.",
            "Leave it out: it is for data without labels.",
        )
    named = dataset.inputs if all(one.name for one in dataset.inputs) else ()
    source = models.load(model, num_classes=classes, input_size=dataset.input_size, seed=config.seed, fed=named)
    if not dataset.labelled:
        _check_unlabelled(config, source, dataset)
    source, dataset, task = meet(source, dataset, config.data, config.task)
    if task.taught and dataset.labelled:  # asked for by name: the dense model's outputs stand in the labels' place
        dataset = replace(dataset, labelled=False)
        _check_unlabelled(config, source, dataset)
    if config.prune.method == "structured":
        criteria.require_classes(config.prune.criterion, task.classes)
    return source, dataset, task


def _without_data(model: str | nn.Module | Callable[[], nn.Module], config: Config) -> tuple[ModelSource, Data, Task]:
    """Where nothing was given: inputs made up from what the model takes, which nothing can be learnt on."""
    if config.optimize.int8:
        raise ConfigError("optimize.int8 finds its ranges on data, and data.source is none.", "Give --data.")
    size = config.data.input_size
    source = models.load(model, num_classes=config.data.classes, input_size=size, seed=config.seed)
    dataset = made_up.made_up(source, config.seed)
    source, dataset, task = meet(source, dataset, config.data, config.task)
    _check_unlabelled(config, source, dataset)
    return source, dataset, task


def _check_unlabelled(config: Config, source: ModelSource, dataset: Data) -> None:
    """Raise ConfigError for what cannot be done without labels."""
    own = source.origin.weigh_values or source.origin.brings or not source.initial
    if config.baseline.weights == "train" or (config.baseline.weights == "auto" and not own):
        raise ConfigError(
            f"{dataset.name} has no labels, so that {source.spec} cannot be trained on it.",
            "Give its trained weights: --weights FILE, or --weights pretrained.",
        )
    if config.prune.method == "structured":
        criteria.require_labels(config.prune.criterion, dataset.labelled)


def _with_answers(dataset: Data, task: Task, source: ModelSource, baseline: Baseline) -> Data:
    """Data without labels, with what the dense model answers in their place."""
    if not task.taught:
        return dataset.answered(*baseline.answers())
    return dataset.answered_by(dense(source, baseline))


def _task_digest(task: Task) -> str:
    """What a task decides: its name and outputs, and the code of its loss, which no stage imports by itself."""
    modules = {function.__module__ for function in (task.losses, task.divergence)}
    ours = sorted(name for name in modules if name.startswith("pipeline."))
    return records.digest({"task": task.fingerprint, "code": [fingerprint.code_digest(name) for name in ours]})


def _answered(digests: Mapping[str, str]) -> str:
    """Digest of data without labels once the dense model has answered in their place."""
    return records.digest({"data": digests["data"], "answers": digests[Baseline.STAGE]})


def plan(
    model: str | nn.Module | Callable[[], nn.Module], data: object = None, config: Config | None = None
) -> list[Step]:
    """What `deploy` would run and what it would reuse. Nothing is written."""
    config = config or Config()
    check(config)
    return steps(config, folder_of(config, model), *sources(model, data, config))


def steps(config: Config, folder: Path, source: ModelSource, dataset: Data, task: Task) -> list[Step]:
    """`plan` for what `sources` gave, with the versions in `folder`."""
    digests = {"model": source.fingerprint, "data": dataset.fingerprint, "task": _task_digest(task)}
    found: list[Step] = []
    for stage in STAGES:
        name = _produces(stage).STAGE
        if Promoted in _wires(stage).values() and Optimized.STAGE in digests:
            digests["promoted"] = compared_with(folder, digests).sha256
        wanted = _fingerprint(stage, config, digests)
        if wanted is None:
            found.append(Step(name, "run", "an earlier stage runs"))
            continue
        made = next((p for p in candidates(folder, name) if matches(p, wanted)), None)
        if made is None:
            found.append(Step(name, "run", "not done before with these inputs, settings, code and tools"))
            continue
        record = records.read_stage(made)
        assert record is not None
        digests[name] = record.digest
        if name == Baseline.STAGE and not dataset.labelled:
            digests["data"] = _answered(digests)
        found.append(Step(name, "reuse", made.parent.name))
    return found


def _range(start: str | None, until: str | None) -> tuple[int, int]:
    names = [_produces(stage).STAGE for stage in STAGES]
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
    if kind is Task:
        return "task"
    if kind is Promoted:
        return "promoted"
    return next((_produces(stage).STAGE for stage in STAGES if _produces(stage) is kind), None)


def _fingerprint(stage: ModuleType, config: Config, digests: dict[str, str]) -> str | None:
    """None while a digest that it needs is not known yet."""
    producers = [name for name in map(_producer, _wires(stage).values()) if name is not None]
    if any(name not in digests for name in producers):
        return None
    cfg = _section(stage, config)
    section = cfg.model_dump(mode="json") | cfg.code() | _trained_on(cfg)
    if _produces(stage) is Exported:  # which names the whole recipe that led to it, in the file itself
        before = STAGES[: STAGES.index(stage)]
        section["led by"] = [records.section_digest(_section(one, config)) for one in before]
    return fingerprint.fingerprint(stage, section, {name: digests[name] for name in producers})


def _trained_on(cfg: Section) -> dict[str, Any]:
    """What the device of a stage that trains turned out to be, and how many processes share the work."""
    if "train" not in type(cfg).model_fields:
        return {}
    settings = getattr(cfg, "train", None)
    return {"trained on": devices.facts(settings if isinstance(settings, TrainSettings) else TrainSettings())}


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
    name = _produces(stage).STAGE
    target = folder / store.PARTIAL / name
    wanted = _fingerprint(stage, config, digests)
    assert wanted is not None, f"{name} runs before a stage that it needs"
    found = None if forced else next((p for p in candidates(folder, name) if matches(p, wanted)), None)
    if found is not None and not checks.intact(found):
        progress.say(f"  {found} was changed since it was written; running the stage again.")
        found = None
    if found is None:
        origin = ""
        record = _run(stage, _section(stage, config), target, wanted, wires, digests, progress)
    else:
        origin = found.parent.name
        progress.say(f"{name}: reused from {'the interrupted run' if origin == store.PARTIAL else origin}")
        if found != target:
            store.remove(target)
            for relative, path in store.files_in(found).items():
                store.link(path, target / relative)
        kept = records.read_stage(target)
        assert kept is not None
        record = kept
    wires[_produces(stage)] = _produces(stage).load(target)
    digests[name] = record.digest
    return record, origin


def _run(
    stage: ModuleType,
    section: Section,
    target: Path,
    wanted: str,
    wires: dict[type, Any],
    digests: dict[str, str],
    progress: Progress,
) -> StageRecord:
    """Run the stage in a folder of its own that gets its real name only when complete.

    What training can go on from, of a killed run of the very same stage, stays there, and nothing else of it.
    """
    work = target.with_name(f"{target.name}.building")
    note = work / ".fingerprint"
    store.remove(target)
    if not note.is_file() or note.read_text() != wanted:
        store.remove(work)
        work.mkdir()
        note.write_text(wanted)
    for left in work.iterdir():  # by a kill, perhaps half-written
        resumed = left.suffix in loop.RESUMED and left.is_file() and not left.name.startswith(".")
        if left != note and not resumed:
            store.remove(left)
    progress.say(f"{target.name}: {(stage.__doc__ or '').strip().splitlines()[0]}")
    began = time.perf_counter()
    inputs = {parameter: wires[kind] for parameter, kind in _wires(stage).items()}
    artifact: Artifact = stage.run(section, work, **inputs)
    artifact.save()
    note.unlink()
    producers = [name for name in map(_producer, _wires(stage).values()) if name is not None]
    record = StageRecord(
        stage=target.name,
        fingerprint=wanted,
        section=records.section_digest(section),
        inputs={name: digests[name] for name in producers},
        files=records.record_files(work),
        seconds=round(time.perf_counter() - began, 3),
        metrics=artifact.scalars(),
    )
    (work / records.RECORD).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
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
    request: str,
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
            store.remove(leftover)
        (partial / records.RECIPE).write_text(recipe, encoding="utf-8")
        artifacts = tuple(wires[_produces(stage)] for stage in STAGES)
        known = store.versions(folder)
        made = Manifest(
            project=records.project_version(),
            name=folder.name,
            model=source.spec,
            version=f"v{int(known[-1].name[1:]) + 1 if known else 1:04d}",
            created=datetime.now(UTC),
            model_fingerprint=source.fingerprint,
            data_fingerprint=dataset.fingerprint,
            recipe=sha256(partial / records.RECIPE),
            stages=tuple(record for record, _ in done),
            reused={record.stage: origin for record, origin in done if origin not in ("", store.PARTIAL)},
            files={},
            parents=_parents([record for record, _ in done], dataset, sha256(partial / records.RECIPE), wires),
            tools=fingerprint.tools(),
            host=fingerprint.host_facts(),
            git=fingerprint.git_facts(),
            request=request,
        )
        if wires[Validated].verdict.outcome == "pass":
            progress.say("  bundle: golden answers and self-test")
            kinds = (Shrunk, Exported, Optimized, Validated)
            made_of = (wires[kind] for kind in kinds)
            bundling.write(partial / bundling.FOLDER, source, dataset, wires[Task], *made_of)
        report.write(partial, made, artifacts)
        stages = tuple(record.stage for record in made.stages)
        outside = {n: f for n, f in records.record_files(partial).items() if n.partition("/")[0] not in stages}
        made = made.model_copy(update={"files": outside})
        records.write(partial, made)
        with journal.locked(folder.parent):
            entry = journal.append(
                folder.parent, "seal", folder.name, made.version, state="begun", manifest=records.seal_of(partial)
            )
            release = open_release(store.seal(folder, partial))
            journal.finish(folder.parent, entry, "done")
    make_current(release, promote, same is not None, progress)
    return release


def _parents(records: list[StageRecord], dataset: Data, recipe: str, wires: dict[type, Any]) -> dict[str, str]:
    """The digests that lead back from a version to what it was made from and compared with."""
    compared: Promoted = wires[Promoted]
    other = {"promoted version": compared.version, "promoted model": compared.sha256} if compared.version else {}
    return checks.parents(records, dataset.fingerprint, recipe) | other


def _same_version(folder: Path, recipe: str, made: list[StageRecord]) -> Path | None:
    """A version with the same recipe and the very same stages, and every byte still as it was."""
    for version in reversed(store.versions(folder)):
        if (version / records.RECIPE).is_file() and (version / records.RECIPE).read_text(encoding="utf-8") == recipe:
            found = records.read_if_whole(version)
            if found is not None and list(found.stages) == made and not checks.faults(version):
                return version
    return None
