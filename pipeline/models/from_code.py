"""Models from the user's own code: `path/to/file.py:callable`, `package.module:callable`, or objects given directly."""

from __future__ import annotations

from pipeline.models import torchvision_operators  # noqa: F401  # first, since what follows may import torchvision

# isort: split
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from foundation.errors import LeanortError, ModelError, UserError, first_line, nearest
from foundation.files import sha256
from pipeline.models.inspection import accepted, check_whole, required, source_text
from pipeline.models.plain import copied
from pipeline.models.source import Origin, Shape, image_input

_OURS = Path(__file__).resolve().parents[1]
_read: dict[str, str] = {}
"""Module of a file of the user's -> hash of that file as it was executed."""


def origin_of_object(model: nn.Module, input_size: Shape | None) -> Origin:
    """Describe a module given as an object; later changes to it are not seen."""
    kept = copied(model)
    return Origin(
        lambda: copied(kept),
        image_input(input_size),
        type(model).__qualname__,
        weigh_values=True,
        initial=False,
    )


def origin_of_callable(
    call: Callable[..., nn.Module],
    spec: str,
    num_classes: int | None,
    input_size: Shape | None,
    identity: str = "",
) -> Origin:
    """Describe what `call` returns; it is given `num_classes` and `input_size` if it takes arguments of these names."""
    arguments = accepted(call, num_classes=num_classes, input_size=input_size)
    missing = [name for name in required(call) if name not in arguments]
    if missing:
        raise ModelError(
            f"{spec} wants {', '.join(missing)}: it does not build a model by itself.",
            "Give a torch.nn.Module, or a callable that returns one (it may take num_classes and input_size).",
        )

    def make() -> nn.Module:
        with user_code(spec, ModelError):
            model = call(**arguments)
            if isinstance(model, nn.Module):
                check_whole(model, spec)
                model.eval()  # may be a method of theirs
            return model

    return Origin(make, image_input(input_size), identity or source_text(call), weigh_values=True)


def origin_of_spec(spec: str, num_classes: int | None, input_size: Shape | None) -> Origin:
    """Describe the model behind `file.py:callable` or `package.module:callable`."""
    call, identity = load_callable(spec, ModelError)
    return origin_of_callable(call, spec, num_classes, input_size, identity)


def load_callable(spec: str, error: type[UserError]) -> tuple[Callable[..., Any], str]:
    """Import the callable that `file.py:callable` or `package.module:callable` names, with a hash of its file.

    Raises `error` if the file, the module or the name is missing, or if importing it fails.
    """
    place, _, name = spec.rpartition(":")
    module = _module_from_file(place, spec, error) if place.endswith(".py") else _module(place, spec, error)
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        offered = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise error(
            f"{place} has no callable named {name!r}.",
            nearest(name, offered) or f"It offers: {', '.join(offered[:10]) or 'none'}.",
        )
    file = inspect.getsourcefile(found) if inspect.isclass(found) or inspect.isfunction(found) else None
    return found, sha256(Path(file or place)) if Path(file or place).is_file() else spec


def _module_from_file(place: str, spec: str, error: type[UserError]) -> ModuleType:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise error(f"{place}: no such file.", "Give the path of a Python file, then a colon and the callable.")
    # One name per path, and read once: a class that a model and a loop of the same file are both to know, and that a
    # pickle finds again, must be one. Reading the file after an edit replaces the earlier module.
    name = f"leanort_user_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    digest = sha256(path)
    if name in sys.modules and _read.get(name) == digest:
        return sys.modules[name]
    loader = importlib.util.spec_from_file_location(name, path)
    if loader is None or loader.loader is None:
        raise error(f"{place} cannot be imported.", "Give the path of a Python file.")
    module = importlib.util.module_from_spec(loader)
    sys.modules[name] = module  # dataclasses and typing look their own module up
    sys.path.insert(0, str(path.parent))  # as `python file.py` does, so that it can import its neighbours
    try:
        with user_code(spec, error):
            loader.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    _read[name] = digest
    return module


def _module(place: str, spec: str, error: type[UserError]) -> ModuleType:
    try:
        with user_code(spec, error):
            return importlib.import_module(place)
    except error as failure:
        if isinstance(failure.__cause__, ModuleNotFoundError):
            hint = "Is it installed in this environment? A file is given as path/to/file.py:callable."
            raise error(f"There is no Python module named {failure.__cause__.name!r}.", hint) from failure.__cause__
        raise


@contextmanager
def user_code(spec: str, error: type[LeanortError]) -> Iterator[None]:
    """Turn an exception in the user's code into one line with its place; the traceback stays as the cause.

    Whatever its class: a `sys.exit(0)` there must not end the command as if all had gone well.
    """
    kept = torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()
    device = torch.get_default_device()
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as failure:
        frames = traceback.extract_tb(failure.__traceback__)
        theirs = [frame for frame in frames if not Path(frame.filename).is_relative_to(_OURS)]
        place = f" ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})" if theirs else ""
        kind, reason = type(failure).__name__, first_line(failure)
        said = kind if reason == kind else f"{kind}: {reason}"
        raise error(f"{spec} failed: {said}{place}", "Correct the code there.") from failure
    finally:  # what the code sets for the whole process would decide what is computed afterwards
        torch.set_default_dtype(kept[0])
        torch.set_grad_enabled(kept[1])
        torch.use_deterministic_algorithms(kept[2])
        if torch.get_default_device() != device:
            torch.set_default_device(device)
