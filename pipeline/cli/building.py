"""Making a version, and what would be made: deploy, plan, sensitivity."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table
from rich.tree import Tree

from foundation.errors import ConfigError
from pipeline.cli.group import EXIT_CODES, NewFile, main, plain
from pipeline.cli.versions import print_release

if TYPE_CHECKING:
    from pipeline.inquiry.planning import Plan
    from pipeline.inquiry.sensitivity import Sensitivity
    from pipeline.recipe.config import Config


def recipe_options(command: Any, *, listed: bool = False) -> Any:  # decorates any click command
    """The options of every command that takes a model or a recipe; `recipe_of` reads them.

    `listed`: those that say how much goes may hold a list, and all of them are text.
    """
    several = " Or a list: 0.2,0.4." if listed else ""
    for option in reversed(
        [
            click.argument("model", metavar="MODEL|RECIPE.toml", required=False),
            click.option(
                "--recipe", type=click.Path(path_type=Path), help="A recipe file; the options below win over it."
            ),
            click.option(
                "--data",
                help="digits (embedded), path/to/file.py:callable, or KIND:PATH of imagefolder, npz, csv, jsonl, "
                "audiofolder, segmentation, coco (docs/data.md).",
            ),
            click.option("--weights", help="A checkpoint (FILE, FOLDER or FILE#PART), 'pretrained', or 'train'."),
            click.option(
                "--task", help="What it is for: segmentation, regression, ..., file.py:callable (docs/tasks.md)."
            ),
            click.option(
                "--ratio", type=str if listed else float, help=f"Share of channels to remove, in [0, 1).{several}"
            ),
            click.option(
                "--latency", help=f"What it may take, of dense (0.4) or in time (3.5ms); docs/latency.md.{several}"
            ),
            click.option(
                "--macs", help=f"What multiply-accumulates may be left, of dense (0.4) or counted (600M).{several}"
            ),
            click.option("--params", help=f"What parameters may be left, of dense (0.4) or counted (5M).{several}"),
            click.option("--size", help=f"What the file may have, of dense (0.4) or in bytes (10MB).{several}"),
            click.option(
                "--device", help="device.json of a kit (`leanort profile --kit`): --latency is that device's."
            ),
            click.option("--input-size", help="C,H,W of one sample, such as 3,224,224."),
            click.option("--name", help="Folder under the artifacts folder; made from the model when left out."),
            click.option("--out", type=click.Path(path_type=Path), help="The artifacts folder (default: artifacts)."),
            click.option("--seed", type=int, help="Seed of every stage."),
            click.option(
                "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any recipe key: --set prune.criterion=l1"
            ),
        ]
    ):
        command = option(command)
    return command


def recipe_of(
    model: str | None,
    recipe: Path | None,
    data: str | None,
    weights: str | None,
    task: str | None,
    ratio: float | None,
    latency: str | None,
    macs: str | None,
    params: str | None,
    size: str | None,
    device: str | None,
    input_size: str | None,
    name: str | None,
    out: Path | None,
    seed: int | None,
    settings: tuple[str, ...],
) -> Config:
    """Recipe file, then options, then --set."""
    from pipeline.recipe import config

    aims = {"latency": latency, "macs": macs, "params": params, "size": size}
    if ratio is not None and any(aims.values()):
        asked = next(name for name, value in aims.items() if value is not None)
        raise ConfigError(
            f"Both --ratio and --{asked} were given, and the second decides the first.", "Give one of the two."
        )
    if model is not None and model.endswith(".toml"):
        if recipe is not None:
            raise ConfigError("Two recipes were given.", f"Give either {model} or --recipe {recipe}.")
        recipe, model = Path(model), None
    given: dict[str, Any] = {
        "model": model,
        "data.source": data,
        "baseline.weights": weights,
        "task.name": task,
        "prune.ratio": ratio,
        **{f"prune.target.{name}": value for name, value in aims.items()},
        "prune.target.device": device,
        "data.input_size": image_size(input_size),
        "name": name,
        "artifacts": out,
        "seed": seed,
    }
    chosen = {key: value for key, value in given.items() if value is not None}
    made = config.load(recipe, chosen | dict(map(config.parse_setting, settings)))
    if ratio is not None and made.prune.target.amounts:
        held = next(iter(made.prune.target.amounts))
        raise ConfigError(
            f"The recipe has a target, prune.target.{held}, which decides the ratio.",
            f"Leave --ratio out, and give --{held} where the target is to be another.",
        )
    if not made.model:
        raise ConfigError("No model was named.", 'Try `leanort deploy resnet50`, or put model = "..." into the recipe.')
    return made


def image_size(text: str | None) -> tuple[int, int, int] | None:
    """`C,H,W` as numbers. Raises ConfigError."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*([0-9]{1,5})\s*[,x]\s*([0-9]{1,5})\s*[,x]\s*([0-9]{1,5})\s*", text)
    if found is None or not all(0 < int(part) <= 65_536 for part in found.groups()):
        raise ConfigError(f"--input-size {text[:60]!r} is not C,H,W.", "Write it like --input-size 3,224,224")
    channels, height, width = map(int, found.groups())
    return channels, height, width


