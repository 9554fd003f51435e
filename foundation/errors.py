"""Every error this project raises on purpose.

    Explained                                 a message, and what to do next
    ├── ExportError                  exit 3   a file could not be made or read (exporters)
    ├── ValidationError              exit 3   a check could not be made (validators)
    └── LeanortError                 exit 3   a stage could not do its work
        ├── UserError                exit 2   what was given is wrong; the message says what to do
        │   ├── ConfigError                   recipe or option: unknown key, value out of range
        │   │   └── TargetError               a latency or size that cannot be met, or is met without pruning
        │   ├── ModelError                    unknown model, wrong input shape, not a module
        │   ├── WeightsError                  unreadable, unsafe or mismatched checkpoint, NaN
        │   ├── DataError                     empty, single-class, NaN, labels out of range
        │   └── VersionError                  no such model or version in the artifacts folder
        ├── CaptureError             exit 3   torch.export cannot capture the model: scripted, quantised, control flow
        ├── RefusedError             exit 3   channels cannot be removed without changing the output
        ├── MaskError                exit 3   a weight that should be zero is not
        ├── TrainingError            exit 3   loss became NaN or infinite
        └── StoreError               exit 3   disk full, folder read-only, hash mismatch

A gate that fails (exit 1) or cannot decide (exit 4) is a verdict, not an error: the version is written all the same.
So is a validator that breaks off, whatever it raised: it fails the gate, with the reason.
A message is one line that says what was wrong; `hint` is one line that says what to do next.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

LONGEST = 500
"""Characters that one reason of other people's code may take up in a message."""


class Explained(Exception):  # noqa: N818  # the packages name theirs: LeanortError, ExportError, ValidationError
    """Base of every error raised on purpose: `message` says what was wrong, `hint` what to do next, one line each."""

    def __init__(self, message: str, hint: str = "") -> None:
        # A reason of others may end in a full stop, and the sentence around it ends in one of its own.
        self.message, self.hint = (re.sub(r"(?<=\w)\.\.(?=\s|$)", ".", text) for text in (message, hint))
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class ExportError(Explained):
    """A file could not be made or read."""


class ValidationError(Explained):
    """A check could not be made. A check that was made and came out badly is no error; the report says so."""


class LeanortError(Explained):
    """Base of all deliberate errors: a one-line message, a one-line hint, and the process exit code."""

    exit_code = 3


class UserError(LeanortError):
    """What the user gave is wrong."""

    exit_code = 2


class ConfigError(UserError):
    """A recipe or an option is wrong."""


class TargetError(ConfigError):
    """What may be left of the model cannot be reached, or is not exceeded: another amount may be."""


class ModelError(UserError):
    """The model cannot be found, built or fed."""


class WeightsError(UserError):
    """A checkpoint is unreadable, unsafe, or does not fit the model."""


class DataError(UserError):
    """A data set is empty, malformed, or does not fit the model."""


class VersionError(UserError):
    """No such model or version in the artifacts folder."""


class CaptureError(LeanortError):
    """`torch.export` cannot capture the model; the message carries the reason and the line."""


class RefusedError(LeanortError):
    """Removing channels would change the output; nothing was removed."""


class MaskError(LeanortError):
    """A weight under a mask is not zero."""


class TrainingError(LeanortError):
    """Training cannot go on: the loss became NaN or infinite."""


class StoreError(LeanortError):
    """The artifacts folder cannot be read or written as asked."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A sentence naming the known words closest to `word`, or "" when none is close."""
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(near)}?" if near else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something, `LONGEST` characters at most, else the error's type.

    An error of other people's code may fail to say anything: its `__str__` can raise.
    """
    try:
        text = str(error)
    except KeyboardInterrupt:
        raise
    except BaseException:  # it may even call sys.exit
        text = ""
    lines = (line.strip() for line in text.splitlines())
    line = next((line for line in lines if line), type(error).__name__)
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."


def brief(value: object) -> str:
    """`repr(value)` on one line of 100 characters at most; its type where that fails."""
    try:
        text = " ".join(repr(value).split())
    except Exception:
        text = f"an object of type {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]} ..."
