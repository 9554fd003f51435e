"""Judging: a stored version again, models made elsewhere, any two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.table import Table

from foundation.errors import ConfigError, VersionError
from pipeline.cli.group import EXIT_CODES, OUT, main, plain

if TYPE_CHECKING:
    from pipeline.recipe.policy import Policy
    from pipeline.report.outcome import Told
    from validators.gates import Measured, Verdict

_POLICY = click.option("--policy", type=click.Path(path_type=Path), help="A TOML file with the limits.")
_REPORT = click.option(
    "--report", type=click.Path(path_type=Path), help="Write verdict.json, junit.xml and report.md into this folder."
)


def _measuring_options(command: Any) -> Any:  # decorates any click command
    for option in reversed(
        [
            click.option(
                "--data",
                help="For accuracy, or without labels for agreement: digits, KIND:PATH (docs/data.md), file.py:name.",
            ),
            click.option(
                "--task",
                default="auto",
                help="What the data is for: classification, regression, ..., file.py:callable.",
            ),
            click.option("--input-size", help="C,H,W of one sample of the data, such as 3,224,224."),
            click.option(
                "--tokenizer", type=click.Path(path_type=Path), help="For jsonl:PATH: a tokenizer.json, or its folder."
            ),
            click.option("--threads", type=click.IntRange(1), default=1, help="onnxruntime threads for the latency."),
            click.option("--batch", type=click.IntRange(1), default=1, help="Batch size for the latency."),
            click.option(
                "--seconds", type=click.FloatRange(0, min_open=True), default=4.0, help="Time for the latency."
            ),
            click.option(
                "--size",
                "sizes",
                multiple=True,
                metavar="NAME=N[,N]",
                help="A dynamic dimension of an input: try these sizes only.",
            ),
            click.option(
                "--range",
                "ranges",
                multiple=True,
                metavar="NAME=LOW:HIGH",
                help="The values that an input takes, both ends included, where the graph does not say so.",
            ),
            click.option(
                "--inputs",
                multiple=True,
                type=click.Path(path_type=Path),
                metavar="FILE.npz",
                help="Inputs to compare on: an array for each input, by its name. Several may be given.",
            ),
            click.option(
                "--seed",
                type=click.IntRange(0, 2**31 - 1),
                metavar="N",
                help="Draws what the models are compared on; by default the files' own bytes do.",
            ),
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
@click.pass_context
def gate(
    context: click.Context,
    /,
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
    from pipeline.recipe.config import load_policy
    from pipeline.recipe.policy import Policy

    limits = load_policy(policy) if policy is not None else None
    if Path(target).suffix in (".onnx", ".ort"):
        if against is None:
            raise ConfigError(f"{target} alone says nothing.", "Name the dense model: --against dense.onnx")
        files = {"dense": against, "shipped": Path(target)}
        if promoted is not None:
            files["promoted"] = promoted
        return _judge_files(target, files, equal_to, limits or Policy(), report, options)
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if given and parameter.name not in ("target", "out", "policy", "report"):
            raise ConfigError(
                f"{parameter.opts[-1]} is for a model file; {target} is judged by its own measurements.",
                "Leave it out, or deploy with other settings.",
            )
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
    from pipeline.recipe.config import load_policy
    from pipeline.recipe.policy import Policy

    limits = load_policy(policy) if policy is not None else Policy()
    files = {"dense": a, "shipped": b}
    return _judge_files(f"{a} and {b}", files, a, limits, report, options, answers_only=policy is None)


def _judge_version(out: Path, target: str, limits: Policy | None, report: Path | None) -> int:
    from pipeline.release import checks, judging, records, store
    from pipeline.report import outcome

    folder = store.resolve(out, target)
    if faults := checks.faults(folder):
        raise VersionError(f"{folder} is not judged, since it is not what was sealed: {faults[0]}.", "Deploy again.")
    checked, own = judging.measured(folder)
    verdict, notes = judging.judge(checked, limits or own)
    if limits is None and verdict.outcome == "pass" and checked.verdict.outcome != "pass":
        notes = (*notes, f"when it was made, the verdict was {checked.verdict.outcome}: see {folder / 'report.html'}")
    told = outcome.Told(checked.task, checked.scores)
    return _tell(records.read(folder).model, folder.name, verdict, notes, checked.measurements, report, told)


def _judge_files(
    subject: str,
    files: Mapping[str, Path],
    equal: Path | None,
    limits: Policy,
    report: Path | None,
    options: Mapping[str, Any],
    *,
    answers_only: bool = False,
) -> int:
    """Measure files and judge them; `answers_only`: by what they answer to the data, if there is any, and no cost."""
    from pipeline.cli.building import image_size
    from pipeline.data import find as datasets
    from pipeline.data.samples import Reading
    from pipeline.gate import foreign, measuring
    from pipeline.progress import TerminalProgress
    from pipeline.recipe.config import checked
    from pipeline.recipe.policy import GateSection
    from pipeline.recipe.task import TaskSection
    from pipeline.report import outcome
    from pipeline.tasks import find as tasks

    foreign.existing((*files.values(), *([equal] if equal else []), *options["inputs"]))
    cfg = checked(
        GateSection,
        **dict(limits),
        threads=options["threads"],
        batch_size=options["batch"],
        seconds=options["seconds"],
        metrics=tuple(options["metrics"]),
    )
    given = foreign.Given(
        sizes=measuring.parse_sizes(options["sizes"]),
        ranges=measuring.parse_ranges(options["ranges"]),
        inputs=options["inputs"],
        seed=options["seed"],
    )
    measuring.metrics(cfg)
    wanted = image_size(options["input_size"])
    section = TaskSection(name=options["task"])
    tasks.check(section)
    reading = Reading(targets=tasks.targets_of(section), pad=tasks.pad_of(section), tokenizer=options["tokenizer"])
    data = datasets.load(options["data"], input_size=wanted, reading=reading) if options["data"] else None
    made = foreign.judge_files(
        cfg,
        files,
        data,
        TerminalProgress(),
        equal=equal,
        given=given,
        answers_only=answers_only,
        section=section,
        report=report,
    )
    told = outcome.Told(made.task, made.scores)
    return _tell(subject, "", made.verdict, made.notes, made.measurements, report, told)


def _tell(
    model: str,
    version: str,
    verdict: Verdict,
    notes: Sequence[str],
    found: Mapping[str, Measured | None],
    report: Path | None,
    told: Told,
) -> int:
    """Print the verdict, write what CI reads, return the exit code."""
    from pipeline.gate.policy import name_of
    from pipeline.report import outcome
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
        outcome.write(report, model, version, verdict, notes, found, told)
    outcome.append_step_summary(outcome.summary(model, version, verdict, notes))
    return EXIT_CODES[verdict.outcome]
