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
    from pipeline.release.opening import ARTIFACTS
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
    assert tuple(made) == ARTIFACTS
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


def tree_of(text: str) -> dict[str, set[str]]:
    """Room -> the files that docs/architecture.md names in it, read off its first block."""
    rooms: dict[str, set[str]] = {}
    for line in text.partition("## The tree")[2].split("```")[1].splitlines():
        if line and not line.startswith(" "):
            room = rooms.setdefault(line.split("/  ")[0].split()[0].rstrip("/"), set())
        elif line:
            room |= set(line.split())
    return rooms


def test_the_tree_in_the_docs_names_every_file_of_the_four_packages_in_its_room_and_none_that_is_gone():
    told = tree_of((ROOT / "docs" / "architecture.md").read_text())
    there: dict[str, set[str]] = {}
    for package in ("pipeline", "exporters", "validators", "foundation"):
        for path in (ROOT / package).glob("**/*"):
            if path.is_file() and not path.name.startswith("__init__.py") and path.suffix not in (".typed", ".pyc"):
                there.setdefault(str(path.parent.relative_to(ROOT)), set()).add(path.name)
    lacking = {f"{room}/{name}" for room, names in there.items() for name in names - told.get(room, set())}
    gone = {f"{room}/{name}" for room, names in told.items() for name in names - there.get(room, set())}
    assert not lacking, "docs/architecture.md lacks " + ", ".join(sorted(lacking))
    assert not gone, "docs/architecture.md names what is gone: " + ", ".join(sorted(gone))


def test_the_benchmarks_in_the_docs_are_those_there_are():
    text = (ROOT / "docs" / "architecture.md").read_text().partition("Beside them:")[2].partition("\n## ")[0]
    assert set(re.findall(r"\b\w+\.py\b", text)) == {path.name for path in (ROOT / "benchmarks").glob("*.py")}


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
