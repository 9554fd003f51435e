"""How figures are written for people: rounded here and nowhere else, so that a page and its Markdown show the same."""

from __future__ import annotations

import math
from collections.abc import Sequence

NONE = "–"  # what was not measured

SPACE = "\N{NO-BREAK SPACE}"  # between a number and its unit
MINUS = "\N{MINUS SIGN}"


def significant(value: float | None, digits: int = 3) -> str:
    """`value` with `digits` significant digits, never in exponent form between 0.001 and a million."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else f"{MINUS if value < 0 else ''}∞"
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}".replace("-", MINUS, 1) if value < 0 else f"{value:.{digits - 1}e}"
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{value:,.{decimals}f}".replace(",", SPACE).replace("-", MINUS)


def percent(share: float | None) -> str:
    """A share in 0..1 as percent; what is not quite nothing or everything never reads as 0.0 % or 100.0 %."""
    if share is None:
        return NONE
    if not math.isfinite(share):
        return significant(share)
    if 0 < share < 0.0005:
        return f"< 0.1{SPACE}%"
    if 0.9995 <= share < 1:
        return f"> 99.9{SPACE}%"
    return f"{100 * share:.1f}{SPACE}%".replace("-", MINUS)


def points(change: float | None) -> str:
    """A signed change of a percentage, in points."""
    if change is None:
        return NONE
    if not math.isfinite(change):
        return significant(change)
    sign = "±" if abs(change) < 0.05 else "+" if change > 0 else MINUS
    return f"{sign}{abs(change):.1f}{SPACE}points"


def lost(drop: float | None) -> str:
    """A drop of a percentage as the change that it is, in points."""
    return NONE if drop is None else points(-drop)


def milliseconds(value: float | None) -> str:
    """A latency in milliseconds."""
    return NONE if value is None else f"{significant(value)}{SPACE}ms"


def size(count: int | None) -> str:
    """A file size; 1 MB is a million bytes."""
    return NONE if count is None else _scaled(count, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), "B")


def amount(count: int) -> str:
    """A number of parameters or MACs, with the SI prefix as its unit."""
    return _scaled(count, (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)), "").strip()


def _scaled(count: int, units: Sequence[tuple[str, float]], smallest: str) -> str:
    # 999 950 is 1.00 M, not 1 000 k: the unit is chosen after rounding.
    rounded = float(f"{count:.2e}")
    for unit, factor in units:
        if rounded >= factor:
            return f"{significant(count / factor)}{SPACE}{unit}"
    return f"{count}{SPACE}{smallest}"


def grouped(count: int) -> str:
    """An exact count with its thousands apart."""
    return f"{count:,}".replace(",", SPACE)


def ratio(part: float | None, whole: float | None = 1.0) -> str:
    """Three digits of `part` over `whole`; "–" where there is no part or no whole."""
    return significant(part / whole) if whole and part is not None else NONE


def error(value: float | None) -> str:
    """A numerical difference, in exponent form."""
    if value is None:
        return NONE
    return f"{value:.1e}" if math.isfinite(value) and value else significant(value)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as a person would say it."""
    if seconds < 9.95:
        return f"{seconds:.1f}{SPACE}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}{SPACE}s"
    if whole < 3600:
        return f"{whole // 60}{SPACE}min {whole % 60}{SPACE}s"
    return f"{whole // 3600}{SPACE}h {whole % 3600 // 60}{SPACE}min"
