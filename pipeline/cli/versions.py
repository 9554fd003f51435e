"""Versions on disk: list, show, diff, verify, why; and which one is live: promote, rollback, gc."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from foundation.errors import LeanortError, UserError, VersionError
from foundation.words import printable
from pipeline.cli.group import OUT, main, plain

if TYPE_CHECKING:
    from pipeline.artifacts.verdict import Validated
    from pipeline.release.opening import Release


@main.command("list")
@OUT
@click.option("--json", "as_json", is_flag=True, help="One JSON array on stdout.")
@click.option("--log", is_flag=True, help="What was promoted, rolled back and removed, by whom and why.")
def list_(out: Path, as_json: bool, log: bool) -> None:
    """List every version: verdict, key figures, and which one is current (*)."""
    from pipeline.artifacts.verdict import Validated
    from pipeline.release import opening, store

    if log:
        _print_log(out, as_json)
        return

    def figures_of(version: Path) -> Validated | None:
        try:
            return opening.open_release(version)[Validated]
        except (LeanortError, OSError, ValueError):  # one damaged version must not hide the others
            return None

    faults = []
    rows = []
    for folder in store.models(out):
        now = store.current(folder)  # once: it may move while the versions are read
        if fault := store.pointer_fault(folder):
            faults.append(f"{folder.name}: {fault}.")
        rows += [(folder.name, v.name, v == now, figures_of(v)) for v in store.versions(folder)]
    for fault in faults:
        click.echo(printable(fault), err=True)
    if as_json:
        click.echo(
            json.dumps(
                [
                    {"model": m, "version": v, "current": c}
                    | ({**a.scalars(), "verdict": a.verdict.outcome} if a else {"verdict": "damaged"})
                    for m, v, c, a in rows
                ]
            )
        )
        return
    if not rows:
        click.echo(f"No versions in {out} yet. Start with: leanort deploy resnet50")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("model", "version", "verdict", "score", "latency", "of dense", "size"):
        table.add_column(column)
    for model, version, is_current, figures in rows:
        name = version + (" *" if is_current else "")
        if figures is None:
            table.add_row(model, name, "damaged")
            continue
        table.add_row(
            model,
            name,
            figures.verdict.outcome,
            *_shown(
                _answers(figures),
                ("{:.3g} ms", figures.latency_ms),
                ("{:.2f}", figures.latency_ratio),
                ("{:.3g} MB", _millions(figures.bytes)),
            ),
        )
    Console().print(table)


@main.command()
@click.argument("version", metavar="MODEL[/VERSION]")
@OUT
@click.option("--json", "as_json", is_flag=True, help="The manifest on stdout.")
def show(version: str, out: Path, as_json: bool) -> None:
    """Show one version: MODEL is its newest, MODEL/v0002 or MODEL/current a certain one."""
    from pipeline.release import opening, store

    release = opening.open_release(store.resolve(out, version))
    if as_json:
        click.echo(release.manifest.model_dump_json(indent=2))
        return
    print_release(release)
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "seconds", "reused from"):
        table.add_column(column)
    for record in release.manifest.stages:
        table.add_row(record.stage, f"{record.seconds:.1f}", release.manifest.reused.get(record.stage, ""))
    Console().print(table)


@main.command()
@click.argument("version", metavar="MODEL[/VERSION]")
@OUT
def path(version: str, out: Path) -> None:
    """Print the folder of one version, links resolved.

    Several files read through MODEL/current may be of two versions where one is promoted in between: ask once, and read
    below the folder that is printed.

    \b
    folder=$(leanort path resnet50/current)
    """
    from pipeline.release import store

    click.echo(store.resolve(out, version).resolve())


@main.command()
@click.argument("a", metavar="MODEL[/VERSION]")
@click.argument("b", metavar="MODEL[/VERSION]")
@OUT
def diff(a: str, b: str, out: Path) -> None:
    """Show what differs between two versions: recipe, widths per layer, figures."""
    from pipeline.inquiry.differences import differences
    from pipeline.release import opening, store

    first, second = (opening.open_release(store.resolve(out, name)) for name in (a, b))
    changes = differences(first, second)
    if not changes:
        click.echo("No difference.")
        return
    table = Table(box=None, pad_edge=False)
    for column in (
        "what",
        f"{first.folder.parent.name}/{first.folder.name}",
        f"{second.folder.parent.name}/{second.folder.name}",
    ):
        table.add_column(column, overflow="fold")
    for what, before, after in changes:
        table.add_row(plain(what), plain(before), plain(after))
    Console().print(table)


@main.command()
@click.argument("version", metavar="MODEL[/VERSION]")
@OUT
def verify(version: str, out: Path) -> None:
    """Check every byte of a version against its manifest, and the chain of digests back to the dense model."""
    from pipeline.release import checks, records, store

    folder = store.resolve(out, version)
    faults = checks.faults(folder)
    if pointer := store.pointer_fault(folder.parent):
        faults.append(f"{folder.parent.name}: {pointer}")
    for fault in faults:
        click.echo(printable(f"{folder}: {fault}"))
    if faults:
        raise VersionError(f"{folder} is not what was sealed: {len(faults)} fault(s).", "Deploy again; do not ship it.")
    made = records.read(folder)
    count = len(made.files) + sum(len(record.files) for record in made.stages)
    click.echo(f"{folder}: {count} files as sealed; the shipped file leads back to the dense model.")


@main.command()
@click.argument("version", metavar="MODEL[/VERSION]")
@click.argument("layer", required=False)
@OUT
@click.option("--group", type=click.IntRange(0), help="One group of LAYER: its score, rank, and the cut-off.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def why(version: str, layer: str | None, out: Path, group: int | None, as_json: bool) -> None:
    """Tell which channels of LAYER went, and why; and why others stayed. Without LAYER: every layer, one line each.

    Channels that live and die together are one group of a cluster. With their scores stands by which criterion they
    were ranked, between which scores the line was drawn, and, where curves decided, what the layer's width costs beside
    the others.

    \b
    leanort why resnet50 layer3.1.conv2
    leanort why resnet50 layer3.1.conv2 --group 7
    leanort why resnet50/v0002
    """
    from pipeline.inquiry import removal
    from pipeline.release import store

    found = removal.read(store.resolve(out, version))
    if group is not None:
        if layer is None:
            raise UserError("--group needs a LAYER.", "Write it like `leanort why MODEL LAYER --group 7`.")
        if as_json:
            click.echo(json.dumps(found.group(layer, group), indent=2))
            return
        for line in found.group_sentences(layer, group):
            click.echo(printable(line))
        return
    if layer is None:
        rows = found.overview()
        if as_json:
            click.echo(json.dumps(rows, indent=2))
            return
        table = Table(box=None, pad_edge=False)
        for column in ("layer", "outputs gone", "inputs gone", "biases given constants", "groups refused"):
            table.add_column(column)
        for row in rows:
            table.add_row(*(plain(str(value)) for value in row.values()))
        Console().print(table)
        return
    answer = found.why(layer)
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    for line in found.sentences(layer):
        click.echo(printable(line))


@main.command()
@click.argument("version", metavar="MODEL/VERSION")
@OUT
@click.option("--force", is_flag=True, help="Although its gate has not passed. Logged, with the reason and your name.")
@click.option("--reason", default="", help="Why; needed with --force.")
def promote(version: str, out: Path, force: bool, reason: str) -> None:
    """Make a version the current one, in one atomic step. Refused unless its gate has passed."""
    from pipeline.release import promotion, store

    folder = store.resolve(out, version)
    before = promotion.promote(folder, forced=force, reason=reason)
    now = f"{folder.parent.name}/{folder.name}"
    click.echo(f"{now} is current already." if before == folder.name else f"{now} is current{_was(before)}.")


@main.command()
@click.argument("model")
@OUT
@click.option("--reason", default="", help="Why; goes into the log.")
def rollback(model: str, out: Path, reason: str) -> None:
    """Go back to the version that was current before, in one atomic step."""
    from pipeline.release import promotion, store

    before, now = promotion.rollback(store.resolve(out, model).parent, reason=reason)
    click.echo(f"{model}/{now} is current{_was(before)}.")


@main.command()
@click.argument("model", required=False)
@OUT
@click.option("--keep", type=click.IntRange(0), default=5, show_default=True, help="How many of the newest stay.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
def gc(model: str | None, out: Path, keep: int, dry_run: bool) -> None:
    """Remove old versions; never the current or the previous one, nor one that a version which stays was made from."""
    from pipeline.release import promotion, store

    folders = [store.resolve(out, model).parent] if model else store.models(out)
    for folder in folders:
        with store.locked(folder, lambda: click.echo("Another run is building here; waiting for it.", err=True)):
            versions = promotion.removable(folder, keep)
            names = ", ".join(version.name for version in versions) or "nothing"
            if dry_run:
                click.echo(f"{folder.name}: would remove {names}")
            else:
                freed = promotion.collect(folder, versions)
                click.echo(f"{folder.name}: removed {names}, {freed / 1e6:.1f} MB freed")


def _was(before: str) -> str:
    return f"; it was {before}" if before else ""


def _print_log(out: Path, as_json: bool) -> None:
    from pipeline.release import journal

    entries, _ = journal.read(out)
    if as_json:
        click.echo(json.dumps([entry.model_dump(mode="json") for entry in entries]))
    else:
        table = Table(box=None, pad_edge=False)
        for column in ("when", "what", "version", "from", "verdict", "by", "why"):
            table.add_column(column, overflow="fold", no_wrap=column in ("when", "verdict"))
        for entry in entries:
            what = f"{entry.action} --force" if entry.forced else entry.action
            what += {"done": "", "begun": " (broke off)", "void": " (did not happen)"}[entry.state]
            when = entry.time.strftime("%Y-%m-%d %H:%M:%S")
            words = (f"{entry.model}/{entry.version}", entry.previous, entry.verdict, entry.by, entry.reason)
            table.add_row(when, what, *map(plain, words))
        Console().print(table)
    journal.whole(out)


def _shown(*cells: tuple[str, *tuple[float | None, ...]]) -> list[str]:
    """Each cell's figures in its form; a dash where one was not measured."""
    return ["–" if None in figures else form.format(*figures) for form, *figures in cells]


