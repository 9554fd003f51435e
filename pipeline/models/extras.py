"""Libraries that not every installation has: the extras of pyproject.toml. Where one is missing, it is named."""

from __future__ import annotations

import importlib.util

from foundation.errors import ModelError


def installed(library: str) -> bool:
    """Whether `library` can be imported; it is not imported to find that out."""
    try:
        return importlib.util.find_spec(library) is not None
    except ModuleNotFoundError:  # an import hook that bars it
        return False


def need(*libraries: str) -> None:
    """Raise ModelError, naming the extra to install, for the first of `libraries` that is not installed."""
    for library in libraries:
        if not installed(library):
            raise ModelError(f"{library} is not installed.", f'pip install "leanort[{library}]"')
