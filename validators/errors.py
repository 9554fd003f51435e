"""The one error that the validators raise on purpose."""

from __future__ import annotations

from foundation.errors import Explained


class ValidationError(Explained):
    """A check could not be made. A check that was made and came out badly is no error; the report says so."""