@main.command()
@recipe_options
@click.option("--from", "start", metavar="STAGE", help="Run again from this stage on, reusing only what is before it.")
@click.option("--until", metavar="STAGE", help="Stop after this stage.")
@click.option("--policy", type=click.Path(path_type=Path), help="A TOML file with limits, in place of the recipe's.")
@click.option("--no-promote", is_flag=True, help="Leave `current` where it is, even when the gate passes.")
@click.option("--quiet", is_flag=True, help="Print only the result.")
def deploy(
    start: str | None, until: str | None, policy: Path | None, no_promote: bool, quiet: bool, **options: Any
) -> int:
    """Run the whole chain and seal a version.

    MODEL is a torchvision name (resnet50), timm:NAME, hf:FOLDER, path/to/file.py:callable, package.module:callable or
    onnx:path/to/model.onnx.
    Stages: baseline, prune, finetune, fold, shrink, export, optimize, validate. What was done before with the same
    inputs is reused; a killed run goes on where it stopped.

    \b
    leanort deploy mobilenet_v2 --ratio 0.3
    leanort deploy resnet50 --latency 0.25
    leanort deploy timm:resnet18 --data imagefolder:photos --weights model.safetensors --input-size 3,224,224
    leanort deploy mynet.py:build --set prune.scope=global --set gate.max_latency_ratio=0.5
    """
    config = recipe_of(**options)
    from pipeline import deployment
    from pipeline.artifacts.verdict import Validated
    from pipeline.progress import Progress, TerminalProgress
    from pipeline.recipe import config as recipes

    if policy is not None:
        config = recipes.with_policy(config, recipes.load_policy(policy))
    progress = Progress() if quiet else TerminalProgress()
    release = deployment.deploy(
        config.model, None, config, start=start, until=until, promote=not no_promote, progress=progress
    )
    if release is None:
        return 0
    print_release(release)
    if os.environ.get("GITHUB_STEP_SUMMARY"):
        from pipeline.report import outcome, pages

        outcome.append_step_summary(pages.markdown_summary(release.manifest, release.artifacts))
    return EXIT_CODES[release[Validated].verdict.outcome]


@main.command()
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.option("--model", required=True, help="What the weights belong to: as in deploy.")
@click.option("--dense", help="The weights from before it was pruned, to hold it against; its own weights else.")
@click.option("--data", default="none", help="As in deploy; without it, nothing is said of how good the answers are.")
@click.option("--input-size", help="C,H,W of one sample, such as 3,224,224.")
@click.option("--name", help="Folder under the artifacts folder; made from the model when left out.")
@click.option("--out", type=click.Path(path_type=Path), help="The artifacts folder (default: artifacts).")
@click.option("--no-promote", is_flag=True, help="Leave `current` where it is, even when the gate passes.")
@click.option("--quiet", is_flag=True, help="Print only the result.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any recipe key: --set optimize.int8=true")
@click.pass_context
def shrink(
    context: click.Context,
    /,
    checkpoint: str,
    model: str,
    dense: str | None,
    no_promote: bool,
    quiet: bool,
    settings: tuple[str, ...],
    **options: Any,
) -> int:
    """Make a release of a checkpoint that was pruned elsewhere: its dead channels go, and what is left is proven equal.

    CHECKPOINT holds zeros in place of what was pruned, or still has torch.nn.utils.prune on it (weight_orig and
    weight_mask). Nothing is trained. Where --dense is left out, the release is held against the checkpoint itself, and
    the verdict says that what pruning cost was not measured. All dead channels go, or with prune.align as many as leave
    a multiple, which kernels are faster with.

    \b
    leanort shrink pruned.pt --model resnet50
    leanort shrink pruned.pt --model resnet50 --set prune.align=16
    leanort shrink pruned.pt --model mynet.py:build --dense before.pt --data imagefolder:photos
    """
    chosen = (
        *settings,
        "prune.method=given",
        f"prune.weights={json.dumps(checkpoint, ensure_ascii=False)}",  # as TOML: a name may look like a number
        "finetune.recover=none",
        "finetune.epochs=0",
    )
    done: int = context.invoke(
        deploy,
        model=model,
        recipe=None,
        weights=dense or checkpoint,
        task=None,
        ratio=None,
        latency=None,
        macs=None,
        params=None,
        size=None,
        device=None,
        seed=None,
        start=None,
        until=None,
        policy=None,
        no_promote=no_promote,
        quiet=quiet,
        settings=chosen,
        **options,
    )
    return done


