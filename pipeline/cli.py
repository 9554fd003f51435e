"""The command line: words and exit codes only. Heavy imports are inside the commands, so that --help is instant."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table
from rich.tree import Tree

from pipeline.errors import ConfigError, LeanortError, VersionError

if TYPE_CHECKING:
    from pipeline.channels import Analysis
    from pipeline.config import Config
    from pipeline.runner import Release

EXIT_CODES = {"pass": 0, "fail": 1, "inconclusive": 4}
INTERRUPTED = 130
STAGE_FAILED = 3


class _Group(click.Group):
    """Turns errors into one line, the next thing to do, and the right exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:  # click's own signature
        """Run the command; a traceback is shown only for a bug of ours."""
        kwargs["standalone_mode"] = False
        console = Console(stderr=True)
        try:
            code = super().main(*args, **kwargs)
            sys.exit(code if isinstance(code, int) else 0)
        except LeanortError as error:
            _complain(console, error.message, error.hint)
            sys.exit(error.exit_code)
        except click.ClickException as error:
            error.show()
            sys.exit(2)
        except (click.Abort, KeyboardInterrupt):
            _complain(console, "Interrupted.", "The same command goes on from the last complete stage.")
            sys.exit(INTERRUPTED)
        except BrokenPipeError:
            sys.exit(0)
        except Exception as error:
            from exporters import ExportError
            from validators import ValidationError

            if isinstance(error, ExportError | ValidationError):
                _complain(console, error.message, error.hint)
                sys.exit(STAGE_FAILED)
            traceback.print_exc()
            _complain(console, "That is a bug in leanort.", "Please report the lines above.")
            sys.exit(STAGE_FAILED)


def _complain(console: Console, message: str, hint: str) -> None:
    console.print(f"[bold red]error:[/] {_plain(message)}", highlight=False, soft_wrap=True)
    if hint:
        console.print(f"  [dim]->[/] {_plain(hint)}", highlight=False, soft_wrap=True)


def _plain(text: str) -> str:
    """Text as it is: square brackets are not markup."""
    return text.replace("[", r"\[")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="leanort")
def main() -> None:
    """Ship a pruned, physically smaller, verified ONNX Runtime release of a PyTorch model.

    \b
    leanort plan resnet50                 what would run; which channels can go; what blocks the rest
    leanort deploy resnet50               the whole chain on the embedded data
    leanort deploy resnet50 --ratio 0.3   the same, gentler
    leanort show resnet50                 the figures of the newest version
    leanort verify resnet50/v0001         every hash, back to the dense model

    \b
    Exit codes: 0 pass · 1 a gate failed · 2 usage · 3 a stage failed · 4 the measurement could not decide
    """


def _recipe_options(command: Any) -> Any:  # decorates any click command
    for option in reversed(
        [
            click.argument("model", metavar="MODEL|RECIPE.toml", required=False),
            click.option(
                "--recipe", type=click.Path(path_type=Path), help="A recipe file; the options below win over it."
            ),
            click.option("--data", help="digits (embedded), imagefolder:PATH, npz:PATH or path/to/file.py:callable."),
            click.option("--weights", help="A .safetensors or .pt checkpoint, 'pretrained', or 'train'."),
            click.option("--ratio", type=float, help="Share of channels to remove, in [0, 1)."),
            click.option("--input-size", help="C,H,W of one sample, such as 3,224,224."),
            click.option("--name", help="Folder under the artifacts folder; made from the model when left out."),
            click.option("--out", type=click.Path(path_type=Path), help="The artifacts folder (default: artifacts)."),
            click.option("--seed", type=int, help="Seed of every stage."),
            click.option(
                "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any recipe key: --set prune.norm=l1"
            ),
        ]
    ):
        command = option(command)
    return command


def _config(
    model: str | None,
    recipe: Path | None,
    data: str | None,
    weights: str | None,
    ratio: float | None,
    input_size: str | None,
    name: str | None,
    out: Path | None,
    seed: int | None,
    settings: tuple[str, ...],
) -> Config:
    """Recipe file, then options, then --set."""
    from pipeline import config

    if model is not None and model.endswith(".toml"):
        if recipe is not None:
            raise ConfigError("Two recipes were given.", f"Give either {model} or --recipe {recipe}.")
        recipe, model = Path(model), None
    given: dict[str, Any] = {
        "model": model,
        "data.source": data,
        "baseline.weights": weights,
        "prune.ratio": ratio,
        "data.input_size": _size(input_size),
        "name": name,
        "artifacts": out,
        "seed": seed,
    }
    chosen = {key: value for key, value in given.items() if value is not None}
    made = config.load(recipe, chosen | dict(map(config.parse_setting, settings)))
    if not made.model:
        raise ConfigError("No model was named.", 'Try `leanort deploy resnet50`, or put model = "..." into the recipe.')
    return made


