"""The one error that the validators raise on purpose."""

from foundation.errors import ValidationError

__all__ = ["ValidationError"]
