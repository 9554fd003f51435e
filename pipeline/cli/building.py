"""Making a version, and what would be made: deploy, plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table
from rich.tree import Tree

from pipeline.cli.group import EXIT_CODES, main, plain
from pipeline.cli.versions import print_release
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.channels import Analysis
    from pipeline.config import Config


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
    from pipeline.artifacts import Validated

    print_release(release)
    return EXIT_CODES[release[Validated].verdict.outcome]


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
        branch = tree.add(f"{plain(cluster.name)}  {cluster.kind}  {cluster.size} -> {after}{unit}")
        shown = ", ".join(tied[:4]) + (f" and {len(tied) - 4} more" if len(tied) > 4 else "")
        branch.add(f"[dim]ties {plain(shown)}[/]")
    for block in analysis.blocked:
        where = f"{plain(block.op)} at {plain(block.node)}"
        tree.add(f"[yellow]kept[/] {where}: {plain(block.reason)} ({block.params:,} parameters)")
    return tree
