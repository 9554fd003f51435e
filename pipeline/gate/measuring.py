"""Everything that a policy can limit, measured on ONNX files: accuracy, latency, size, load, memory.

The models are called "shipped" (the one that is judged), "dense" (what it was made from) and, where there is one,
"promoted" (the version that is live).
"""

from __future__ import annotations

import contextlib
import errno
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from exporters.summary import describe
from exporters.to_ort import session_of
from foundation.errors import ConfigError, UserError, ValidationError, first_line
from pipeline.data.parts import Data
from pipeline.gate import policy
from pipeline.gate.policy import rules
from pipeline.models.feeding import answers_of
from pipeline.models.from_code import load_callable
from pipeline.progress import Progress
from pipeline.recipe.policy import GateSection, Policy
from pipeline.tasks.pictures import compared as drawn
from pipeline.tasks.task import Task
from validators.accuracy import (
    AccuracyComparison,
    AccuracyReport,
    Metric,
    Similarity,
    agreement,
    chance_of_guessing,
    compare_accuracy,
    cosine,
    evaluate,
    first_output,
    similarity,
    top_k,
)
from validators.feeds import Feed, random_feeds
from validators.gates import Measured
from validators.integers import Ranges
from validators.latency import Bound, LatencyReport, duels
from validators.macs import count_macs
from validators.runners import Array, InputSpec, OrtRunner, same_inputs
from validators.scores import Worse, chance_of_dealing, compared, run, worst
from validators.scores_lost import ScoreLost
from validators.structure import StructureReport, measure

EVALUATION_BATCH = 64
PICTURES = 24
"""Test samples that got worse, at most, as a report shows them."""
PREDICTED = 2000
"""Predicted numbers, at most, that a report shows over the true ones."""
COSINE_SAMPLES = 1000
"""Of the test part, for the cosine of the outputs with the dense ones; answers are compared on all of it."""
_SIMILARITIES = ("cosine", "spearman")


class Crashes(dict[str, str]):
    """What could not be measured -> why. A validator that breaks off measured nothing, and the others still run."""

    @contextlib.contextmanager
    def noted(self, validator: str) -> Iterator[None]:
        """End the block at whatever it raises, and keep why.

        What the user gave wrongly is raised on (UserError), and so is a disk that cannot be written to: neither says
        anything about the model.
        """
        try:
            yield
        except (UserError, KeyboardInterrupt):
            raise
        except BaseException as error:  # models and metrics are other people's code, and may call sys.exit
            if isinstance(error, OSError) and error.errno in _NO_DISK:
                raise
            self.note(validator, error)

    def note(self, validator: str, error: BaseException) -> None:
        """Keep why `validator` broke off: the first reason is the one that counts."""
        kind = "" if isinstance(error, ValidationError) else f"{type(error).__name__}: "
        self.setdefault(validator, f"{kind}{first_line(error)}")


_NO_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class Findings:
    """What was measured: reports by the name of the other model, structures by model, and a policy's measurements.

    `crashed` names the validators that broke off, and why; what they would have measured is missing.
    """

    latency: LatencyReport | None = None
    structure: dict[str, StructureReport] = field(default_factory=dict)
    accuracy: dict[str, AccuracyComparison] = field(default_factory=dict)
    similarity: dict[str, Similarity] = field(default_factory=dict)
    scores: dict[str, tuple[ScoreLost, ...]] = field(default_factory=dict)
    measurements: dict[str, Measured | None] = field(default_factory=dict)
    crashed: Mapping[str, str] = field(default_factory=dict)
    labelled: bool = True
    worse: Mapping[int, tuple[Worse, Image.Image]] = field(default_factory=dict)
    """Test samples that lost most of the task's score against the dense model, as the task draws them."""
    predicted: Mapping[str, Array] = field(default_factory=dict)
    """Of a task whose outputs are numbers, what is true ("truth") and what each model gives, of some test samples."""
    left_out: tuple[str, ...] = ()
    """Why a model was not measured at all."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know beside the figures: what was not compared, the class that lost most, and what
        disturbed the race.
        """
        lost = (worst_class(found) for name, found in self.accuracy.items() if name == "dense" and self.labelled)
        return (*self.left_out, *(note for note in lost if note), *(self.latency.warnings if self.latency else ()))


