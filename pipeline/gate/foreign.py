"""Models made elsewhere, measured and judged like a version of ours; no more is asked of them than to be files."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

from exporters.summary import external_files, read_graph
from exporters.to_ort import session_of
from foundation.errors import ConfigError, DataError, ValidationError, first_line
from foundation.files import sha256 as sha256_of
from pipeline.data.parts import Data
from pipeline.gate import measuring, policy
from pipeline.progress import Progress
from pipeline.recipe.policy import GateSection, Rule
from pipeline.recipe.task import TaskSection
from pipeline.tasks import find as tasks
from pipeline.tasks.task import Task
from validators.divergence import first_divergence, repro_pack
from validators.feeds import BATCHES, Feed, real_feeds
from validators.gates import Measured, Verdict
from validators.parity import compare
from validators.runners import Array, InputSpec, OrtRunner
from validators.scores_lost import ScoreLost
from validators.trials import plan, suited

REPRO = "repro.zip"


# The largest that the arrays of one file of inputs may be in memory.
LARGEST_INPUTS = 2 << 30


@dataclass(frozen=True)
class Given:
    """What a user says about the models' inputs; all of it may be left out.

    `sizes`: dynamic dimension -> the sizes to try. `ranges`: input -> its values, both ends included. `inputs`: .npz
    files, each with one array per input. `seed` draws what is made up; None: by the files' own bytes.
    """

    sizes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    inputs: Sequence[Path] = ()
    seed: int | None = None


@dataclass(frozen=True)
class Judgement:
    """A verdict on files, what it rests on, and what a reader should know beside it."""

    verdict: Verdict
    notes: tuple[str, ...]
    measurements: Mapping[str, Measured | None]
    task: str = ""
    scores: tuple[ScoreLost, ...] = ()


def existing(files: Iterable[Path]) -> None:
    """Raise ConfigError for a file that is not there."""
    for path in files:
        if not path.is_file():
            raise ConfigError(f"There is no file {path}.", "Check the path.")


def judge_files(
    cfg: GateSection,
    files: Mapping[str, Path],
    data: Data | None,
    progress: Progress,
    *,
    section: TaskSection | None = None,
    equal: Path | None = None,
    given: Given | None = None,
    answers_only: bool = False,
    report: Path | None = None,
) -> Judgement:
    """Measure the file "shipped" against "dense" (and "promoted"), and judge it; what cannot be measured fails.

    `equal`: a file that must compute the same. `given` says more about the inputs. `answers_only`: of the
    policy's limits, only those on answers count. `report`: a folder that takes a repro pack where two files differ.
    Raises UserError where what is given does not fit.
    """
    given = given or Given()
    task: Task | None = None
    if data is not None:
        data, task = _met(data, section or TaskSection(), files.get("dense", files["shipped"]))
    if given.inputs and equal is None:
        raise ConfigError("--inputs are for comparing two files.", "Name the other one: --equal-to FILE.onnx")
    measurements: dict[str, Measured | None] = {}
    notes: list[str] = []
    hops: list[str] = []
    crashed = measuring.Crashes()
    if equal is not None:
        key = f"{policy.PARITY}{equal.name} - {files['shipped'].name}"
        hops.append(key)
        with crashed.noted("parity"):
            measured, found = _parity(cfg, equal, files["shipped"], data, given, report)
            measurements[key] = measured
            notes += found
    sizes, ranges = {name: values[0] for name, values in given.sizes.items()}, dict[str, tuple[int, int]]()
    with crashed.noted("inputs"):
        # Their names for a dimension may differ; where one name stands for two sizes, the shipped file's counts.
        named = [name for name in files if name != "shipped"] + ["shipped"]
        runners = [OrtRunner(files[name], threads=cfg.threads, session=session_of(files[name])) for name in named]
        _fitting([spec for runner in runners for spec in runner.inputs], given)
        for runner in runners:
            graph = _graph(runner.path, *files.values())
            fit = suited(runner, graph=graph, batch=cfg.batch_size, sizes=given.sizes, ranges=given.ranges)
            sizes, ranges = sizes | fit[0], ranges | fit[1]
    findings = measuring.contest(cfg, files, data, progress, task=task, sizes=sizes, ranges=ranges)
    crashed |= findings.crashed
    measurements |= findings.measurements
    notes += findings.notes
    counts = {
        name: measuring.counts(cfg, name, path, crashed, sizes=sizes, ranges=ranges) for name, path in files.items()
    }
    measurements |= {key: policy.exactly(count) for key, count in counts["shipped"].items()}
    for name in counts:
        if name != "shipped":
            measurements |= measuring.against(counts["shipped"], counts[name], name)
    judged = judged_by(task, data)
    rules: Sequence[Rule] | None = None
    if answers_only:
        rules = policy.answer_rules(cfg, judged) if data is not None else ()
    verdict, left = policy.decide(
        cfg,
        measurements,
        hops=hops,
        promoted="promoted" in files,
        judged=judged,
        given=rules,
        crashed=crashed,
    )
    what = "" if data is None else "classification" if task is None else task.name
    return Judgement(verdict, (*left, *notes), measurements, what, findings.scores.get("dense", ()))


def judged_by(task: Task | None, data: Data | None) -> policy.Judged:
    """What of the answers is judged."""
    if task is None:
        return policy.Judged(labelled=data is None or data.labelled)
    return policy.Judged.of(task, labelled=data is None or data.labelled)


def _met(data: Data, section: TaskSection, file: Path) -> tuple[Data, Task | None]:
    """`data` with the names that the file gives its inputs, and what it is for; None: classes, by the first output."""
    try:
        runner = OrtRunner(file, threads=1, session=session_of(file))
    except ValidationError:  # told where it is measured
        return data, None
    names = [spec.name for spec in runner.inputs]
    given = [one.name for one in data.inputs]
    if len(given) != len(names) or (all(given) and set(given) != set(names)):
        raise DataError(
            f"{file.name} takes {', '.join(names)}; {data.name} gives "
            f"{', '.join(given) if all(given) else f'{len(given)} without names'}.",
            "Give data with these inputs.",
        )
    if not all(given):
        data = replace(data, inputs=tuple(replace(one, name=n) for one, n in zip(data.inputs, names, strict=True)))
    if section.name == "auto" and section.output is None and data.labelled and data.classes is not None:
        return data, None
    feed, target = next(data.some("test", 2).feeds("test", 2))
    try:
        outputs = {name: torch.from_numpy(value) for name, value in runner.infer(feed).items()}
    except ValidationError:
        return data, None
    first = next(iter(outputs.values()))
    if section.name == "auto" and not data.labelled and data.input_size is not None and first.dim() == 2:
        return data, None
    target = target if data.labelled else None
    return data, tasks.choose(
        section, data, outputs, target, file.name, len(next(iter(feed.values()))), image=data.input_size is not None
    )


def _parity(
    cfg: GateSection, equal: Path, shipped: Path, data: Data | None, given: Given, report: Path | None
) -> tuple[Measured | None, list[str]]:
    """The largest scaled difference over all feeds; what was tried, and where the two part if they do."""
    reference, candidate = (OrtRunner(path, threads=cfg.threads, session=session_of(path)) for path in (equal, shipped))
    _fitting(reference.inputs, given)
    digests = [digest(path) for path in (equal, shipped)]
    trial = plan(
        reference,
        candidate,
        graph=_graph(equal, shipped),
        seed=int(sha256("".join(digests).encode()).hexdigest()[:7], 16) if given.seed is None else given.seed,
        sizes=given.sizes,
        ranges=given.ranges,
        given=[
            *(read_inputs(path, reference.inputs) for path in given.inputs),
            *(_real(reference, data) if data is not None else ()),
        ],
    )
    found = compare(reference, candidate, trial.feeds(), atol=cfg.parity, rtol=0.0)
    if found.passed and trial.unknown and digests[0] != digests[1]:
        name = trial.unknown[0]
        raise ValidationError(
            f"the range of the integer input {', '.join(trial.unknown)} cannot be read off {equal.name}, and no "
            "difference was found on guesses.",
            f"Give it: --range {name}=LOW:HIGH, or inputs: --inputs FILE.npz",
        )
    notes = [*found.reasons[:5], *found.notes[:5], f"compared on {len(found.feeds)} feeds: {trial.notes[0]}"]
    notes += trial.notes[1:]
    if not found.passed and found.worst is not None and {equal.suffix, shipped.suffix} == {".onnx"}:
        worst = next(feed for feed in trial.feeds() if feed.label == found.worst.feed)
        try:
            notes += _divergence(equal, shipped, worst, cfg.parity, report)
        except Exception as error:  # of any graph: that they differ is known all the same
            notes.append(f"where they part could not be found: {first_line(error)}")
    return policy.exactly(found.judged), notes


def _graph(*files: Path) -> Path | None:
    """The first of `files` whose graph can be read."""
    return next((path for path in files if path.suffix == ".onnx"), None)


def _fitting(inputs: Sequence[InputSpec], given: Given) -> None:
    """Raise ConfigError for a range or size of something that the model does not take."""
    names = {spec.name: spec for spec in inputs}
    dims = {size for spec in inputs for size in spec.shape if isinstance(size, str)}
    for name, (low, high) in given.ranges.items():
        if name not in names:
            raise ConfigError(f"--range {name}: there is no such input.", f"There are {', '.join(names)}.")
        if names[name].dtype not in ("float16", "float32", "float64", "bool"):
            info = np.iinfo(names[name].dtype)
            if low != int(low) or high != int(high) or low < info.min or high > info.max:
                raise ConfigError(f"--range {name}: {names[name].dtype} does not hold {low:g} to {high:g}.")
    terms = dims | {term.strip() for dim in dims for term in dim.split("+")}
    for name in given.sizes:
        if name not in terms:
            raise ConfigError(
                f"--size {name}: no input has such a dimension.", f"There are {', '.join(sorted(dims)) or 'none'}."
            )


def read_inputs(path: Path, inputs: Sequence[InputSpec]) -> Feed:
    """One feed from an .npz file with an array for each of `inputs`. Raises DataError where they do not fit."""
    hint = f"Save them with numpy.savez({path.name!r}, {', '.join(f'{spec.name}=...' for spec in inputs)})."
    try:
        with zipfile.ZipFile(path) as packed:
            size = sum(entry.file_size for entry in packed.infolist())
        if size > LARGEST_INPUTS:
            raise DataError(f"{path} holds {size} bytes; at most {LARGEST_INPUTS} are read.", "Give fewer at once.")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except DataError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise a dozen classes that share no base
        raise DataError(f"{path} cannot be read as .npz: {first_line(error)}", hint) from error
    if odd := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise DataError(f"{path} holds {odd[0]}, which is no array.", hint)
    if arrays.keys() != {spec.name for spec in inputs}:
        raise DataError(
            f"{path} holds {', '.join(arrays) or 'nothing'}; the model takes {', '.join(s.name for s in inputs)}.", hint
        )
    return Feed(f"inputs {path.name}", {spec.name: _cast(path, spec, arrays[spec.name]) for spec in inputs})


def _cast(path: Path, spec: InputSpec, array: Array) -> Array:
    """`array` in the input's type, where that changes no number by more than rounding. Raises DataError."""
    try:
        wanted = np.dtype(spec.dtype)
    except TypeError:
        wanted = np.dtype(object) if spec.dtype == "string" else array.dtype
    fits = len(array.shape) == len(spec.shape) and all(
        isinstance(size, str) or size == found for size, found in zip(spec.shape, array.shape, strict=True)
    )
    if not fits:
        raise DataError(f"{path}: {spec.name} has the shape {array.shape}; the model takes {spec.shape}.")
    made = array.astype(wanted) if array.dtype.kind in "iufbU" else array
    same_kind = (array.dtype.kind in "f") == (wanted.kind in "f")
    if made is array or not same_kind or (wanted.kind in "iub" and not np.array_equal(made, array)):
        raise DataError(f"{path}: {spec.name} holds {array.dtype}; the model takes {spec.dtype}.")
    return made


def _real(runner: OrtRunner, data: Data) -> list[Feed]:
    """Test samples at every batch size that the model takes; none for a model that takes more than images."""
    batch = runner.inputs[0].shape[0]
    if {spec.name for spec in runner.inputs} != {one.name for one in data.inputs}:
        return []
    batches = (batch,) if isinstance(batch, int) else BATCHES
    return real_feeds(data.arrays("test", max(batches)), batches=batches)


def digest(path: Path) -> str:
    """What the file at `path` and the weights beside it are, as one digest."""
    beside = external_files(read_graph(path), path) if path.suffix == ".onnx" else ()
    return "".join((sha256_of(path), *(sha256_of(path.parent / name) for name in beside)))


def _divergence(reference: Path, candidate: Path, feed: Feed, atol: float, report: Path | None) -> list[str]:
    """Where two files part, in one line; with a report folder, a repro pack is written into it."""
    if report is None:
        found = first_divergence(reference, candidate, feed, atol=atol)
        return [f"{candidate.name} {found.words}"] if found else []
    report.mkdir(parents=True, exist_ok=True)
    found = repro_pack(reference, candidate, feed, report / REPRO, atol=atol)
    return [f"{candidate.name} {found.words}; see {report / REPRO}"] if found else []