@main.command()
@recipe_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("--svg", type=NewFile(), help="Draw every layer's width into this file.")
def plan(as_json: bool, svg: Path | None, **options: Any) -> None:
    """Show what a deploy would run or reuse, which channel groups exist, what blocks the rest, and the size to expect.

    Which groups go is decided by prune.criterion: l1, l2, batch-norm, random look at the weights alone; taylor,
    taylor-elements, fisher and fisher-sampled at gradients; wanda, flap, reconstruction and elimination at activations.
    How many go from each layer is decided by prune.scope: layer, global, or curves. By curves, the network is run some
    five times for each layer, which is all that is spent, and the divergence to expect is shown. For a target, residual
    branches are tried as well, which may go as a whole.

    Writes nothing but the drawing that --svg asks for, and, for a target, what is measured for it, which is kept.

    \b
    leanort plan resnet50 --ratio 0.7
    leanort plan mynet.py:build --weights model.safetensors --set prune.scope=curves --set prune.criterion=wanda
    """
    config = recipe_of(**options)
    from pipeline.inquiry import planning
    from pipeline.progress import TerminalProgress

    made = planning.plan(config, TerminalProgress())
    if as_json:
        click.echo(json.dumps(made.to_json(), indent=2))
    else:
        _print_plan(made)
    if svg is None:
        return
    try:
        svg.write_text(made.svg(str(config.model)), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{svg} cannot be written ({error.strerror}).", "Give --svg another place.") from error
    if not as_json:
        Console().print(f"Every layer's width is drawn in {plain(str(svg))}.", highlight=False)


def _print_plan(made: Plan) -> None:
    console = Console()
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "action", "because"):
        table.add_column(column)
    for step in made.steps:
        table.add_row(step.stage, step.action, step.reason)
    console.print(table)
    console.print(_tree(made))
    console.print(_expected(made))
    if made.weighed.branches:
        names = ", ".join(branch.name for branch in made.weighed.branches)
        console.print(f"Whole branches go: {plain(names)}.", highlight=False)
    for line in made.curve_words:
        console.print(line, highlight=False)


def _tree(made: Plan) -> Tree:
    """Channel groups by module, what repeats from block to block said once; then what stays."""
    from pipeline.inquiry import planning

    analysis = made.analysis
    tree = Tree(
        f"{len(analysis.clusters)} widths can change; {analysis.removable_share:.2%} of the parameters and "
        f"{analysis.removable_macs_share:.2%} of the MACs can go",
        highlight=False,
    )
    for block, lines in planning.outline(made).items():
        branch = tree.add(f"[bold]{plain(block)}[/]") if block else tree
        for line in lines:
            unit = f" of {line.cluster.unit} channels each" if line.cluster.unit > 1 else ""
            times = f"  [dim]x {line.count}[/]" if line.count > 1 else ""
            kind = line.cluster.kind.replace("_", " ")
            name = plain(line.name)
            leaf = branch.add(f"{name}  {kind}  {line.cluster.size} -> {line.kept}{unit}{times}", highlight=False)
            if line.ties:
                leaf.add(f"[dim]with {plain(line.ties)}[/]", highlight=False)
    for what, node, count, params in planning.kept_whole(analysis.blocked):
        places = plain(node) + (f" and {count - 1} more" if count > 1 else "")
        tree.add(f"[yellow]stays[/] {plain(what)} ({params:,} parameters, at {places})", highlight=False)
    return tree


