"""Judging: a stored version again, models made elsewhere, any two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from pipeline.cli.group import EXIT_CODES, OUT, main, plain
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.data.parts import Data
    from pipeline.recipe.config import Policy, Rule
    from validators.feeds import Feed
    from validators.gates import Measured, Verdict
    from validators.runners import OrtRunner

_POLICY = click.option("--policy", type=click.Path(path_type=Path), help="A TOML file with the limits.")
_REPORT = click.option(
    "--report", type=click.Path(path_type=Path), help="Write verdict.json, junit.xml and report.md into this folder."
)


def _measuring_options(command: Any) -> Any:  # decorates any click command
    for option in reversed(
        [
            click.option(
                "--data", help="Labelled data for accuracy: digits, imagefolder:PATH, npz:PATH, file.py:name."
            ),
            click.option("--input-size", help="C,H,W of one sample of the data, such as 3,224,224."),
            click.option("--threads", type=click.IntRange(1), default=1, help="onnxruntime threads for the latency."),
            click.option("--batch", type=click.IntRange(1), default=1, help="Batch size for the latency."),
            click.option(
                "--seconds", type=click.FloatRange(0, min_open=True), default=4.0, help="Time for the latency."
            ),
            click.option("--size", "sizes", multiple=True, metavar="NAME=N", help="A dynamic dimension of an input."),
            click.option("--metric", "metrics", multiple=True, help="Also: top5, cosine, spearman, file.py:callable."),
        ]
    ):
        command = option(command)
    return command


@main.command()
@click.argument("target", metavar="MODEL[/VERSION]|FILE.onnx")
@OUT
@_POLICY
@_REPORT
@click.option("--against", type=click.Path(path_type=Path), help="For a file: the dense model that it was made from.")
@click.option("--promoted", type=click.Path(path_type=Path), help="For a file: the model that is live now.")
@click.option("--equal-to", type=click.Path(path_type=Path), help="For a file: a model that must compute the same.")
@_measuring_options
def gate(
    target: str,
    out: Path,
    policy: Path | None,
    report: Path | None,
    against: Path | None,
    promoted: Path | None,
    equal_to: Path | None,
    **options: Any,
) -> int:
    """Judge a stored version again, measuring nothing, or a model that was made elsewhere.

    A version is judged by what was measured when it was made, and by its own recipe's limits or those of --policy. A
    file is measured first; without --data its accuracy is not, so that a limit on it fails.

    \b
    leanort gate resnet50/v0002 --policy strict.toml
    leanort gate small.onnx --against dense.onnx --data npz:test.npz --policy strict.toml
    """
    from pipeline.recipe import config

    limits = config.load_policy(policy) if policy is not None else None
    if Path(target).suffix in (".onnx", ".ort"):
        if against is None:
            raise ConfigError(f"{target} alone says nothing.", "Name the dense model: --against dense.onnx")
        files = {"dense": against, "shipped": Path(target)}
        if promoted is not None:
            files["promoted"] = promoted
        return _judge_files(target, files, equal_to, limits or config.Policy(), None, report, options)
    for name, given in (("--against", against), ("--promoted", promoted), ("--equal-to", equal_to)):
        if given is not None:
            raise ConfigError(f"{name} is for a model file; {target} is judged by its own measurements.")
    return _judge_version(out, target, limits, report)


@main.command()
@click.argument("a", metavar="A.onnx", type=click.Path(path_type=Path))
@click.argument("b", metavar="B.onnx", type=click.Path(path_type=Path))
@_POLICY
@_REPORT
@_measuring_options
def check(a: Path, b: Path, policy: Path | None, report: Path | None, **options: Any) -> int:
    """Run the validators on two models that should compute the same: is B equal to A, and what does it cost?

    Without --policy, parity decides (and with --data that no accuracy is lost beyond a point); latency, size, load and
    memory are measured and shown.

    \b
    leanort check model.onnx model.quantised.onnx --data npz:test.npz
    """
    from pipeline.recipe import config

    limits = config.load_policy(policy) if policy is not None else config.Policy()
    own = None
    if policy is None:
        rule = config.Rule(metric="accuracy", against="dense", max=limits.max_accuracy_drop_points)
        own = [rule] if options["data"] else []
    return _judge_files(f"{a} and {b}", {"dense": a, "shipped": b}, a, limits, own, report, options)


def _judge_version(out: Path, target: str, limits: Policy | None, report: Path | None) -> int:
    from pipeline import runner
    from pipeline.artifacts import Validated
    from pipeline.gate import policy as policies
    from pipeline.release import store

    release = runner.open_release(store.resolve(out, target))
    checked = release[Validated]
    verdict, notes = policies.decide(
        limits or runner.recipe(release).gate,
        checked.measurements,
        hops=[f"{policies.PARITY}{hop.reference} - {hop.candidate}" for hop in checked.hops if hop.judged],
        promoted=bool(checked.promoted),
        crashed=checked.crashed,
    )
    found = checked.measurements
    return _tell(release.manifest.model, release.folder.name, verdict, notes, found, report)


def _judge_files(
    subject: str,
    files: Mapping[str, Path],
    equal: Path | None,
    limits: Policy,
    own: Sequence[Rule] | None,
    report: Path | None,
    options: Mapping[str, Any],
) -> int:
    """Measure files and judge them; whatever cannot be measured is missing, and so fails."""
    from exporters.to_ort import session_of
    from pipeline.cli.building import size
    from pipeline.data import parts as datasets
    from pipeline.gate import measuring
    from pipeline.gate import policy as policies
    from pipeline.progress import TerminalProgress
    from pipeline.recipe.config import GateSection
    from validators.feeds import edge_feeds, random_feeds
    from validators.parity import compare
    from validators.runners import OrtRunner

    for path in (*files.values(), *([equal] if equal else [])):
        if not path.is_file():
            raise ConfigError(f"There is no file {path}.", "Check the path.")
    cfg = GateSection(
        **dict(limits),
        threads=options["threads"],
        batch_size=options["batch"],
        seconds=options["seconds"],
        metrics=tuple(options["metrics"]),
    )
    sizes = measuring.parse_sizes(options["sizes"])
    measuring.metrics(cfg)
    data = datasets.load(options["data"], input_size=size(options["input_size"])) if options["data"] else None
    measurements: dict[str, Measured | None] = {}
    notes: list[str] = []
    hops: list[str] = []
    crashed = measuring.Crashes()
    if equal is not None:
        key = f"{policies.PARITY}{equal.name} - {files['shipped'].name}"
        hops.append(key)
        with crashed.noted("parity"):
            reference, candidate = (
                OrtRunner(path, threads=cfg.threads, session=session_of(path)) for path in (equal, files["shipped"])
            )
            feeds = [
                *random_feeds(candidate.inputs, seed=cfg.seed, sizes=sizes),
                *edge_feeds(candidate.inputs, seed=cfg.seed, sizes=sizes),
                *(_real(candidate, data) if data is not None else ()),
            ]
            found = compare(reference, candidate, feeds, atol=cfg.parity, rtol=0.0)
            measurements[key] = policies.exactly(found.judged)
            notes += found.reasons[:5]
            if not found.passed and found.worst is not None and {equal.suffix, files["shipped"].suffix} == {".onnx"}:
                worst = next(feed for feed in feeds if feed.label == found.worst.feed)
                notes += _apart(equal, files["shipped"], worst, cfg.parity, report)
    findings = measuring.contest(cfg, files, data, TerminalProgress(), sizes=sizes)
    crashed |= findings.crashed
    measurements |= findings.measurements
    notes += findings.notes
    counts = {name: measuring.counts(cfg, name, path, crashed, sizes=sizes) for name, path in files.items()}
    measurements |= {key: policies.exactly(count) for key, count in counts["shipped"].items()}
    for name in counts:
        if name != "shipped":
            measurements |= measuring.against(counts["shipped"], counts[name], name)
    verdict, left = policies.decide(
        cfg, measurements, hops=hops, promoted="promoted" in files, given=own, crashed=crashed
    )
    return _tell(subject, "", verdict, (*left, *notes), measurements, report)


def _real(runner: OrtRunner, data: Data) -> list[Feed]:
    """Test samples at every batch size that the model takes; none for a model that takes more than images."""
    from validators.feeds import BATCHES, real_feeds

    if len(runner.inputs) != 1:
        return []
    name, batch = runner.inputs[0].name, runner.inputs[0].shape[0]
    batches = (batch,) if isinstance(batch, int) else BATCHES
    return real_feeds({name: data.sample("test", max(batches)).numpy()}, batches=batches)


def _apart(reference: Path, candidate: Path, feed: Feed, atol: float, report: Path | None) -> list[str]:
    """Where two files part, in one line; with a report folder, a repro pack is written into it."""
    from validators.divergence import first_divergence, repro_pack

    if report is None:
        found = first_divergence(reference, candidate, feed, atol=atol)
        return [f"{candidate.name} {found.words}"] if found else []
    report.mkdir(parents=True, exist_ok=True)
    found = repro_pack(reference, candidate, feed, report / "repro.zip", atol=atol)
    return [f"{candidate.name} {found.words}; see {report / 'repro.zip'}"] if found else []


def _tell(
    model: str,
    version: str,
    verdict: Verdict,
    notes: Sequence[str],
    found: Mapping[str, Measured | None],
    report: Path | None,
) -> int:
    """Print the verdict, write what CI reads, return the exit code."""
    from pipeline.gate import outcome
    from pipeline.gate.policy import name_of
    from pipeline.report.figures import significant

    console = Console()
    table = Table(box=None, pad_edge=False)
    for column in ("check", "result", "measured", "limit"):
        table.add_column(column)
    made = [outcome.judged(one) for one in verdict.checks]
    for one in made:
        shown = f"{one.measured} ({one.interval})" if one.interval else one.measured
        result = one.outcome + (" (warning only)" if not one.required and one.outcome != "pass" else "")
        table.add_row(plain(one.name), result, shown, one.limit)
    limited = {one.limit.metric for one in verdict.checks}
    for key, value in found.items():
        if name_of(key) not in limited:
            table.add_row(plain(name_of(key)), "", "–" if value is None else significant(value.value), "")
    console.print(table)
    colour = {"pass": "green", "fail": "red"}.get(verdict.outcome, "yellow")
    console.print(f"[bold {colour}]{verdict.outcome}[/]  {plain(f'{model} {version}'.strip())}", highlight=False)
    for line in (*outcome.reasons(verdict, made), *(f"Note: {note}" for note in notes)):
        console.print(f"  {plain(line)}", highlight=False, soft_wrap=True)
    if report is not None:
        outcome.write(report, model, version, verdict, notes, found)
    outcome.append_step_summary(outcome.summary(model, version, verdict, notes))
    return EXIT_CODES[verdict.outcome]
