"""What decides a stage's result: its section of the recipe, its inputs, the code that it can reach, tools and host."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from exporters import host
from foundation.files import sha256
from pipeline.release.records import digest

ROOT = Path(__file__).resolve().parents[2]
"""Where the packages lie."""
_PACKAGES = ("pipeline", "exporters", "validators", "foundation")
_WORDS = ("pipeline/cli/", "pipeline/report/", "pipeline/inquiry/", "pipeline/sweep/")
"""Rooms that say what was found and decide nothing."""
_TOOLS = (
    "accelerate",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "scikit-learn",
    "timm",
    "torch",
    "torchvision",
    "transformers",
)


@functools.cache
def tools() -> dict[str, str]:
    """Versions of Python and of the libraries whose code decides the result, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in _TOOLS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # some are extras
            found[name] = importlib.metadata.version(name)
    return found


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
def project_digest() -> str:
    """Digest of every file of this project's packages, templates and schemas included, but of those in `_WORDS`."""
    files = (path.relative_to(ROOT) for package in _PACKAGES for path in (ROOT / package).rglob("*"))
    deciding = (path for path in files if "__pycache__" not in path.parts and not path.as_posix().startswith(_WORDS))
    return digest({str(path): sha256(ROOT / path) for path in deciding if (ROOT / path).is_file()})


@functools.cache
def cone(module: str) -> Mapping[str, Path]:
    """Every module of this project that `module` imports, directly or not, itself included: name -> path below `ROOT`.

    Read off the source, nothing is imported. Imports inside functions count; those under `if TYPE_CHECKING` do not,
    since they decide no result. A name taken from a package's face stands for the module that it comes from. A package
    whose `__init__.py` imports modules of ours runs them whenever anything in it is imported, so they count, and so
    does it; one that imports none of ours does nothing.
    """
    found: dict[str, Path] = {}
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen or name.partition(".")[0] not in _PACKAGES:
            continue
        seen.add(name)
        waiting.append(name.rpartition(".")[0])  # the package around it is imported first
        path = Path(*name.split("."))
        package = path / "__init__.py"
        if (ROOT / package).is_file():
            imported = [one for one in _imports(ROOT / package, name) if one.partition(".")[0] in _PACKAGES]
            if imported:
                found[name] = package
                waiting += imported
        elif (ROOT / path).with_suffix(".py").is_file():
            found[name] = path.with_suffix(".py")
            waiting += _imports(ROOT / found[name], name.rpartition(".")[0])
    return dict(sorted(found.items()))


@functools.cache
def _imports(path: Path, package: str) -> tuple[str, ...]:
    """The modules that a file of `package` imports; each name imported from a module is offered as a module, too."""
    found: list[str] = []
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
        elif isinstance(node, ast.ImportFrom):
            inside = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            origin = ".".join([*inside, *([node.module] if node.module else [])])
            found += [origin, *(_face(origin).get(alias.name, f"{origin}.{alias.name}") for alias in node.names)]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif not isinstance(node, ast.expr):  # no import inside an expression
            waiting += ast.iter_child_nodes(node)
    return tuple(found)


@functools.cache
def _face(package: str) -> Mapping[str, str]:
    """The names that a package loads on first use -> the modules that they come from (its `__init__.pyi`)."""
    stub = ROOT.joinpath(*package.split("."), "__init__.pyi")
    if package.partition(".")[0] not in _PACKAGES or not stub.is_file():
        return {}
    nodes = (node for node in ast.parse(stub.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom))
    return {alias.name: f"{package}.{node.module}" for node in nodes for alias in node.names}
