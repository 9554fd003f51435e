"""What commands that only read may cost: none of the heavy libraries is imported."""

import subprocess
import sys

import pytest

HEAVY = (
    "accelerate",
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "sklearn",
    "onnxruntime",
    "matplotlib",
    "scipy",
    "optuna",
)
READING = {
    "list": ["list"],
    "log": ["list", "--log"],
    "show": ["show", "tiny"],
    "diff": ["diff", "tiny/v0001", "tiny/v0001"],
    "why": ["why", "tiny", "blocks.0.conv1"],
    "gate": ["gate", "tiny"],
    "verify": ["verify", "tiny"],
    "promote": ["promote", "tiny/v0001"],
    "gc": ["gc", "tiny"],
}


def imported(*words: str) -> tuple[int, set[str]]:
    """The exit code of a command, and which heavy libraries it imported."""
    code = (
        "import sys\nfrom pipeline.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    code = end.code\n"
        f"print('imported', *({HEAVY!r} & sys.modules.keys()), file=sys.stderr)\nsys.exit(code)"
    ).replace(repr(HEAVY), f"set({HEAVY!r})")
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    return done.returncode, set(done.stderr.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("command", READING)
def test_a_command_that_only_reads_imports_nothing_heavy(artifacts, command):
    code, found = imported(*READING[command], "--out", str(artifacts))
    assert (code, found) == (0, set())


def test_going_back_imports_nothing_heavy_even_where_there_is_nothing_to_go_back_to(artifacts):
    code, found = imported("rollback", "tiny", "--out", str(artifacts))
    assert (code, found) == (2, set())


@pytest.mark.parametrize("command", ["deploy", "sweep"])
def test_help_imports_nothing_heavy(command):
    assert imported(command, "--help") == (0, set())


def test_the_commands_of_a_sweep_are_printed_without_any_of_it():
    assert imported("sweep", "resnet50", "--latency", "0.2,0.4", "--print") == (0, set())


def test_the_packages_themselves_import_nothing_heavy():
    code = f"import sys, pipeline, exporters, validators; sys.exit(bool(set({HEAVY!r}) & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_probe_would_see_a_heavy_library(artifacts):
    _, found = imported("plan", "no_such_model", "--out", str(artifacts))
    assert "torch" in found
