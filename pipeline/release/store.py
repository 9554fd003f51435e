"""Versions on disk: built under a temporary name, sealed complete, read-only ever after; `current` moves atomically.

artifacts/resnet50/
  .lock                 held while a version is being built
  .partial/             the version being built; a killed run leaves it, the next one goes on from it
  v0001/ v0002/ ...     complete versions
  current -> v0002      the promoted version
releases.jsonl          what was promoted, rolled back and removed
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from foundation.errors import StoreError, VersionError, first_line, nearest
from foundation.files import sync

PARTIAL = ".partial"
CURRENT = "current"
MANIFEST = "manifest.json"
_SPARE = f".{CURRENT}."
_DISCARDED = ".discarded."
_VERSION = re.compile(r"v\d{4,}")


def files_in(folder: Path) -> dict[str, Path]:
    """Every regular file below `folder`, relative POSIX name -> path, sorted.

    Raises StoreError on a symbolic link: a version holds plain files only, so that nothing can point outside it.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise StoreError(f"{path} is a link; a version holds plain files only.", "Delete it, then run again.")
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = path
    return found


def strays_in(folder: Path) -> list[str]:
    """What lies below `folder` and is neither a plain file nor a folder with something in it, by relative name."""
    found = []
    for path in sorted(folder.rglob("*")):
        empty = path.is_dir() and not any(path.iterdir())
        if path.is_symlink() or empty or not (path.is_dir() or path.is_file()):
            found.append(path.relative_to(folder).as_posix())
    return found


def versions(folder: Path) -> list[Path]:
    """The complete versions of one model, oldest first."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if _VERSION.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]
    return sorted(found, key=lambda p: int(p.name[1:]))


def models(artifacts: Path) -> list[Path]:
    """The model folders below `artifacts`, by name."""
    if not artifacts.is_dir():
        return []
    return sorted(p for p in artifacts.iterdir() if p.is_dir() and (versions(p) or (p / PARTIAL).is_dir()))


def resolve(artifacts: Path, name: str) -> Path:
    """The folder of `MODEL`, `MODEL/current` or `MODEL/vNNNN`; a bare model means its newest version.

    Raises VersionError when there is none, naming the near ones.
    """
    model, _, wanted = name.strip("/").partition("/")
    folder = artifacts / model
    known = versions(folder) if model not in ("", ".", "..") else []
    if not known:
        names = [p.name for p in models(artifacts)]
        hint = nearest(model, names) or (f"There are: {', '.join(names)}." if names else "Run `leanort deploy` first.")
        raise VersionError(f"There is no version of {model!r} in {artifacts}.", hint)
    if not wanted:
        return known[-1]
    if wanted == CURRENT:
        target = current(folder)
        if target is None and (fault := pointer_fault(folder)):
            raise VersionError(f"In {folder}, {fault}.", f"Promote one: leanort promote {model}/{known[-1].name}")
        if target is None:
            raise VersionError(f"No version of {model!r} has been promoted yet.", "See `leanort list`.")
        return target
    for version in known:
        if version.name == wanted:
            return version
    raise VersionError(f"{model!r} has no version {wanted!r}.", f"There are: {', '.join(v.name for v in known)}.")


def current(folder: Path) -> Path | None:
    """The version that `current` names, or None.

    It is a link as we write it. What copies a folder may have followed the link, or written its text into a file: then
    it is the version that the copy is the same as, or that the text names. Ask once per command: another process may
    move it at any time.
    """
    link = folder / CURRENT
    known = {version.name: version for version in versions(folder)}
    try:
        if link.is_symlink():
            return known.get(os.fspath(link.readlink()).rstrip("/"))
        if link.is_file():
            return known.get(link.read_text(encoding="utf-8").strip()) if link.stat().st_size < 64 else None
        if link.is_dir():
            manifest = (link / MANIFEST).read_bytes()
            return next((v for v in known.values() if (v / MANIFEST).read_bytes() == manifest), None)
    except (OSError, ValueError):  # moved or removed meanwhile, or no text
        pass
    return None


def pointer_fault(folder: Path) -> str:
    """What is wrong with `current`, in words; "" where it is a link to a version beside it, or where there is none."""
    link = folder / CURRENT
    if link.is_symlink():
        target = os.fspath(link.readlink())
        if not _VERSION.fullmatch(target.rstrip("/")):
            return f"{CURRENT} points to {target}, which is no version beside it"
        return "" if (folder / target).is_dir() else f"{CURRENT} points to {target}, which is not there"
    if not link.exists():
        return ""
    now = current(folder)
    kind = "folder" if link.is_dir() else "file"
    holds = f"it stands for {now.name}" if now is not None else "it stands for none of these versions"
    return f"{CURRENT} is a {kind} and no link, as a copy makes it that does not keep links; {holds}"


def point_current(folder: Path, version: Path) -> None:
    """Move `current` to `version` in one atomic step: a reader sees the old or the new one, never neither.

    A folder in its place that is a copy of a version makes way. Raises StoreError for one that is none.
    """
    link = folder / CURRENT
    if link.is_dir() and not link.is_symlink():
        if current(folder) is None:
            raise StoreError(
                f"{link} is a folder and no link, and none of these versions.", f"Move it away: mv {link} {link}.old"
            )
        link.chmod(link.stat().st_mode | stat.S_IRWXU)
        link.rename(folder / f"{_DISCARDED}{CURRENT}.{uuid.uuid4().hex}")
    spare = folder / f"{_SPARE}{uuid.uuid4().hex}"
    spare.symlink_to(version.name, target_is_directory=True)
    spare.replace(link)
    sync(folder)
    sweep(folder)


@contextlib.contextmanager
def locked(folder: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the model's lock: one run builds at a time; `waiting` is called once if another run holds it.

    The operating system frees the lock of a killed run. Raises StoreError when the folder cannot be written.
    """
    created = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        _remove_empty(created)
        raise _disk_error(error, folder) from None
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        waiting()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
        if not any(p.name != ".lock" for p in folder.iterdir()):
            (folder / ".lock").unlink(missing_ok=True)
            _remove_empty(created)


