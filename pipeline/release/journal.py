"""What happened to the versions below an artifacts folder: sealed, promoted, rolled back, removed. Only ever appended.

One JSON object per line in `releases.jsonl`. Each line holds the digest of the line before it, so that one that was
changed or taken out shows. Whatever moves a pointer writes two lines: "begun" before it moves, and "done" after it; a
run that is killed in between leaves the first, and the next command that moves or removes anything writes the second,
or "void" where the pointer had not moved yet.
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
Action = Literal["seal", "promote", "rollback", "remove"]
State = Literal["begun", "done", "void"]


class Entry(BaseModel):
    """One event. `previous` is the version that was current before; `manifest` the sha256 of the version's manifest;
    `after` the digest of the line before this one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    time: datetime
    action: Action
    state: State = "done"
    model: str
    version: str
    manifest: str = ""
    previous: str = ""
    verdict: str = ""
    forced: bool = False
    reason: str = ""
    by: str
    after: str


@contextmanager
def locked(artifacts: Path) -> Iterator[None]:
    """Hold the log: whoever moves a pointer does so together with its entry. Raises StoreError where it cannot be."""
    lock = filelock.FileLock(artifacts / _LOCK)
    try:
        lock.acquire()
    except OSError as error:
        raise StoreError(f"{artifacts} cannot be written: {error.strerror}.", "Check its rights.") from None
    try:
        yield
    except OSError as error:
        raise StoreError(f"{error.filename or artifacts} cannot be written: {error.strerror}.", _AGAIN) from None
    finally:
        lock.release()


_AGAIN = "Mend that, then run the same command again."


def append(
    artifacts: Path,
    action: Action,
    model: str,
    version: str,
    *,
    state: State = "done",
    manifest: str = "",
    previous: str = "",
    verdict: str = "",
    forced: bool = False,
    reason: str = "",
) -> Entry:
    """Add one entry; the caller holds the lock. On disk when this returns; OSError where the disk is full."""
    path = artifacts / FILE
    lines = _lines(path)
    # A cut write left half a line: it is closed, so that it swallows nothing, and the digest below bears witness to it.
    cut = bool(lines) and not path.read_bytes().endswith(b"\n")
    entry = Entry(
        time=datetime.now(UTC),
        action=action,
        state=state,
        model=model,
        version=version,
        manifest=manifest,
        previous=previous,
        verdict=verdict,
        forced=forced,
        reason=reason,
        by=_who(),
        after=_digest(lines[-1]) if lines else "",
    )
    left = (b"\n" if cut else b"") + entry.model_dump_json().encode() + b"\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return entry


def finish(artifacts: Path, begun: Entry, state: Literal["done", "void"]) -> None:
    """Say how an event ended that was begun; the caller holds the lock."""
    same = begun.model_dump(include={"manifest", "previous", "verdict", "forced", "reason"})
    append(artifacts, begun.action, begun.model, begun.version, state=state, **same)


def read(artifacts: Path) -> tuple[list[Entry], list[str]]:
    """Every event, oldest first, and what is wrong with the log: lines that cannot be read, or that were changed.

    The two lines of one move are one event, with the state that it reached. A line that a full disk or a kill cut
    short is no fault, since the line after it, or the missing end of its own, shows that nothing else happened to it.
    """
    events: list[Entry] = []
    faults: list[str] = []
    path = artifacts / FILE
    lines = _lines(path)
    before = b""
    unread = 0
    for number, line in enumerate(lines, start=1):
        try:
            entry = Entry.model_validate_json(line)
        except ValidationError:
            if unread:
                faults.append(f"{FILE}, line {unread}, cannot be read")
            unread = number
        else:
            if entry.after != (_digest(before) if number > 1 else ""):
                faults.append(f"{FILE}: something before line {number} was changed or taken out")
            unread = 0
            at = _begun(events, entry)
            if at is None:
                events.append(entry)
            else:
                events[at] = entry
        before = line
    if unread and path.read_bytes().endswith(b"\n"):
        faults.append(f"{FILE}, line {unread}, cannot be read")
    return events, faults


def unfinished(artifacts: Path) -> list[Entry]:
    """What was begun and of which the log does not say how it ended; at most one for each kill. Raises as `whole`."""
    return [entry for entry in whole(artifacts) if entry.state == "begun"]


def manifest_of(version: Path) -> str | None:
    """The sha256 of a version's manifest as the log last named it; "" where the log does not know the version, and None
    where there is no log, as beside a version that was copied alone.
    """
    entries = read(version.parent.parent)[0]
    known = ""
    for entry in entries:
        if (entry.model, entry.version) == (version.parent.name, version.name) and entry.state != "void":
            gone = entry.action == "remove" and entry.state == "done"  # one that was only begun may be whole still
            known = "" if gone else entry.manifest or known
    return known if entries else None


def whole(artifacts: Path) -> list[Entry]:
    """Every event, oldest first. Raises StoreError where the log was tampered with: nothing is built upon it then."""
    entries, faults = read(artifacts)
    if faults:
        raise StoreError(
            f"The log in {artifacts} was tampered with: {faults[0]}.",
            f"Put a backup of {FILE} back, or begin a new log: mv {artifacts / FILE} {artifacts / FILE}.old",
        )
    return entries


def _begun(events: list[Entry], entry: Entry) -> int | None:
    """Where the event lies that `entry` is the end of; None where there is none, as for one that has one line only."""
    if entry.state == "begun":
        return None
    keys = ("action", "model", "version", "previous")
    for at, event in reversed(list(enumerate(events))):
        if event.state == "begun" and all(getattr(event, key) == getattr(entry, key) for key in keys):
            return at
    return None


def _lines(path: Path) -> list[bytes]:
    """The lines, the last one without its end or cut short: split at the byte that `append` writes and at no other."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return []
    return content.removesuffix(b"\n").split(b"\n") if content else []


def _digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may know no name for its user
        user = str(os.getuid()) if hasattr(os, "getuid") else "unknown"
    return f"{user}@{platform.node()}"
