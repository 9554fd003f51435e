"""A version's shrunk model back as a module: written to a folder that Python reads."""

from __future__ import annotations

from pathlib import Path

import click

from foundation.errors import ConfigError
from pipeline.cli.group import OUT, main


@main.command()
@click.argument("version", metavar="MODEL[/VERSION]")
@OUT
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The new folder.")
def smaller(version: str, out: Path, output: Path) -> None:
    """Write a version's shrunk model as a module of your own class, to be trained, subclassed and exported.

    \b
    leanort smaller resnet50 -o small        model.safetensors and structure.json
    then, in Python: pipeline.load_smaller("small")

    Where the class cannot compute the shrunk program, the folder holds the program, and it is said why. A version that
    was made from an object in memory needs that object: pipeline.smaller(version, model=...).
    """
    from pipeline.rebuilding.restore import save_smaller
    from pipeline.rebuilding.structure import Structure
    from pipeline.release import smaller as modules
    from pipeline.release import store

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is there already.", "Name a folder that is new or empty.")
    module = modules.smaller(store.resolve(out, version))
    save_smaller(module, output)
    structure = Structure.read(output)
    what = structure.kind if structure.original else "the program"
    click.echo(f'{output}: {what}, {structure.why}. In Python: pipeline.load_smaller("{output}")')
