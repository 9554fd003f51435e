"""What happened to the versions below an artifacts folder: promoted, rolled back, forced, removed. Only ever appended.

One JSON object per line in `releases.jsonl`. Each line holds the digest of the line before it, so that one that was
changed or taken out shows.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import filelock
from pydantic import BaseModel, ConfigDict, ValidationError

from foundation.errors import StoreError

FILE = "releases.jsonl"
_LOCK = ".releases.lock"


class Entry(BaseModel):
    """One event. `previous` is the version that was current before; `after` the digest of the line before this one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    time: datetime
    action: Literal["promote", "rollback", "remove"]
    model: str
    version: str
    previous: str = ""
    verdict: str = ""
    forced: bool = False
    reason: str = ""
    by: str
    after: str


@contextmanager
def locked(artifacts: Path) -> Iterator[None]:
    """Hold the log: whoever moves a pointer does so together with its entry."""
    try:
        with filelock.FileLock(artifacts / _LOCK):
            yield
    except OSError as error:
        raise StoreError(f"{artifacts} cannot be written: {error.strerror}.", "Check its rights.") from None


def append(
    artifacts: Path,
    action: Literal["promote", "rollback", "remove"],
    model: str,
    version: str,
    *,
    previous: str = "",
    verdict: str = "",
    forced: bool = False,
    reason: str = "",
) -> Entry:
    """Add one entry; the caller holds the lock. On disk when this returns."""
    path = artifacts / FILE
    last = _lines(path)[-1:]
    entry = Entry(
        time=datetime.now(UTC),
        action=action,
        model=model,
        version=version,
        previous=previous,
        verdict=verdict,
        forced=forced,
        reason=reason,
        by=_who(),
        after=_digest(last[0]) if last else "",
    )
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, (entry.model_dump_json() + "\n").encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return entry


def read(artifacts: Path) -> tuple[list[Entry], list[str]]:
    """Every entry, oldest first, and what is wrong with the log: lines that cannot be read, or that were changed."""
    entries: list[Entry] = []
    faults: list[str] = []
    before = ""
    for number, line in enumerate(_lines(artifacts / FILE), start=1):
        try:
            entry = Entry.model_validate_json(line)
        except ValidationError:
            faults.append(f"{FILE}, line {number}, cannot be read")
        else:
            if entry.after != before:
                faults.append(f"{FILE}: something before line {number} was changed or taken out")
            entries.append(entry)
        before = _digest(line)
    return entries, faults


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return path.read_text(encoding="utf-8").splitlines()


def _digest(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may know no name for its user
        user = str(os.getuid()) if hasattr(os, "getuid") else "unknown"
    return f"{user}@{platform.node()}"
