"""An error that explains itself, and the one line that matters of an error that does not."""

from __future__ import annotations


class Explained(Exception):  # noqa: N818  # the packages name theirs: LeanortError, ExportError, ValidationError
    """Base of every error raised on purpose: `message` says what was wrong, `hint` what to do next, one line each."""

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
