"""Bundles: pack a version's, check one that came from somewhere."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click

from foundation.errors import ConfigError, VersionError
from pipeline.cli.group import OUT, main


@main.command()
@click.argument("version", metavar="MODEL[/VERSION]|FILE.tar.gz")
@OUT
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The new archive, such as resnet50.tar.gz.")
@click.option("--check", "checked", is_flag=True, help="Unpack FILE.tar.gz aside, and run the self-test on it.")
def bundle(version: str, out: Path, output: Path | None, checked: bool) -> int:
    """Pack a version's bundle: the model, its golden answers, and a self-test that needs onnxruntime and numpy alone.

    \b
    leanort bundle resnet50 -o resnet50.tar.gz        tar -xf it on the device, then: python selftest.py
    leanort bundle resnet50.tar.gz --check            one line of JSON; exit code 1 when it fails
    """
    from exporters.bundling import check
    from exporters.unpacking import unpack
    from pipeline.release import bundling, checks, store

    if checked:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "bundle"
            unpack(Path(version), folder)
            report = check(folder)
        click.echo(json.dumps(report))
        return 0 if report["ok"] else 1
    if output is None:
        raise ConfigError("No archive was named.", f"Write: leanort bundle {version} -o {Path(version).name}.tar.gz")
    if output.suffixes[-2:] != [".tar", ".gz"] and output.suffix != ".tgz":
        raise ConfigError(f"{output} is not called .tar.gz.", f"Write: -o {output}.tar.gz")
    folder = store.resolve(out, version)
    faults = checks.faults(folder)
    if faults:
        raise VersionError(f"{folder} is not what was sealed: {faults[0]}.", "Deploy again; do not ship it.")
    bundling.pack(folder, output)
    click.echo(f"{output}: {output.stat().st_size / 1e6:.3g} MB. On the device: tar -xf it, then python selftest.py")
    return 0