def _millions(count: int | None) -> float | None:
    return None if count is None else count / 1e6


def _answers(checked: Validated) -> tuple[str, float | None]:
    """How a version's answers are told in a list: its score by name, or its agreement with dense."""
    score = checked.judged_score
    if score is None:
        return ("{:.1%}", None) if checked.labelled else ("{:.1%} as dense", checked.agreement)
    name = "" if score.name == "accuracy" else f" {score.name}"
    return ("{:.1%}" if score.share else "{:.4g}") + name, score.shipped


def print_release(release: Release) -> None:
    """The verdict and the headline figures; where the answers fall short and nothing was trained, why not."""
    from pipeline.artifacts.eager import Baseline, Finetuned
    from pipeline.artifacts.program import Shrunk
    from pipeline.artifacts.verdict import Validated
    from pipeline.release import judging

    checked, shrunk, dense = release[Validated], release[Shrunk], release[Baseline]
    console = Console()
    table = Table(box=None, pad_edge=False)
    for column in ("", "dense", "shipped", ""):
        table.add_column(column, justify="left")
    score = checked.judged_score
    if score is not None:
        told = score.words(score.dense), score.words(score.shipped), score.change(score.drop.value)
        table.add_row(score.name, *told)
    elif checked.labelled:
        table.add_row("accuracy", *_shown(("{:.1%}", None), ("{:.1%}", None), ("{:+.1f} points", None)))
    else:
        agreed = _shown(("{:.1%}", checked.agreement), ("cosine of the outputs {:.3f}", checked.cosine))
        table.add_row("agreement with dense", "", *agreed)
    table.add_row(
        "latency",
        *_shown(
            ("{:.3g} ms", checked.dense_latency_ms),
            ("{:.3g} ms", checked.latency_ms),
            (
                "x {:.3f} ({:.3f} to {:.3f})",
                checked.latency_ratio,
                checked.latency_ratio_low,
                checked.latency_ratio_high,
            ),
        ),
    )
    table.add_row(
        "file size",
        *_shown(
            ("{:.3g} MB", _millions(checked.dense_bytes)),
            ("{:.3g} MB", _millions(checked.bytes)),
            ("x {:.3f}", checked.bytes / checked.dense_bytes if checked.bytes and checked.dense_bytes else None),
        ),
    )
    table.add_row(
        "parameters", f"{dense.params:,}", f"{shrunk.params_after:,}", f"x {shrunk.params_after / dense.params:.3f}"
    )
    table.add_row(
        "MACs", f"{dense.macs:,}", f"{shrunk.macs_after:,}", f"x {shrunk.macs_after / max(1, dense.macs):.3f}"
    )
    console.print(table)
    if not shrunk.removed:
        console.print(plain(shrunk.statement), highlight=False)
    colour = {"pass": "green", "fail": "red"}.get(checked.verdict.outcome, "yellow")
    console.print(
        f"[bold {colour}]{checked.verdict.outcome}[/]  {release.folder}  (report: {release.folder / 'report.html'})",
        highlight=False,
        soft_wrap=True,
    )
    for check in checked.verdict.checks:
        if check.outcome != "pass":
            console.print(f"  [{colour}]{check.outcome}[/] {plain(check.reason)}", highlight=False, soft_wrap=True)
    left_out = judging.untrained(checked, release[Finetuned])
    if left_out is not None:
        console.print(f"  training: {plain(left_out)}", highlight=False, soft_wrap=True)
