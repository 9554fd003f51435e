"""Latency before a release: profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from foundation.errors import ConfigError
from pipeline.cli.building import recipe_of, recipe_options
from pipeline.cli.group import NewFile, main, plain

if TYPE_CHECKING:
    from pipeline.inquiry import profiling

SHOWN = 12
"""Layers, those that save most."""


@main.command()
@recipe_options
@click.option("--kit", type=NewFile(".tar.gz", ".tgz"), help="Write a kit for another device: FILE.tar.gz.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("--picture", type=NewFile(".svg", ".png"), help="Predicted against measured: FILE.svg, FILE.png.")
def profile(kit: Path | None, as_json: bool, picture: Path | None, **options: Any) -> None:
    """Measure what widths cost in milliseconds on onnxruntime, or show what was measured.

    A few models of random widths are cut, exported as a release is, and timed against the dense one, each operator on
    its own and all together; from these the time of any other choice of widths is predicted. `deploy --latency`
    does this by itself, and uses what is kept here. Weights play no part.

    For a device that has no torch, --kit writes an archive that needs onnxruntime and numpy only. Unpack it there, run
    `python latency-kit/measure.py`, and bring latency-kit/device.json back: --device device.json targets that device.

    \b
    leanort profile resnet50
    leanort profile mobilenet_v2 --set gate.threads=4 --picture table.svg
    leanort profile resnet50 --kit kit.tar.gz
    leanort profile resnet50 --device device.json --latency 0.4
    """
    config = recipe_of(**options)
    from pipeline.inquiry import profiling
    from pipeline.progress import TerminalProgress

    progress = TerminalProgress()
    given = profiling.subject(config)
    if kit is not None:
        _kit(given, kit, progress)
        return
    made = profiling.tables(given, progress)
    console = Console()
    if as_json:
        click.echo(json.dumps([table.to_json() for table in made], indent=2))
    else:
        for table in made:
            _show(console, table)
    if picture is None:
        return
    profiling.picture(made[0], f"{config.model}: {made[0].title}", picture)
    if not as_json:
        console.print(f"Predicted against measured is drawn in {plain(str(picture))}.", highlight=False)


def _kit(given: profiling.Subject, path: Path, progress: Any) -> None:
    from pipeline.latency import kit

    if len(given.settings) > 1:
        raise ConfigError("A kit is for one number of threads and one batch size.", "Give one of each.")
    size = kit.write(given.analysis, given.source, given.settings[0], given.clusters, path, progress, given.branches)
    click.echo(
        f"{path}: {size / 1e6:.3g} MB. On the device: tar xzf {path.name} && python {kit.FOLDER}/{kit.SCRIPT}, "
        f"then here: --device {kit.FOLDER}/device.json"
    )


def _show(console: Console, table: profiling.Table) -> None:
    machine = table.machine
    console.print(
        f"Dense: {table.dense_ms:.3g} ms ({table.title}, onnxruntime {plain(machine['onnxruntime'])}, "
        f"{plain(machine['cpu'])}).",
        highlight=False,
    )
    console.print(
        f"Predictions from {table.models} measured models; of models left out, {table.error:.1%} off "
        "(a standard deviation).",
        highlight=False,
    )
    rows = Table(box=None, pad_edge=False)
    for column in ("every layer without", "MACs left", "latency left", "", "95 %"):
        rows.add_column(column, justify="right")
    for one in table.expected:
        spread = 1.96 * table.error * one.latency
        rows.add_row(
            f"{one.ratio:.0%}",
            f"{one.macs:.3f}",
            f"{one.latency:.3f}",
            f"{one.latency * table.dense_ms:.3g} ms",
            f"{max(0.0, one.latency - spread):.3f} to {one.latency + spread:.3f}",
        )
    console.print(rows)
    rows = Table(box=None, pad_edge=False)
    rows.add_column("half of this layer alone")
    rows.add_column("groups", justify="right")
    rows.add_column("saves", justify="right")
    for layer in table.layers[:SHOWN]:
        saved = layer.saved * table.dense_ms
        rows.add_row(plain(layer.cluster), str(layer.groups), f"{saved:.3g} ms ({layer.saved:.1%})")
    console.print(rows)