def worst_class(found: AccuracyComparison) -> str:
    """The class that lost most right answers, in words; "" where none lost any."""
    label, counts = max(found.per_class.items(), key=lambda entry: entry[1].dense - entry[1].shipped)
    if counts.dense <= counts.shipped:
        return ""
    called = Counter(flip.shipped for flip in found.flipped if flip.label == label and flip.dense == label)
    return (
        f"class {label} lost most: {counts.dense} of its {counts.samples} samples were right before, "
        f"{counts.shipped} are now; the lost ones are mostly called {called.most_common(1)[0][0]}"
    )


def metrics(cfg: GateSection) -> tuple[dict[str, Metric], tuple[str, ...]]:
    """The recipe's further metrics: those that score each sample, by name, and those that compare embeddings.

    Raises ConfigError for one that cannot be found, or that goes by the name of another: the name is the key that a
    limit asks for, so that either would be judged in place of the other.
    """
    scores: dict[str, Metric] = {}
    for name in dict.fromkeys(cfg.metrics):
        if name == "top5":
            scores[name] = top_k(5)
        elif name not in _SIMILARITIES:
            if ":" not in name:
                raise ConfigError(
                    f"gate.metrics: there is no metric {name!r}.",
                    f"There are top5, {', '.join(_SIMILARITIES)}, and path/to/file.py:callable.",
                )
            own = name.rpartition(":")[2]
            if own in policy.MEASURED or own in _SIMILARITIES:
                raise ConfigError(f"gate.metrics: the gate itself measures a {own}.", "Give the callable another name.")
            if own in scores:
                raise ConfigError(f"gate.metrics: two metrics are called {own}.", "Give one of them another name.")
            scores[own] = load_callable(name, ConfigError)[0]
    return scores, _similarities_of(cfg)


def _similarities_of(cfg: GateSection) -> tuple[str, ...]:
    return tuple(name for name in _SIMILARITIES if name in cfg.metrics)


def contest(
    cfg: GateSection,
    files: Mapping[str, Path],
    data: Data | None,
    progress: Progress,
    *,
    task: Task | None = None,
    sizes: Mapping[str, int] | None = None,
    ranges: Ranges | None = None,
    sessions: Mapping[str, Mapping[str, str]] | None = None,
) -> Findings:
    """Measure the file "shipped" against the others. `sizes` gives dynamic dimensions other than the batch.

    `task`: what the data is for; None: classes, by the first output. `ranges` gives integer inputs their half-open
    range of values.
    `sessions` holds session configuration entries by model, where one needs others than its file asks for.

    Without `data` there is no accuracy. Whatever breaks off is in the findings' `crashed`; only UserError and a full
    disk are raised. A promoted version that takes other inputs, since the recipe asks for another size of them, say, is
    left out.
    """
    crashed = Crashes()
    entries = {name: (sessions or {}).get(name) or session_of(path) for name, path in files.items()}
    runners: dict[str, OrtRunner] = {}
    for name, path in files.items():
        with crashed.noted(f"session load of {name}"):
            runners[name] = OrtRunner(path, threads=cfg.threads, name=name, session=entries[name])
    left_out: tuple[str, ...] = ()
    if {"promoted", "shipped"} <= runners.keys():
        before, now = runners["promoted"].inputs, runners["shipped"].inputs
        if not same_inputs(before, now):
            left_out = (f"the promoted version takes {_words(before)}, this one {_words(now)}: they are not compared",)
            files = {name: path for name, path in files.items() if name != "promoted"}
            del runners["promoted"]
    others = [name for name in files if name != "shipped"]
    found: dict[str, Measured | None] = {}
    accuracy: dict[str, AccuracyComparison] = {}
    similarities: dict[str, Similarity] = {}
    scores: dict[str, tuple[ScoreLost, ...]] = {}
    worse: dict[int, tuple[Worse, Image.Image]] = {}
    predicted: dict[str, Array] = {}
    latency: LatencyReport | None = None
    structure: dict[str, StructureReport] = {}
    if runners.keys() == files.keys():  # else nothing that compares them can be told
        if data is not None:
            with crashed.noted("score" if task is not None and not task.classes else "accuracy"):
                if task is not None and not task.classes:
                    lost, judged, worse = _scored(cfg, runners, data, task, progress)
                    found |= judged
                    scores |= lost
                    predicted = _predicted(runners, data, task)
                else:
                    main = None if task is None else task.reads[0]
                    data = _with_labels(data, runners, progress)
                    reports = _evaluated(cfg, runners, data, main, progress, crashed)
                    judged, accuracy = _answered(cfg, runners, data, reports, main)
                    found |= judged
                    scores |= {name: (_as_score(one),) for name, one in accuracy.items()}
                similarities = _similarities(cfg, runners, data, crashed)
                if "dense" in similarities:
                    asked = _similarities_of(cfg)
                    found |= {name: policy.exactly(getattr(similarities["dense"], name)) for name in asked}
        with crashed.noted("latency"):
            latency = _latency(cfg, runners, progress, sizes, ranges)
            mine = latency.runners["shipped"]
            found |= {"latency": policy.exactly(mine.median_ms), "latency_p99": policy.exactly(mine.p99_ms)}
            for name in others:
                found[f"latency vs {name}"] = mine.ratios[name].median
                found[f"latency_p99 vs {name}"] = mine.ratios[name].p99
    for name, runner in runners.items():
        with crashed.noted(f"size, load and memory of {name}"):
            feed = _feed(cfg, runner, sizes, ranges)
            structure[name] = measure(files[name], feed, threads=cfg.threads, session=entries[name])
    costs = {name: _costs(report) for name, report in structure.items()}
    if "shipped" in costs:
        found |= {key: policy.exactly(value) for key, value in costs["shipped"].items()}
        for name in costs:
            if name != "shipped":
                found |= against(costs["shipped"], costs[name], name)
    labelled = data is None or data.labelled
    return Findings(
        latency, structure, accuracy, similarities, scores, found, crashed, labelled, worse, predicted, left_out
    )


