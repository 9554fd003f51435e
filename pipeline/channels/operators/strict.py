"""Whether a mistake in a card is raised, or taken for a form of its operator that it does not cover.

Users get the cautious answer either way, and a report that names the node; tests run strict, so that a mistake of ours
cannot pass for a refusal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

BUGS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, StopIteration)
"""What a card raises where it does not fit; a refusal that is meant is NoRule or NoAnswer."""

_strict: ContextVar[bool] = ContextVar("strict", default=False)


def strict() -> bool:
    """Whether mistakes are raised."""
    return _strict.get()


@contextmanager
def strictly(on: bool = True) -> Iterator[None]:
    """Raise mistakes within this block (`on=False`: take them for refusals)."""
    token = _strict.set(on)
    try:
        yield
    finally:
        _strict.reset(token)
