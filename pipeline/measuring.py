"""Everything that a policy can limit, measured on ONNX files: accuracy, latency, size, load, memory.

The models are called "shipped" (the one that is judged), "dense" (what it was made from) and, where there is one,
"promoted" (the version that is live).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from exporters import describe
from pipeline import policy
from pipeline.config import GateSection
from pipeline.data import Data
from pipeline.errors import ConfigError
from pipeline.models.from_code import load_callable
from pipeline.progress import Progress
from validators import (
    AccuracyComparison,
    LatencyReport,
    Measured,
    Metric,
    OrtRunner,
    Similarity,
    StructureReport,
    compare_accuracy,
    evaluate,
    measure,
    race,
    random_feeds,
    similarity,
    top_k,
)

EVALUATION_BATCH = 64
_SIMILARITIES = ("cosine", "spearman")


@dataclass(frozen=True)
class Findings:
    """What was measured: reports by the name of the other model, structures by model, and a policy's measurements."""

    latency: LatencyReport
    structure: dict[str, StructureReport]
    accuracy: dict[str, AccuracyComparison] = field(default_factory=dict)
    similarity: dict[str, Similarity] = field(default_factory=dict)
    measurements: dict[str, Measured | None] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know beside the figures: the class that lost most, and what disturbed the race."""
        lost = (worst_class(found) for name, found in self.accuracy.items() if name == "dense")
        return (*(note for note in lost if note), *self.latency.warnings)


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

    Raises ConfigError for one that cannot be found.
    """
    scores: dict[str, Metric] = {}
    for name in cfg.metrics:
        if name == "top5":
            scores[name] = top_k(5)
        elif name not in _SIMILARITIES:
            if ":" not in name:
                raise ConfigError(
                    f"gate.metrics: there is no metric {name!r}.",
                    f"There are top5, {', '.join(_SIMILARITIES)}, and path/to/file.py:callable.",
                )
            scores[name.rpartition(":")[2]] = load_callable(name, ConfigError)[0]
    return scores, tuple(name for name in _SIMILARITIES if name in cfg.metrics)


def contest(
    cfg: GateSection,
    files: Mapping[str, Path],
    data: Data | None,
    progress: Progress,
    *,
    sizes: Mapping[str, int] | None = None,
    sessions: Mapping[str, Mapping[str, str]] | None = None,
) -> Findings:
    """Measure the file "shipped" against the others. `sizes` gives dynamic dimensions other than the batch.

    `sessions` holds session configuration entries by model, where one needs them.

    Without `data` there is no accuracy. Raises ValidationError when a model cannot be run.
    """
    runners = {
        name: OrtRunner(path, threads=cfg.threads, name=name, session=(sessions or {}).get(name))
        for name, path in files.items()
    }
    others = [name for name in runners if name != "shipped"]
    scores, alike = metrics(cfg)
    found: dict[str, Measured | None] = {}
    accuracy: dict[str, AccuracyComparison] = {}
    similarities: dict[str, Similarity] = {}
    if data is not None:
        progress.say(f"  accuracy on {len(data.test)} test samples")
        reports = {
            name: evaluate(runner, data.batches("test", EVALUATION_BATCH), metrics=scores)
            for name, runner in runners.items()
        }
        own = reports["shipped"]
        found |= {"accuracy": policy.exactly(own.top1)}
        found |= {name: policy.exactly(float(np.mean(values))) for name, values in own.scores.items()}
        for name in others:
            accuracy[name] = compare_accuracy(reports[name], own, seed=cfg.seed)
            found[f"accuracy vs {name}"] = accuracy[name].drop
            for metric, score in accuracy[name].scores.items():
                factor = 100.0 if metric == "top5" else 1.0
                found[f"{metric} vs {name}"] = _times(score.drop, factor)
            if alike:
                similarities[name] = similarity(
                    runners[name], runners["shipped"], data.batches("test", EVALUATION_BATCH)
                )
        if "dense" in similarities:
            made = similarities["dense"]
            found |= {name: policy.exactly(getattr(made, name)) for name in alike}
    progress.say(f"  latency of {', '.join(runners)}, {cfg.threads} thread(s), batch {cfg.batch_size}")
    feed = random_feeds(runners["shipped"].inputs, seed=cfg.seed, batches=(cfg.batch_size,), sizes=sizes)[0]
    latency = race(
        runners,
        feed,
        reference="dense" if "dense" in runners else "shipped",
        seconds=cfg.seconds,
        seed=cfg.seed,
        bounds=[b for b in policy.bounds(cfg, promoted="promoted" in runners) if b.reference in runners],
    )
    structure = {name: measure(path, feed, threads=cfg.threads) for name, path in files.items()}
    mine = latency.runners["shipped"]
    found |= {"latency": policy.exactly(mine.median_ms), "latency_p99": policy.exactly(mine.p99_ms)}
    for name in others:
        found[f"latency vs {name}"] = mine.ratios[name].median
        found[f"latency_p99 vs {name}"] = mine.ratios[name].p99
    costs = {name: _costs(report) for name, report in structure.items()}
    found |= {key: policy.exactly(value) for key, value in costs["shipped"].items()}
    for name in others:
        found |= against(costs["shipped"], costs[name], name)
    return Findings(latency, structure, accuracy, similarities, found)


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


def parameters(path: Path) -> int | None:
    """How many weights an ONNX file holds; None for onnxruntime's own format."""
    return None if path.suffix == ".ort" else describe(path).parameters


def parse_sizes(given: Sequence[str]) -> dict[str, int]:
    """`name=value` for each dynamic dimension. Raises ConfigError."""
    sizes: dict[str, int] = {}
    for text in given:
        name, _, value = text.partition("=")
        if not name or not value.isdigit() or not int(value):
            raise ConfigError(f"--size {text!r} is not NAME=NUMBER.", "Write it like --size sequence=128")
        sizes[name] = int(value)
    return sizes


def _times(measured: Measured, factor: float) -> Measured:
    return Measured(value=factor * measured.value, low=factor * measured.low, high=factor * measured.high)
