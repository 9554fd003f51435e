"""Libraries that talk while they work, heard instead of shown."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(*families: str) -> Iterator[list[str]]:
    """Collect what the loggers of `families` would print ("" is the root logger), and Python's warnings.

    The yielded list holds the first line of each; warnings join it when the block ends. Deprecations are left out: they
    concern the libraries' authors.
    """
    said: list[str] = []
    collector = _Collector(said)
    before = [(logger, logger.handlers[:], logger.propagate) for logger in _talkers(families)]
    for logger, _, _ in before:
        logger.handlers[:], logger.propagate = [collector], False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield said
        said += [_first(str(entry.message)) for entry in caught]
    finally:
        for logger, handlers, propagate in before:
            logger.handlers[:], logger.propagate = handlers, propagate


def _talkers(families: tuple[str, ...]) -> list[logging.Logger]:
    """The heads of the families, and those below that print by a handler of their own; torch has dozens."""
    heads = [logging.getLogger(name) for name in families]
    prefixes = tuple(f"{name}." for name in families if name)
    below = [logger for name, logger in logging.root.manager.loggerDict.items() if name.startswith(prefixes)]
    return heads + [
        logger
        for logger in below
        if isinstance(logger, logging.Logger) and any(type(h) is logging.StreamHandler for h in logger.handlers)
    ]


class _Collector(logging.Handler):
    """Keeps the first line of every warning."""

    def __init__(self, into: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.into = into

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        self.into.append(_first(record.getMessage()))


def _first(text: str) -> str:
    return text.strip().partition("\n")[0]