def _expected(made: Plan) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("ratio")
    for column in ("parameters", "MACs", "expected size"):
        table.add_column(column, justify="right")
    curves = made.weighed.measured is not None
    if curves:
        table.add_column("divergence", justify="right")
    timed = any(row.latency is not None for row in made.expectations)
    if timed:
        table.add_column("latency of dense", justify="right")
    dense = [f"{made.analysis.params:,}", f"{made.analysis.macs:,}", f"{made.megabytes:.3g} MB"]
    table.add_row("dense", *dense, *(["0 nats"] if curves else []), *(["1"] if timed else []))
    for at, row in enumerate(made.expectations):
        name = "target" if row.ratio is None else f"{row.ratio:g}"
        ratio = f"[bold]{name}[/] (recipe)" if at == 0 else name
        cells = [f"{row.params:,}", f"{row.macs:,}", f"{row.megabytes:.3g} MB"]
        table.add_row(
            ratio,
            *cells,
            *([] if row.divergence is None else [f"{row.divergence:.3g} nats"]),
            *([] if row.latency is None else [f"{row.latency:.3f}"]),
        )
    return table


@main.command()
@recipe_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("--picture", type=NewFile(".svg", ".png"), help="Draw the curves: FILE.svg, FILE.png.")
def sensitivity(as_json: bool, picture: Path | None, **options: Any) -> None:
    """Show which layers can least do without their channels: what happens to the outputs as each one loses some.

    For every layer, the network is run with the least 1/16, 1/8, 1/4, 3/8, 1/2, 5/8, 3/4 and 9/10 of its groups masked,
    by prune.criterion, and what reads them fitted anew (not with prune.refit=false). Shown is the divergence of
    Kullback and Leibler to the dense outputs on prune.samples calibration samples, in nats: below 0.01 hardly any
    prediction changes, from 1 on most of them do. The worst layers come first; prune.scope=curves takes least from
    these. No labels and no training; nothing is written but --picture.

    The weights are those of --weights, or of a baseline that was made before with the same options.

    \b
    leanort sensitivity mynet.py:build --weights model.safetensors --picture curves.svg
    leanort sensitivity resnet50 --set prune.criterion=wanda --set prune.seconds=60
    leanort sensitivity resnet50 --set prune.refit=false
    """
    config = recipe_of(**options)
    from pipeline.inquiry import sensitivity as inquiry
    from pipeline.progress import TerminalProgress

    found = inquiry.sensitivity(config, TerminalProgress())
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        _print_sensitivity(found)
    if picture is None:
        return
    inquiry.picture(found, f"{config.model}: {found.words} go first", picture)
    if not as_json:
        Console().print(f"The curves are drawn in {plain(str(picture))}.", highlight=False)


def _print_sensitivity(found: Sensitivity) -> None:
    from pipeline.inquiry import sensitivity as inquiry

    console = Console()
    table = Table(box=None, pad_edge=False)
    table.add_column("layer")
    table.add_column("groups", justify="right")
    shown = [at for at, share in enumerate(found.shares) if share in inquiry.SHOWN]
    for at in shown:
        table.add_column(f"-{found.shares[at]:.3g}", justify="right")
    table.add_column("MACs, half gone", justify="right")
    for row in found.layers:
        cells = (f"{row.divergence[at]:.3g}" for at in shown)
        table.add_row(plain(row.cluster), str(row.groups), *cells, f"-{row.macs_saved:.1%}")
    console.print(table)
    refit = ", its readers fitted anew each time" if found.refit else ""
    console.print(
        f"Divergence from the dense outputs in nats, when {plain(found.words)} go{refit}: {found.samples} samples, "
        f"{found.seconds:.1f} s, weights: {plain(found.weights)}.",
        highlight=False,
    )
    if len(found.measured_at) < len(found.shares):
        told = ", ".join(f"{share:.3g}" for share in found.measured_at)
        console.print(f"The time was short: measured at {told} only, powers between.", highlight=False)
