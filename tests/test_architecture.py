"""Promises about the house itself: where packages come from, how stages are wired, what the command line may cost."""

import importlib
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["pipeline", "exporters", "validators"])
def test_each_package_is_ours_and_not_a_namesake_from_the_index(name):
    module = importlib.import_module(name)
    assert module.__file__ is not None
    assert Path(module.__file__).resolve().is_relative_to(ROOT)


def test_every_artifact_type_has_one_producer_and_stages_take_only_what_came_before():
    from pipeline.artifacts.base import Artifact
    from pipeline.recipe.section import Section
    from pipeline.stages.order import STAGES

    made: list[type] = []
    for stage in STAGES:
        hints = typing.get_type_hints(stage.run)
        assert issubclass(hints["cfg"], Section)
        for kind in hints.values():
            if isinstance(kind, type) and issubclass(kind, Artifact) and kind is not hints["return"]:
                assert kind in made, f"{stage.__name__} takes {kind.__name__} before it is made"
        assert hints["return"] not in made
        made.append(hints["return"])
    assert set(made) == {
        k
        for k in Artifact.__subclasses__() + [w for a in Artifact.__subclasses__() for w in a.__subclasses__()]
        if not k.__subclasses__()
    }


def test_the_files_of_the_stages_sort_in_the_order_in_which_they_run():
    from pipeline.stages.order import STAGES

    files = sorted(p.stem for p in (ROOT / "pipeline" / "stages").glob("s[0-9]_*.py"))
    assert files == [stage.__name__.rpartition(".")[2] for stage in STAGES]


def test_help_does_not_import_torch():
    code = (
        "import sys; from click.testing import CliRunner; from pipeline.cli import main;"
        "r = CliRunner().invoke(main, ['deploy', '--help']); assert 'MODEL' in r.output, r.output;"
        "sys.exit('torch' in sys.modules or 'onnxruntime' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_readme_lists_every_file_of_the_three_packages_and_none_that_is_gone():
    readme = (ROOT / "README.md").read_text()
    tree = readme.partition("## The tree")[2]
    for package in ("pipeline", "exporters", "validators"):
        for path in (ROOT / package).glob("**/*.py"):
            if path.name != "__init__.py" and path.parent.name not in ("rules", "models"):
                assert path.name in tree, f"README's tree lacks {path.relative_to(ROOT)}"
    present = {p.name for p in ROOT.rglob("*.py") if ".venv" not in p.parts}
    for name in re.findall(r"\b\w+\.py\b", tree.partition("\n## ")[0]):
        assert name in present, f"README's tree names {name}, which is gone"


def test_every_command_and_make_target_is_in_the_readme():
    from pipeline.cli import main

    readme = (ROOT / "README.md").read_text()
    for command in main.commands:
        assert f"leanort {command}" in readme, command
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z-]+):.*##", makefile, flags=re.MULTILINE)
    assert {"deploy", "test", "lint"} <= set(targets)
    for target in targets:
        if target not in ("clean", "format", "setup", "help"):
            assert f"make {target}" in readme, target
