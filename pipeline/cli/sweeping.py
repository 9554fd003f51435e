"""One model at several sizes: sweep."""

from __future__ import annotations

import functools
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from pipeline.cli.building import recipe_of, recipe_options
from pipeline.cli.group import main, plain

if TYPE_CHECKING:
    from pipeline.sweep.points import Axis, Sweep
    from pipeline.sweep.rows import Row

_OWN = ("storage", "commands", "quiet")
"""Options that `deploy` does not have, or that say nothing of the version."""


@main.command()
@functools.partial(recipe_options, listed=True)
@click.option("--policy", type=click.Path(path_type=Path), help="A TOML file with limits, in place of the recipe's.")
@click.option(
    "--storage", metavar="URL", help="Share the points with other workers by a database: sqlite:///sweep.db, ..."
)
@click.option("--print", "commands", is_flag=True, help="Print one `leanort deploy` per point, and do nothing else.")
@click.option("--quiet", is_flag=True, help="Print only the result.")
@click.pass_context
def sweep(
    context: click.Context, /, policy: Path | None, storage: str | None, commands: bool, quiet: bool, **options: Any
) -> int:
    """Make a version for each value in a list, and one page that holds accuracy against latency and size.

    One of --latency, --macs, --params, --size and --ratio takes the list; everything else is as in deploy, and the same
    for all of them. What they share (the dense baseline, the latency table, the curves) is made once. The page,
    sweep.html in the model's folder, with sweep.md and sweep.json, is written again after every point; a sweep that was
    broken off goes on where it stopped.

    A point that fails its gate, or whose target cannot be reached, is a row with its reason, and the others go on. No
    point becomes current, since which one is right is for the page to show: promote it then.

    Exit codes are deploy's, the worst of all points: 0 only where every one was made and passed its gate.

    \b
    leanort sweep resnet50 --latency 0.2,0.3,0.4,0.6
    leanort sweep resnet50 --macs 0.25,0.5 --latency 0.5
    leanort sweep resnet50 --latency 0.2,0.4 --storage sqlite:///sweep.db    (docs/sweep.md)
    leanort sweep resnet50 --latency 0.2,0.4 --print
    """
    from pipeline.recipe import config as recipes
    from pipeline.recipe.config import Config
    from pipeline.sweep import points

    axis, values = points.asked({one: options[one] for one in points.AXES})
    limits = None if policy is None else recipes.load_policy(policy)

    def recipe(value: str) -> Config:
        made = recipe_of(**{**options, axis: float(value) if axis == "ratio" else value})
        return made if limits is None else recipes.with_policy(made, limits)

    asked = points.sweep(axis, values, recipe)
    if commands:
        for value in values:
            click.echo(command(context, axis, value))
        return 0
    return _run(asked, storage, quiet)


def _run(asked: Sweep, storage: str | None, quiet: bool) -> int:
    from pipeline.progress import Progress, TerminalProgress
    from pipeline.sweep import pages, rows, running

    made = running.run(asked, Progress() if quiet else TerminalProgress(), storage)
    _show(asked, made)
    if os.environ.get("GITHUB_STEP_SUMMARY"):
        from pipeline.report import outcome

        outcome.append_step_summary(pages.summary(asked, made))
    return rows.exit_code(made)


def command(context: click.Context, axis: Axis, value: str) -> str:
    """The `leanort deploy` that makes one point, quoted for a shell."""
    words = ["leanort", "deploy"]
    for parameter in context.command.params:
        given = context.params.get(parameter.name or "")
        if parameter.name in _OWN or given is None or given == ():
            continue
        if isinstance(parameter, click.Argument):
            words.append(str(given))
            continue
        option = parameter.opts[0]
        for one in given if isinstance(given, tuple) else (value if parameter.name == axis else given,):
            words += [option, str(one)]
    return shlex.join([*words, "--no-promote"])


def _show(asked: Sweep, made: list[Row | None]) -> None:
    """The points in one table, and where the page lies."""
    from pipeline.report.figures import NONE, ratio, size
    from pipeline.sweep import pages

    console = Console()
    table = Table(box=None, pad_edge=False)
    for column in (asked.axis, "version", "of dense", "score", "change", "size", "verdict"):
        table.add_column(column)
    for point, row in zip(asked.points, made, strict=True):
        found = row.figures if row is not None else None
        if row is None or found is None:
            table.add_row(point.value, *[NONE] * 5, row.outcome if row is not None else pages.WAITING)
            continue
        score = found.score
        table.add_row(
            point.value,
            row.version,
            NONE if found.latency is None else ratio(found.latency.value),
            pages.as_score(found, found.worth.value if found.worth else None),
            NONE if score is None else score.change(score.drop.value),
            size(found.bytes),
            row.outcome,
        )
    console.print(table)
    for point, row in zip(asked.points, made, strict=True):
        for reason in row.reasons if row is not None and row.code else ():
            console.print(f"  {asked.axis} {point.value}: {plain(reason)}", highlight=False, soft_wrap=True)
    console.print(f"{plain(str(asked.folder / pages.HTML))}", highlight=False, soft_wrap=True)
