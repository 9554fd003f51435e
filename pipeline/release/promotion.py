"""Which version is live: promoting one, going back, and throwing away what nothing needs any more.

The pointer `current` moves in one atomic step and only together with an entry in the log, both under one lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from foundation.errors import ConfigError, StoreError, VersionError
from pipeline.artifacts.verdict import Validated
from pipeline.release import checks, journal, records, store


def verdict(version: Path) -> str:
    """The stored outcome of a version's gate. Raises StoreError when it cannot be read."""
    try:
        return Validated.load(version / Validated.STAGE).verdict.outcome
    except (OSError, ValueError) as error:
        raise StoreError(f"The verdict of {version} cannot be read: {error}.", "Deploy again.") from None


def promote(version: Path, *, forced: bool = False, reason: str = "") -> str:
    """Make `version` the current one and log it. Returns the version that was current before, "" for none.

    Raises VersionError unless its gate has passed (`forced` overrides that and needs a `reason`), and StoreError when
    any byte of it is not as it was sealed, forced or not.
    """
    outcome = verdict(version)
    folder = version.parent
    if forced and not reason.strip():
        raise ConfigError("--force needs a reason.", 'Give one with --reason "...": it is logged with your name.')
    if outcome != "pass" and not forced:
        raise VersionError(
            f"{folder.name}/{version.name} is not promoted: its verdict is {outcome}.",
            f"See {version / 'report.html'}, or override with --force --reason.",
        )
    if faults := checks.faults(version):
        raise StoreError(
            f"{folder.name}/{version.name} is not promoted: {faults[0]}.", "Deploy again; force does not help here."
        )
    with journal.locked(folder.parent):
        before = store.current(folder)
        if before == version:
            return version.name
        store.point_current(folder, version)
        previous = before.name if before else ""
        journal.append(
            folder.parent,
            "promote",
            folder.name,
            version.name,
            previous=previous,
            verdict=outcome,
            forced=outcome != "pass",
            reason=reason,
        )
        return previous


def rollback(folder: Path, *, reason: str = "") -> tuple[str, str]:
    """Go back to the version that was current before this one. Returns (from, to).

    Raises VersionError when there is none, and StoreError when it is damaged.
    """
    with journal.locked(folder.parent):
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
        store.point_current(folder, target)
        journal.append(
            folder.parent,
            "rollback",
            folder.name,
            target.name,
            previous=now,
            verdict=verdict(target),
            reason=reason,
        )
        return now, target.name


def history(folder: Path) -> list[str]:
    """The versions promoted one over the other, the current one last; a rollback takes the last one away."""
    stack: list[str] = []
    for entry in journal.read(folder.parent)[0]:
        if entry.model != folder.name:
            continue
        if entry.action == "promote":
            if not stack and entry.previous:
                stack.append(entry.previous)
            stack.append(entry.version)
        elif entry.action == "rollback" and stack:
            stack.pop()
    now = store.current(folder)
    if now is not None and stack[-1:] != [now.name]:  # moved by hand, or before there was a log
        stack.append(now.name)
    return stack


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
            if version.name in history(folder)[-2:]:
                continue
            store.discard(version)
            journal.append(folder.parent, "remove", folder.name, version.name)
        store.sweep(folder)
        freed += size
    store.sweep(folder)
    return freed


def _parents(version: Path) -> set[str]:
    made = records.read(version)
    return {*made.reused.values(), made.parents.get("promoted version", "")}