def _size(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = text.replace("x", ",").split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"--input-size {text!r} is not C,H,W.", "Write it like --input-size 3,224,224")
    return [int(part) for part in parts]


@main.command()
@_recipe_options
@click.option("--from", "start", metavar="STAGE", help="Run again from this stage on, reusing only what is before it.")
@click.option("--until", metavar="STAGE", help="Stop after this stage.")
@click.option("--quiet", is_flag=True, help="Print only the result.")
def deploy(start: str | None, until: str | None, quiet: bool, **options: Any) -> int:
    """Run the whole chain and seal a version.

    MODEL is a torchvision name (resnet50), timm:NAME, hf:FOLDER, path/to/file.py:callable or package.module:callable.
    Stages: baseline, prune, finetune, fold, shrink, export, optimize, validate. What was done before with the same
    inputs is reused; a killed run goes on where it stopped.

    \b
    leanort deploy mobilenet_v2 --ratio 0.3
    leanort deploy timm:resnet18 --data imagefolder:photos --weights model.safetensors --input-size 3,224,224
    leanort deploy mynet.py:build --set prune.scope=global --set gate.max_latency_ratio=0.5
    """
    config = _config(**options)
    from pipeline import runner
    from pipeline.progress import Progress, TerminalProgress

    progress = Progress() if quiet else TerminalProgress()
    release = runner.deploy(config.model, None, config, start=start, until=until, progress=progress)
    if release is None:
        return 0
    _print_release(release)
    return EXIT_CODES[release[_validated()].verdict.outcome]


def _validated() -> Any:
    from pipeline.artifacts import Validated

    return Validated


@main.command()
@_recipe_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def plan(as_json: bool, **options: Any) -> None:
    """Show what a deploy would run or reuse, which channel groups exist, and what blocks the rest. Writes nothing."""
    config = _config(**options)
    from pipeline import planning

    made = planning.plan(config)
    if as_json:
        click.echo(json.dumps(made.to_json(), indent=2))
        return
    console = Console()
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "action", "because"):
        table.add_column(column)
    for step in made.steps:
        table.add_row(step.stage, step.action, step.reason)
    console.print(table)
    console.print(_tree(made.analysis, made.removed))
    console.print(
        f"at ratio {config.prune.ratio:g}: parameters {made.analysis.params:,} -> {made.expected.params:,}, "
        f"MACs {made.analysis.macs:,} -> {made.expected.macs:,}; "
        f"{made.analysis.removable_share:.1%} of the parameters can go",
        highlight=False,
    )


def _tree(analysis: Analysis, removed: Any) -> Tree:
    tree = Tree(f"{len(analysis.clusters)} layers whose channels can go (width before -> after)")
    for cluster in analysis.clusters:
        after = cluster.size - int(removed[cluster.name].sum()) if cluster.name in removed else cluster.size
        unit = f" x {cluster.unit} channels" if cluster.unit > 1 else ""
        tied = sorted({name for name, _ in cluster.labels} - {cluster.name})
        branch = tree.add(f"{_plain(cluster.name)}  {cluster.kind}  {cluster.size} -> {after}{unit}")
        shown = ", ".join(tied[:4]) + (f" and {len(tied) - 4} more" if len(tied) > 4 else "")
        branch.add(f"[dim]ties {_plain(shown)}[/]")
    for block in analysis.blocked:
        where = f"{_plain(block.op)} at {_plain(block.node)}"
        tree.add(f"[yellow]kept[/] {where}: {_plain(block.reason)} ({block.params:,} parameters)")
    return tree


_OUT = click.option("--out", type=click.Path(path_type=Path), default=Path("artifacts"), help="The artifacts folder.")


@main.command("list")
@_OUT
@click.option("--json", "as_json", is_flag=True, help="One JSON array on stdout.")
def list_(out: Path, as_json: bool) -> None:
    """List every version: verdict, key figures, and which one is current (*)."""
    from pipeline import runner, store

    rows = [
        (folder.name, version.name, version == store.current(folder), runner.open_release(version)[_validated()])
        for folder in store.models(out)
        for version in store.versions(folder)
    ]
    if as_json:
        click.echo(
            json.dumps(
                [
                    {"model": m, "version": v, "current": c, **a.scalars(), "verdict": a.verdict.outcome}
                    for m, v, c, a in rows
                ]
            )
        )
        return
    if not rows:
        click.echo(f"No versions in {out} yet. Start with: leanort deploy resnet50")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("model", "version", "verdict", "accuracy", "latency", "of dense", "size"):
        table.add_column(column)
    for model, version, is_current, figures in rows:
        table.add_row(
            model,
            version + (" *" if is_current else ""),
            figures.verdict.outcome,
            f"{figures.accuracy:.1%}",
            f"{figures.latency_ms:.3g} ms",
            f"{figures.latency_ratio:.2f}",
            f"{figures.bytes / 1e6:.3g} MB",
        )
    Console().print(table)


