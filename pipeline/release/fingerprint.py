"""What decides a stage's result: its section of the recipe, its inputs, the code that it can reach, tools and host."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from exporters import host
from foundation.files import sha256
from pipeline.release.records import digest

ROOT = Path(__file__).resolve().parents[2]
"""Where the packages lie."""
_PACKAGES = ("pipeline", "exporters", "validators", "foundation")
_TOOLS = ("numpy", "onnx", "onnxruntime", "onnxscript", "timm", "torch", "torchvision", "transformers")


@functools.cache
def tools() -> dict[str, str]:
    """Versions of Python and of the libraries whose code decides the result."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _TOOLS}


@functools.cache
def host_facts() -> dict[str, str]:
    """The machine that measured."""
    return {"isa": host.isa(), "cpu": host.cpu_name(), "system": platform.system(), "machine": platform.machine()}


def git_facts() -> dict[str, str]:
    """Commit and state of the checkout that this code runs from; empty when it is no checkout."""
    here = Path(__file__).resolve().parent

    def ask(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        dirty = bool(ask("status", "--porcelain", "--untracked-files=no"))
        return {"commit": ask("rev-parse", "HEAD"), "dirty": str(dirty).lower()}
    except (OSError, subprocess.CalledProcessError):
        return {}


def fingerprint(stage: ModuleType, section: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """What decides a stage's result: its section of the recipe, its inputs' digests, its code, tools and host."""
    return digest(
        {
            "stage": stage.__name__,
            "section": section,
            "inputs": dict(inputs),
            "code": code_digest(stage.__name__),
            "tools": tools(),
            "host": host_facts(),
        }
    )


def code_digest(module: str) -> str:
    """Digest of a module's source and of every module of this project that it can reach (`cone`).

    A stage whose own code and whose helpers did not change can be reused although something else in the project did.
    """
    return digest({name: sha256(ROOT / path) for name, path in cone(module).items()})


@functools.cache
def cone(module: str) -> Mapping[str, Path]:
    """Every module of this project that `module` imports, directly or not, itself included: name -> path below `ROOT`.

    Read off the source, nothing is imported: imports inside functions count, those under `if TYPE_CHECKING` do not,
    since they decide no result. A package's face, an `__init__.py` that only hands names on, is no module of the cone;
    the modules that its names come from are.
    """
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _source(name)
        if name in found or path is None:
            continue
        found[name] = path
        waiting += _imports(ROOT / path)
    return dict(sorted(found.items()))


def _imports(path: Path) -> Iterator[str]:
    """The modules that a file imports; a name imported from a module is offered as a module, too."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            waiting += ast.iter_child_nodes(node)


def _source(name: str) -> Path | None:
    """The file of a module of this project, below `ROOT`; None for anything else: a package, a class, other code."""
    if name.partition(".")[0] not in _PACKAGES:
        return None
    path = Path(*name.split(".")).with_suffix(".py")
    return path if (ROOT / path).is_file() else None
