"""The one error that the exporters raise on purpose."""

from __future__ import annotations

from foundation.errors import Explained


class ExportError(Explained):
    """A file could not be made or read."""