def open_partial(folder: Path) -> Path:
    """The folder of the version being built; what a killed run left in it stays."""
    partial = folder / PARTIAL
    partial.mkdir(exist_ok=True)
    return partial


def link(source: Path, target: Path) -> None:
    """Make the file `target` the same bytes as `source`: a hard link, or a copy where the file system has none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copyfile(source, target)


def seal(folder: Path, partial: Path) -> Path:
    """Turn a finished partial into the next version: files on disk, renamed in one step, then read-only."""
    known = versions(folder)
    final = folder / f"v{int(known[-1].name[1:]) + 1 if known else 1:04d}"
    for path in files_in(partial).values():
        sync(path)
        path.chmod(0o444)
    for directory in [p for p in partial.rglob("*") if p.is_dir()]:
        sync(directory)
        directory.chmod(0o555)
    sync(partial)
    partial.rename(final)
    final.chmod(0o555)
    sync(folder)
    return final


def tidy(folder: Path) -> None:
    """Finish what a killed run left half done, where it changes nothing: its spare links, what it discarded, a sealed
    version that it had no time to make read-only.
    """
    for spare in folder.glob(f"{_SPARE}*"):
        spare.unlink(missing_ok=True)
    sweep(folder)
    for version in versions(folder):
        if version.stat().st_mode & 0o222:
            version.chmod(0o555)


def discard(version: Path) -> None:
    """Take a version away in one step: it is whole until then, and `sweep` frees its space afterwards."""
    version.chmod(version.stat().st_mode | stat.S_IRWXU)
    version.rename(version.with_name(f"{_DISCARDED}{version.name}.{uuid.uuid4().hex}"))
    sync(version.parent)


def sweep(folder: Path) -> None:
    """Free the space of what was discarded, also by a run that was killed before it could."""
    for leftover in folder.glob(f"{_DISCARDED}*"):
        remove(leftover)


def remove(folder: Path) -> None:
    """Delete a tree, read-only or not, or a file, also while another process deletes it, too."""
    if folder.is_file() or folder.is_symlink():
        folder.unlink(missing_ok=True)
    while folder.exists():
        try:
            for directory in [folder, *(p for p in folder.rglob("*") if p.is_dir() and not p.is_symlink())]:
                directory.chmod(directory.stat().st_mode | stat.S_IRWXU)
            shutil.rmtree(folder)
        except FileNotFoundError:
            continue


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what a full or read-only disk makes libraries raise into one clear StoreError.

    Writers in other languages report a full disk as their own exception, so the free space itself is asked.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise _disk_error(error, folder) from None
    except Exception as error:
        if "No space left on device" in first_line(error) or shutil.disk_usage(folder).free < 1 << 16:
            raise _disk_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), folder) from None
        raise


_DISK = {
    errno.ENOSPC: ("is full", "Free some space or choose another folder with --out, then run the same command again."),
    errno.EDQUOT: ("is over its quota", "Free some space or choose another folder with --out."),
    errno.EFBIG: ("takes no file of that size", "Raise the limit (ulimit -f) or choose another folder with --out."),
    errno.EROFS: ("is read-only", "Choose a folder that can be written with --out."),
    errno.EACCES: ("may not be written by this user", "Choose a folder that can be written with --out."),
    errno.EPERM: ("may not be written by this user", "Choose a folder that can be written with --out."),
    errno.ENOTDIR: ("is not a folder", "Choose another folder with --out."),
    errno.EEXIST: ("is not a folder", "Choose another folder with --out."),
}


def _disk_error(error: OSError, folder: Path) -> StoreError:
    what, hint = _DISK.get(error.errno or 0, (f"cannot be written: {error.strerror}", "Choose another one with --out."))
    return StoreError(f"The artifacts folder {folder} {what}.", hint)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:  # innermost first
        with contextlib.suppress(OSError):
            folder.rmdir()