def _words(inputs: Sequence[InputSpec]) -> str:
    """Inputs as a reader wants them: "input (batch, 3, 32, 32) float32"."""
    return ", ".join(f"{one.name} ({', '.join(map(str, one.shape))}) {one.dtype}" for one in inputs)


def _answered(
    cfg: GateSection,
    runners: Mapping[str, OrtRunner],
    data: Data,
    reports: Mapping[str, AccuracyReport],
    main: str | None,
) -> tuple[dict[str, Measured | None], dict[str, AccuracyComparison]]:
    """What classifiers' answers show, and "shipped" compared with each other one."""
    found: dict[str, Measured | None] = {}
    own = reports["shipped"]
    if data.labelled:
        found |= {"accuracy": policy.exactly(own.top1)}
        found |= {name: policy.exactly(float(np.mean(values))) for name, values in own.scores.items()}
    compared = {
        name: compare_accuracy(report, own, seed=cfg.seed) for name, report in reports.items() if name != "shipped"
    }
    for name, one in compared.items():
        found |= _lost(name, one) if data.labelled else {}
    if data.labelled:  # the score by that name, too, unless a metric of the user's own has it
        for key in [key for key in found if key.partition(" vs ")[0] == "accuracy"]:
            found.setdefault(key.replace("accuracy", policy.SCORE), found[key])
    if "dense" in reports:
        found[policy.AGREEMENT] = agreement(reports["dense"], own)
        found[policy.GUESSED] = policy.exactly(chance_of_guessing(reports["dense"]))
        found[policy.COSINE] = _cosine(runners, data, main)
    return found, compared


def _as_score(found: AccuracyComparison) -> ScoreLost:
    return ScoreLost(
        name="accuracy",
        dense=found.dense,
        shipped=found.shipped,
        samples=found.samples,
        share=True,
        higher_is_better=True,
        drop=found.drop,
        p_value=found.p_value,
    )


