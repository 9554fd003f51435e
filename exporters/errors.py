"""The one error that the exporters raise on purpose."""

from __future__ import annotations


class ExportError(Exception):
    """A file could not be made or read: `message` says what was wrong, `hint` what to do next."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something, else the error's type."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
