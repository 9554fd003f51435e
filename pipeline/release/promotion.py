"""Which version is live: promoting one, going back, and throwing away what nothing needs any more.

The pointer `current` moves in one atomic step, after a line in the log that says so and before one that says it is
done, all under one lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from foundation.errors import ConfigError, StoreError, VersionError
from pipeline.release import checks, journal, judging, records, store
from pipeline.release.journal import Entry


def promote(version: Path, *, forced: bool = False, reason: str = "") -> str:
    """Make `version` the current one and log it. Returns the version that was current before, "" for none.

    Its stored measurements are judged again. Raises VersionError unless its gate passes (`forced` overrides that and
    needs a `reason`), and StoreError when any byte of it is not as it was sealed, forced or not.
    """
    folder = version.parent
    if forced and not reason.strip():
        raise ConfigError("--force needs a reason.", 'Give one with --reason "...": it is logged with your name.')
    journal.whole(folder.parent)
    if faults := checks.faults(version):
        raise StoreError(
            f"{folder.name}/{version.name} is not promoted: {faults[0]}.", "Deploy again; force does not help here."
        )
    outcome = judging.outcome(version)
    if outcome != "pass" and not forced:
        raise VersionError(
            f"{folder.name}/{version.name} is not promoted: its verdict is {outcome}.",
            f"See {version / 'report.html'}, or override with --force --reason.",
        )
    with journal.locked(folder.parent):
        settle(folder.parent)
        stack = history(folder)
        before = stack[-1] if stack else ""
        live = store.current(folder)
        if live == version and not store.pointer_fault(folder):
            return version.name
        _move(version, "promote", before, outcome, outcome != "pass", reason)
        return before if live is not None else ""


def rollback(folder: Path, *, reason: str = "") -> tuple[str, str]:
    """Go back to the version that was current before this one. Returns (from, to).

    Raises VersionError when there is none, and StoreError when it is damaged.
    """
    with journal.locked(folder.parent):
        settle(folder.parent)
        stack = history(folder)
        if len(stack) < 2:
            raise VersionError(
                f"There is nothing to roll {folder.name} back to.", "See `leanort list --log` for what was promoted."
            )
        now, target = stack[-1], folder / stack[-2]
        if target not in store.versions(folder):
            raise VersionError(f"{folder.name}/{target.name} is gone.", "Promote another one: see `leanort list`.")
        if faults := checks.faults(target):
            raise StoreError(f"{folder.name}/{target.name} is damaged: {faults[0]}.", "Promote another one.")
        _move(target, "rollback", now, judging.outcome(target), False, reason)
        return now, target.name


def settle(artifacts: Path) -> None:
    """Bring log and pointers together after a kill, a full disk or a hand in between; the caller holds the log.

    A move that was begun is written down as done where the pointer has moved, and as void where it has not. A pointer
    that moved without a line gets one. Raises StoreError where the log was tampered with.
    """
    for entry in journal.unfinished(artifacts):
        folder = artifacts / entry.model
        if entry.action in ("seal", "remove"):
            happened = (folder / entry.version).exists() is (entry.action == "seal")
        else:
            now = store.current(folder)
            happened = now is not None and now.name == entry.version
        journal.finish(artifacts, entry, "done" if happened else "void")
    entries = journal.whole(artifacts)
    for folder in store.models(artifacts):
        store.tidy(folder)
        now, stack = store.current(folder), _promoted(folder, entries)
        if now is not None and stack[-1:] != [now.name]:
            previous = stack[-1] if stack else ""
            reason = "found as the current one, with no line that says how"
            digest = records.seal_of(now)
            journal.append(
                artifacts, "promote", folder.name, now.name, manifest=digest, previous=previous, reason=reason
            )


def history(folder: Path) -> list[str]:
    """The versions promoted one over the other, the current one last; a rollback takes the last one away.

    Raises StoreError where the log was tampered with.
    """
    stack = _promoted(folder, journal.whole(folder.parent))
    now = store.current(folder)
    if now is not None and stack[-1:] != [now.name]:  # moved by hand, or before there was a log
        stack.append(now.name)
    return stack


def _promoted(folder: Path, entries: Sequence[Entry]) -> list[str]:
    """What the log alone says, as `history`."""
    stack: list[str] = []
    for entry in entries:
        if entry.model != folder.name or entry.state != "done":
            continue
        if entry.action == "promote":
            if not stack and entry.previous:
                stack.append(entry.previous)
            if stack[-1:] != [entry.version]:  # promoted once more, since its link was lost
                stack.append(entry.version)
        elif entry.action == "rollback" and stack:
            stack.pop()
    return stack


def _move(
    version: Path, action: Literal["promote", "rollback"], previous: str, verdict: str, forced: bool, reason: str
) -> None:
    """The line that says so, the pointer, the line that it is done."""
    folder = version.parent
    if version not in store.versions(folder):
        raise VersionError(f"{folder.name}/{version.name} is gone.", "Promote another one: see `leanort list`.")
    entry = journal.append(
        folder.parent,
        action,
        folder.name,
        version.name,
        state="begun",
        manifest=records.seal_of(version),
        previous=previous,
        verdict=verdict,
        forced=forced,
        reason=reason,
    )
    store.point_current(folder, version)
    journal.finish(folder.parent, entry, "done")


def rolled_back(version: Path) -> bool:
    """Whether the last thing that happened to `version` is that it was rolled back from."""
    mine = [
        e
        for e in journal.read(version.parent.parent)[0]
        if e.model == version.parent.name and version.name in (e.version, e.previous)
    ]
    return bool(mine) and mine[-1].action == "rollback" and mine[-1].previous == version.name


def removable(folder: Path, keep: int) -> list[Path]:
    """The versions that `collect` would remove: all but the newest `keep`, the current and previous one, and parents.

    A parent is a version that one of those which stay was compared with, or took a stage from.
    """
    versions = store.versions(folder)
    stay = {version.name for version in versions[max(0, len(versions) - keep) :]}
    stay |= set(history(folder)[-2:])
    for version in versions:
        if version.name in stay:
            stay |= _parents(version)
    return [version for version in versions if version.name not in stay]


def collect(folder: Path, versions: Sequence[Path]) -> int:
    """Remove `versions`, one at a time and each at once for whoever looks on. Returns the bytes that became free."""
    freed = 0
    for version in versions:
        size = sum(p.stat().st_size for p in store.files_in(version).values() if p.stat().st_nlink == 1)
        with journal.locked(folder.parent):
            settle(folder.parent)
            if version.name in history(folder)[-2:]:
                continue
            entry = journal.append(folder.parent, "remove", folder.name, version.name, state="begun")
            store.discard(version)
            journal.finish(folder.parent, entry, "done")
        store.sweep(folder)
        freed += size
    store.sweep(folder)
    return freed


def _parents(version: Path) -> set[str]:
    made = records.read_if_whole(version)
    if made is None:  # it says nothing of what it was made from
        return set()
    return {*made.reused.values(), made.parents.get("promoted version", "")}