def _scored(
    cfg: GateSection, runners: Mapping[str, OrtRunner], data: Data, task: Task, progress: Progress
) -> tuple[dict[str, tuple[ScoreLost, ...]], dict[str, Measured | None], dict[int, tuple[Worse, Image.Image]]]:
    """The task's scores of "shipped" against each other model, what a policy can limit of them, and the samples that
    lost most against "dense".
    """
    if task.taught and data.answer is None:
        if "dense" not in runners:
            raise ValidationError(f"{data.name} has no labels, and there is no model to be like.")
        data = data.answered_by(answers_of(runners["dense"]))
    progress.say(f"  {', '.join(score.name for score in task.scores)} on {len(data.test)} test samples")
    batch = min(EVALUATION_BATCH, task.batch)
    reports = {
        name: run(one, data.feeds("test", batch), task.scores, deal=name == "dense" and not data.made_up)
        for name, one in runners.items()
    }
    own = reports["shipped"]
    found: dict[str, Measured | None] = {name: policy.exactly(one.value) for name, one in own.items()}
    lost: dict[str, tuple[ScoreLost, ...]] = {}
    for name, report in reports.items():
        if name == "shipped":
            continue
        lost[name] = tuple(compared(score, report[score.name], own[score.name], seed=cfg.seed) for score in task.scores)
        found |= {f"{one.name} vs {name}": one.drop for one in lost[name]}
        found[f"{policy.SCORE} vs {name}"] = lost[name][0].drop
    found[policy.SCORE] = found[task.score.name]
    if "dense" in runners and not data.made_up:
        chance = chance_of_dealing(task.score, reports["dense"][task.score.name], seed=cfg.seed)
        found[policy.GUESSED] = policy.exactly(chance)
        found[policy.COSINE] = _cosine(runners, data, task.reads[0])
    worse: dict[int, tuple[Worse, Image.Image]] = {}
    if "dense" in runners and task.drawn is not None:
        most = worst(task.score, reports["dense"][task.score.name], own[task.score.name], PICTURES)
        dense, shipped = (answers_of(runners[name]) for name in ("dense", "shipped"))
        pictures = drawn(data, [one.sample for one in most], dense, shipped, task.drawn)
        worse = {one.sample: (one, pictures[one.sample]) for one in most}
    return lost, found, worse


