"""The one error that the exporters raise on purpose."""

from foundation.errors import ExportError

__all__ = ["ExportError"]
