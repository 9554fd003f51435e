"""Where the templates come from, the filters they may use, and how text from outside stays text."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from foundation.words import printable
from pipeline.report.figures import (
    amount,
    duration,
    error,
    grouped,
    lost,
    milliseconds,
    percent,
    points,
    ratio,
    significant,
    size,
)

_FILTERS: Mapping[str, Callable[..., str]] = {
    made.__name__: made
    for made in (significant, percent, points, lost, milliseconds, size, amount, grouped, ratio, error, duration)
}


@functools.cache
def page() -> Environment:
    """For HTML."""
    return _environment(autoescape=True)


@functools.cache
def markdown() -> Environment:
    """For Markdown."""
    # Autoescape would write HTML entities; whatever a template inserts is escaped for Markdown instead.
    return _environment(autoescape=False, finalize=_escape_markdown)


def _environment(**options: Any) -> Environment:
    environment = Environment(
        loader=PackageLoader("pipeline.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )
    environment.filters.update(_FILTERS)
    return environment


def _escape_markdown(value: object) -> str:
    """Text that GitHub shows as it is: no markup, no HTML, no table borders, nobody notified."""
    text = " ".join(printable(str(value)).splitlines())
    text = re.sub(r"([\\`*\[\]<>|~&])|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)
    return text.replace("@", "&#64;")
