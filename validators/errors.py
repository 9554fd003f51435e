"""The one error that the validators raise on purpose."""

from __future__ import annotations


class ValidationError(Exception):
    """A check could not be made: `message` says what was wrong, `hint` what to do next.

    A check that was made and came out badly is no error; the report says so.
    """

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