@main.command()
@click.argument("version", metavar="MODEL[/VERSION]")
@_OUT
@click.option("--json", "as_json", is_flag=True, help="The manifest on stdout.")
def show(version: str, out: Path, as_json: bool) -> None:
    """Show one version: MODEL is its newest, MODEL/v0002 or MODEL/current a certain one."""
    from pipeline import runner, store

    release = runner.open_release(store.resolve(out, version))
    if as_json:
        click.echo(release.manifest.model_dump_json(indent=2))
        return
    _print_release(release)
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "seconds", "reused from"):
        table.add_column(column)
    for record in release.manifest.stages:
        table.add_row(record.stage, f"{record.seconds:.1f}", release.manifest.reused.get(record.stage, ""))
    Console().print(table)


@main.command()
@click.argument("a", metavar="MODEL[/VERSION]")
@click.argument("b", metavar="MODEL[/VERSION]")
@_OUT
def diff(a: str, b: str, out: Path) -> None:
    """Show what differs between two versions: recipe, widths per layer, figures."""
    from pipeline import runner, store
    from pipeline.differences import differences

    first, second = (runner.open_release(store.resolve(out, name)) for name in (a, b))
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
        table.add_row(_plain(what), _plain(before), _plain(after))
    Console().print(table)


@main.command()
@click.argument("version", metavar="MODEL[/VERSION]")
@_OUT
def verify(version: str, out: Path) -> None:
    """Check every byte of a version against its manifest, and the chain of digests back to the dense model."""
    from pipeline import manifest, store

    folder = store.resolve(out, version)
    faults = manifest.faults(folder)
    for fault in faults:
        click.echo(f"{folder}: {fault}")
    if faults:
        raise VersionError(f"{folder} is not what was sealed: {len(faults)} fault(s).", "Deploy again; do not ship it.")
    made = manifest.read(folder)
    count = len(made.files) + sum(len(record.files) for record in made.stages)
    click.echo(f"{folder}: {count} files as sealed; the shipped file leads back to the dense model.")


def _print_release(release: Release) -> None:
    """The verdict and the headline figures."""
    from pipeline.artifacts import Baseline, Shrunk

    checked, shrunk, dense = release[_validated()], release[Shrunk], release[Baseline]
    console = Console()
    table = Table(box=None, pad_edge=False)
    for column in ("", "dense", "shipped", ""):
        table.add_column(column, justify="left")
    table.add_row(
        "accuracy",
        f"{checked.dense_accuracy:.1%}",
        f"{checked.accuracy:.1%}",
        f"{0.0 - checked.accuracy_drop_points:+.1f} points",
    )
    table.add_row(
        "latency",
        f"{checked.dense_latency_ms:.3g} ms",
        f"{checked.latency_ms:.3g} ms",
        f"x {checked.latency_ratio:.3f} ({checked.latency_ratio_low:.3f} to {checked.latency_ratio_high:.3f})",
    )
    table.add_row(
        "file size",
        f"{checked.dense_bytes / 1e6:.3g} MB",
        f"{checked.bytes / 1e6:.3g} MB",
        f"x {checked.bytes / checked.dense_bytes:.3f}",
    )
    table.add_row(
        "parameters", f"{dense.params:,}", f"{shrunk.params_after:,}", f"x {shrunk.params_after / dense.params:.3f}"
    )
    table.add_row(
        "MACs", f"{dense.macs:,}", f"{shrunk.macs_after:,}", f"x {shrunk.macs_after / max(1, dense.macs):.3f}"
    )
    console.print(table)
    if not shrunk.removed:
        console.print(_plain(shrunk.statement), highlight=False)
    colour = {"pass": "green", "fail": "red"}.get(checked.verdict.outcome, "yellow")
    console.print(
        f"[bold {colour}]{checked.verdict.outcome}[/]  {release.folder}  (report: {release.folder / 'report.html'})",
        highlight=False,
        soft_wrap=True,
    )
    for check in checked.verdict.checks:
        if check.outcome != "pass":
            console.print(f"  [{colour}]{check.outcome}[/] {_plain(check.reason)}", highlight=False, soft_wrap=True)