def _predicted(runners: Mapping[str, OrtRunner], data: Data, task: Task) -> dict[str, Array]:
    """`Findings.predicted`: `PREDICTED` numbers at most, evenly spaced over the test part."""
    found: dict[str, list[Array]] = {}
    if task.numbers is None:
        return {}
    models = {name: answers_of(runner) for name, runner in runners.items()}
    for inputs, target in data.some("test", PREDICTED).batches("test", EVALUATION_BATCH):
        for name, model in models.items():
            given, true = task.numbers(model(*inputs), target)
            found.setdefault(name, []).append(given.numpy().ravel())
        found.setdefault("truth", []).append(true.numpy().ravel())
    every = {name: np.concatenate(parts) for name, parts in found.items()}
    step = -(-len(every["truth"]) // PREDICTED)
    return {name: values[::step] for name, values in every.items()}


def _with_labels(data: Data, runners: Mapping[str, OrtRunner], progress: Progress) -> Data:
    """`data`, and where it has neither labels nor answers yet, those of the model "dense" to its test part.

    Raises ValidationError where there is no such model, or an answer of it is not finite.
    """
    if data.classes is not None:
        return data
    if "dense" not in runners:
        raise ValidationError(f"{data.name} has no labels, and there is no model to agree with.")
    progress.say(f"  {data.name} has no labels: the dense model's answers stand in their place")
    answers: list[Array] = []
    for x, _ in data.feeds("test", EVALUATION_BATCH):
        outputs = first_output(runners["dense"], x)
        if outputs.ndim != 2 or outputs.shape[1] < 2:
            raise ValidationError(
                f"Outputs of shape {outputs.shape} hold no answer to agree with.", "Give outputs (samples, 2 or more)."
            )
        if not np.isfinite(outputs).all():
            raise ValidationError("The dense model gives NaN or infinity.", "Check its weights and the data.")
        answers.append(outputs.argmax(1))
    return data.answered({"test": torch.from_numpy(np.concatenate(answers))}, outputs.shape[1])


def _cosine(runners: Mapping[str, OrtRunner], data: Data, main: str | None = None) -> Measured | None:
    """Mean cosine of the output `main` (None: the first) of "shipped" with that of "dense", over test samples evenly
    spaced.

    None where an output has no direction: zero, as the logits of a model that ends in a ReLU can be, or not finite.
    """
    some = data.some("test", COSINE_SAMPLES).feeds("test", EVALUATION_BATCH)
    try:
        return policy.exactly(cosine(runners["dense"], runners["shipped"], some, output=main))
    except ValidationError:
        return None


def _evaluated(
    cfg: GateSection,
    runners: Mapping[str, OrtRunner],
    data: Data,
    main: str | None,
    progress: Progress,
    crashed: Crashes,
) -> dict[str, AccuracyReport]:
    """Every model on the test part; an own metric that breaks off is left out of all reports, with its reason noted."""
    progress.say(f"  {'accuracy' if data.labelled else 'agreement with dense'} on {len(data.test)} test samples")
    scores, _ = metrics(cfg)
    guarded = {name: _guarded(name, metric, crashed) for name, metric in scores.items()}
    reports = {
        name: evaluate(runner, data.feeds("test", EVALUATION_BATCH), output=main, metrics=guarded)
        for name, runner in runners.items()
    }
    broken = {name for name in scores if _of_metric(name) in crashed}
    return {
        name: report.model_copy(update={"scores": {k: v for k, v in report.scores.items() if k not in broken}})
        for name, report in reports.items()
    }


def _lost(name: str, compared: AccuracyComparison) -> dict[str, Measured | None]:
    """What was lost against the model `name`: accuracy and top-5 in points, any other metric in its own unit."""
    drops = {
        f"{metric} vs {name}": _times(score.drop, 100.0 if metric == "top5" else 1.0)
        for metric, score in compared.scores.items()
    }
    return {f"accuracy vs {name}": compared.drop, **drops}


def _similarities(
    cfg: GateSection, runners: Mapping[str, OrtRunner], data: Data, crashed: Crashes
) -> dict[str, Similarity]:
    """How alike the embeddings of "shipped" and of each other model are, where the recipe asks for that."""
    found: dict[str, Similarity] = {}
    for name in runners if _similarities_of(cfg) else ():
        if name != "shipped":
            with crashed.noted(f"similarity to {name}"):
                found[name] = similarity(runners[name], runners["shipped"], data.feeds("test", EVALUATION_BATCH))
    return found


def _of_metric(name: str) -> str:
    return f"metric {name}"


_NO_NUMBERS = {"U": "text", "S": "text", "c": "complex numbers", "M": "dates", "m": "times", "V": "records"}
"""What numpy would turn into floats, or fail to, by the letter of its kind."""
_LARGEST_SCORE = 1e300
"""Beyond it, the sum of a set's scores or a difference of two would be infinite."""


def _guarded(name: str, metric: Metric, crashed: Crashes) -> Metric:
    """`metric`, but what it raises, or a score that is no number, is kept as its own crash: accuracy goes on."""

    def score(outputs: Array, labels: Array) -> Array:
        nothing = np.full(labels.shape, np.nan)
        try:
            given = np.asarray(metric(outputs, labels))
            if given.dtype.kind not in _NO_NUMBERS:
                made = given.astype(np.float64)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the user's own code, which may call sys.exit
            crashed.note(_of_metric(name), error)
            return nothing
        if given.dtype.kind in _NO_NUMBERS:
            wrong = f"it gave {_NO_NUMBERS[given.dtype.kind]} where numbers should be"
            crashed.note(_of_metric(name), ValidationError(wrong))
            return nothing
        if made.shape != labels.shape:
            wrong = f"it gave an array of shape {made.shape} for {len(labels)} samples"
            crashed.note(_of_metric(name), ValidationError(wrong))
            return nothing
        if not (np.abs(made) < _LARGEST_SCORE).all():
            crashed.note(_of_metric(name), ValidationError("it gave a score that is not a finite number"))
            return nothing
        return made

    return score


def _latency(
    cfg: GateSection,
    runners: Mapping[str, OrtRunner],
    progress: Progress,
    sizes: Mapping[str, int] | None,
    ranges: Ranges | None,
) -> LatencyReport:
    progress.say(f"  latency of {', '.join(runners)}, {cfg.threads} thread(s), batch {cfg.batch_size}")
    return duels(
        runners,
        _feed(cfg, runners["shipped"], sizes, ranges),
        one="shipped",
        reference="dense" if "dense" in runners else "shipped",
        seconds=cfg.seconds,
        seed=cfg.seed,
        bounds=[b for b in bounds(cfg, promoted="promoted" in runners) if b.reference in runners],
    )


def bounds(policy: Policy, *, promoted: bool) -> list[Bound]:
    """The questions that the latency race has to decide for this policy."""
    found = []
    for rule in rules(policy):
        of = {"latency": "median", "latency_p99": "p99"}.get(rule.metric)
        if of is None or rule.against is None or (rule.against == "promoted" and not promoted):
            continue
        found += [
            Bound("shipped", rule.against, value, of)
            for value in (rule.max, rule.min)
            if value is not None and math.isfinite(value)
        ]
    return found


def _feed(
    cfg: GateSection,
    runner: OrtRunner,
    sizes: Mapping[str, int] | None,
    ranges: Ranges | None,
) -> Feed:
    return random_feeds(runner.inputs, seed=cfg.seed, batches=(cfg.batch_size,), sizes=sizes, ranges=ranges)[0]


def against(
    mine: Mapping[str, float | None], theirs: Mapping[str, float | None], name: str
) -> dict[str, Measured | None]:
    """Ratios of counted figures, by key; None where either is missing."""
    return {
        f"{key} vs {name}": policy.exactly(value / other) if value is not None and (other := theirs.get(key)) else None
        for key, value in mine.items()
    }


def _costs(report: StructureReport) -> dict[str, float | None]:
    return {
        "file_size": report.bytes,
        "session_load": report.load_ms,
        "peak_memory": report.peak_rss,
        "cold_first_inference": report.cold_first_ms,
    }


def counts(
    cfg: GateSection,
    name: str,
    path: Path,
    crashed: Crashes,
    *,
    sizes: Mapping[str, int] | None = None,
    ranges: Ranges | None = None,
) -> dict[str, float | None]:
    """How many weights the file of the model `name` holds, and multiply-accumulates per sample; None: not countable."""
    found: dict[str, float | None] = {"parameters": None, "macs": None}
    if path.suffix == ".ort":
        return found
    with crashed.noted(f"parameters of {name}"):
        found["parameters"] = describe(path).parameters
    with crashed.noted(f"MACs of {name}"):
        found["macs"] = count_macs(path, _feed(cfg, OrtRunner(path, threads=cfg.threads), sizes, ranges))
    return found


def parse_sizes(given: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """`name=value` or `name=value,value` for each dynamic dimension. Raises ConfigError."""
    sizes: dict[str, tuple[int, ...]] = {}
    for text in given:
        name, _, values = text.partition("=")
        numbers = [_whole(value) for value in values.split(",")]
        if not name or not all(number and 0 < number <= _LARGEST_SIZE for number in numbers):
            raise ConfigError(f"--size {_short(text)} is not NAME=NUMBER.", "Write it like --size sequence=128")
        sizes[name] = tuple(number for number in numbers if number)
    return sizes


def parse_ranges(given: Sequence[str]) -> dict[str, tuple[float, float]]:
    """`name=low:high`, both ends included, for each input. Raises ConfigError."""
    ranges: dict[str, tuple[float, float]] = {}
    for text in given:
        name, _, values = text.rpartition("=")
        ends = [_number(value) for value in values.split(":")]
        known = [end for end in ends if end is not None]
        if not name or len(ends) != 2 or len(known) != 2 or known[0] > known[1]:
            raise ConfigError(f"--range {_short(text)} is not NAME=LOW:HIGH.", "Write it like --range ids=0:30521")
        ranges[name] = (known[0], known[1])
    return ranges


_LARGEST_SIZE = 1 << 31


def _whole(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 10 else None


def _number(text: str) -> float | None:
    """A finite number; whole ones stay exact."""
    if re.fullmatch(r"[+-]?[0-9]{1,20}", text.strip()):
        return int(text)
    try:
        made = float(text)
    except ValueError:
        return None
    return made if math.isfinite(made) else None


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")


def _times(measured: Measured, factor: float) -> Measured:
    return Measured(value=factor * measured.value, low=factor * measured.low, high=factor * measured.high)
