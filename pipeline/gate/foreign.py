"""Models made elsewhere, measured and judged like a version of ours; no more is asked of them than to be files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from exporters.to_ort import session_of
from foundation.errors import ConfigError
from pipeline.data.parts import Data
from pipeline.gate import measuring, policy
from pipeline.progress import Progress
from pipeline.recipe.policy import GateSection, Rule
from validators.divergence import first_divergence, repro_pack
from validators.feeds import BATCHES, Feed, edge_feeds, random_feeds, real_feeds
from validators.gates import Measured, Verdict
from validators.parity import compare
from validators.runners import OrtRunner

REPRO = "repro.zip"


@dataclass(frozen=True)
class Judgement:
    """A verdict on files, what it rests on, and what a reader should know beside it."""

    verdict: Verdict
    notes: tuple[str, ...]
    measurements: Mapping[str, Measured | None]


def existing(files: Mapping[str, Path], equal: Path | None) -> None:
    """Raise ConfigError for a file that is not there."""
    for path in (*files.values(), *([equal] if equal else [])):
        if not path.is_file():
            raise ConfigError(f"There is no file {path}.", "Check the path.")


def judge_files(
    cfg: GateSection,
    files: Mapping[str, Path],
    data: Data | None,
    progress: Progress,
    *,
    equal: Path | None = None,
    sizes: Mapping[str, int] | None = None,
    rules: Sequence[Rule] | None = None,
    report: Path | None = None,
) -> Judgement:
    """Measure the file "shipped" against "dense" (and "promoted"), and judge it; what cannot be measured fails.

    `equal`: a file that must compute the same. `sizes` gives dynamic dimensions other than the batch. `rules` stand in
    place of the policy's own. `report`: a folder that takes a repro pack where two files differ.
    """
    measurements: dict[str, Measured | None] = {}
    notes: list[str] = []
    hops: list[str] = []
    crashed = measuring.Crashes()
    if equal is not None:
        key = f"{policy.PARITY}{equal.name} - {files['shipped'].name}"
        hops.append(key)
        with crashed.noted("parity"):
            measured, found = _parity(cfg, equal, files["shipped"], data, sizes, report)
            measurements[key] = measured
            notes += found
    findings = measuring.contest(cfg, files, data, progress, sizes=sizes)
    crashed |= findings.crashed
    measurements |= findings.measurements
    notes += findings.notes
    counts = {name: measuring.counts(cfg, name, path, crashed, sizes=sizes) for name, path in files.items()}
    measurements |= {key: policy.exactly(count) for key, count in counts["shipped"].items()}
    for name in counts:
        if name != "shipped":
            measurements |= measuring.against(counts["shipped"], counts[name], name)
    verdict, left = policy.decide(
        cfg, measurements, hops=hops, promoted="promoted" in files, given=rules, crashed=crashed
    )
    return Judgement(verdict, (*left, *notes), measurements)


def _parity(
    cfg: GateSection,
    equal: Path,
    shipped: Path,
    data: Data | None,
    sizes: Mapping[str, int] | None,
    report: Path | None,
) -> tuple[Measured | None, list[str]]:
    """The largest scaled difference over all feeds, and where the two part if they do."""
    reference, candidate = (OrtRunner(path, threads=cfg.threads, session=session_of(path)) for path in (equal, shipped))
    feeds = [
        *random_feeds(candidate.inputs, seed=cfg.seed, sizes=sizes),
        *edge_feeds(candidate.inputs, seed=cfg.seed, sizes=sizes),
        *(_real(candidate, data) if data is not None else ()),
    ]
    found = compare(reference, candidate, feeds, atol=cfg.parity, rtol=0.0)
    notes = list(found.reasons[:5])
    if not found.passed and found.worst is not None and {equal.suffix, shipped.suffix} == {".onnx"}:
        worst = next(feed for feed in feeds if feed.label == found.worst.feed)
        notes += _divergence(equal, shipped, worst, cfg.parity, report)
    return policy.exactly(found.judged), notes


def _real(runner: OrtRunner, data: Data) -> list[Feed]:
    """Test samples at every batch size that the model takes; none for a model that takes more than images."""
    if len(runner.inputs) != 1:
        return []
    name, batch = runner.inputs[0].name, runner.inputs[0].shape[0]
    batches = (batch,) if isinstance(batch, int) else BATCHES
    return real_feeds({name: data.sample("test", max(batches)).numpy()}, batches=batches)


def _divergence(reference: Path, candidate: Path, feed: Feed, atol: float, report: Path | None) -> list[str]:
    """Where two files part, in one line; with a report folder, a repro pack is written into it."""
    if report is None:
        found = first_divergence(reference, candidate, feed, atol=atol)
        return [f"{candidate.name} {found.words}"] if found else []
    report.mkdir(parents=True, exist_ok=True)
    found = repro_pack(reference, candidate, feed, report / REPRO, atol=atol)
    return [f"{candidate.name} {found.words}; see {report / REPRO}"] if found else []
