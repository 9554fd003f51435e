"""The tolerance rule, the same at every hop: differences count against max(1, max|reference|).

Outputs near zero are compared absolutely, large ones relatively: float32 rounds in proportion to the largest number
that went into a sum, not to the result.
"""

from __future__ import annotations


def allowance(limit: float, scale: float) -> float:
    """The largest difference that `limit` allows on a tensor whose largest reference magnitude is `scale`."""
    return limit * max(1.0, scale)


def scaled(difference: float, scale: float) -> float:
    """A difference in units of the rule: what `limit` would have had to be to allow it."""
    return difference / max(1.0, scale)
