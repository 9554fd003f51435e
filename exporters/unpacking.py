"""A packed bundle from anywhere, back to a folder: every header is read and bounded before anything is written.

tarfile itself is too trusting for this: it reads a pax header of any size into memory, and writes out the holes of a
sparse file. So the headers are walked here, and only what `pack` writes is known: plain files in one folder, and a pax
header where a name needs one.
"""

from __future__ import annotations

import gzip
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from foundation.errors import ExportError, first_line

MAX_BYTES = 64 << 30
"""Of all files together, unpacked."""
MAX_FILES = 1000
MAX_RATIO = 200
"""Unpacked to packed, where more than FREE_BYTES come out. Weights of which 99 % are zero reach about 30."""
FREE_BYTES = 256 << 20
MAX_PAX_BYTES = 64 << 10
MAX_NAME = 255
_BLOCK = tarfile.BLOCKSIZE
_PIECE = 1 << 20
_NOTED = ("path", "size", "mtime", "atime", "ctime", "uid", "gid", "uname", "gname")
_REFUSED = {
    tarfile.SYMTYPE: "a link",
    tarfile.LNKTYPE: "a link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.DIRTYPE: "a folder",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
    tarfile.GNUTYPE_LONGNAME: "a GNU header",
    tarfile.GNUTYPE_LONGLINK: "a GNU header",
    tarfile.XGLTYPE: "a global header",
}


@dataclass(frozen=True)
class Entry:
    """A file of an archive: its name without the folder, its size in bytes."""

    name: str
    size: int


def listed(archive: Path) -> tuple[Entry, ...]:
    """What is in the bundle `archive`, read to its end without a byte being written.

    Raises ExportError when it is no readable archive, holds anything but plain files in one folder (a link, a device, a
    sparse file, an absolute path, a path with "..", a name twice), or is larger than a bundle can be: MAX_BYTES,
    MAX_FILES, MAX_RATIO, MAX_PAX_BYTES.
    """
    archive = Path(archive)
    try:
        found = []
        for entry, pieces in _entries(archive):
            for _ in pieces:
                pass
            found.append(entry)
    except (tarfile.TarError, EOFError, OSError, zlib.error, ValueError) as error:
        raise ExportError(f"{archive} cannot be unpacked: {first_line(error)}.", "Fetch it again.") from error
    return tuple(found)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the bundle `archive` into the new `folder`, whole or not at all; see `listed` for what is refused.

    Raises ExportError for that, and when `folder` exists, cannot be written, or has no room.
    """
    archive, folder = Path(archive), Path(folder)
    if folder.exists():
        raise ExportError(f"{folder} exists.", "Give a new folder.")
    needed = sum(entry.size for entry in listed(archive))
    partial: Path | None = None
    try:
        free = shutil.disk_usage(folder.parent).free
        if needed > free:
            raise ExportError(f"{archive} unpacks to {needed} bytes, and {folder.parent} has {free}.", "Free some.")
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
        for entry, pieces in _entries(archive):
            with (partial / entry.name).open("xb") as file:
                for piece in pieces:
                    file.write(piece)
        partial.chmod(0o755)
        partial.rename(folder)
    except (tarfile.TarError, EOFError, OSError, zlib.error, ValueError) as error:  # it could be read a moment ago
        reason = f"{folder} cannot be written: {getattr(error, 'strerror', None) or first_line(error)}."
        raise ExportError(reason, "Check its rights and free space.") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _entries(archive: Path) -> Iterator[tuple[Entry, Iterator[bytes]]]:
    """Every file of the archive with its content in pieces, all of which must be read before the next file.

    Raises ExportError for what no bundle holds, and whatever gzip and tarfile raise for what they cannot read.
    """
    if not archive.is_file():  # of a pipe, reading would wait for ever
        raise ExportError(f"{archive} cannot be unpacked: there is no such file.", "Give the .tar.gz of a bundle.")
    with gzip.open(archive) as stream:
        yield from _walked(stream, archive, _limit(archive.stat().st_size))


def _limit(packed: int) -> int:
    """How many bytes may come out of so many."""
    return min(MAX_BYTES, max(FREE_BYTES, MAX_RATIO * packed))


def _walked(stream: gzip.GzipFile, archive: Path, limit: int) -> Iterator[tuple[Entry, Iterator[bytes]]]:
    total, count = 0, 0
    top = ""
    seen: set[str] = set()
    noted: dict[str, str] = {}
    while True:
        block = _exactly(stream, _BLOCK)
        if not any(block):
            break
        kind = block[156:157]
        if kind == tarfile.XHDTYPE and not noted:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            if not 0 < header.size <= MAX_PAX_BYTES:
                raise _refusal(archive, f"a pax header of {header.size} bytes")
            noted = _records(_exactly(stream, _padded(header.size))[: header.size], archive)
            continue
        if kind not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise _refusal(archive, _REFUSED.get(kind, "an entry of no known kind"), _shown(block[:100]))
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        path, size = noted.get("path", header.name), int(noted.get("size", header.size))
        noted = {}
        folder, _, name = path.partition("/")
        if not (_plain(folder) and _plain(name)):
            raise _refusal(archive, ascii(path[:MAX_NAME]))
        if top not in ("", folder):
            raise _refusal(archive, f"a second folder {folder}")
        if name.casefold() in seen:
            raise _refusal(archive, f"{name} twice")
        top = folder
        seen.add(name.casefold())
        count, total = count + 1, total + max(size, 0)
        if size < 0 or total > limit or count > MAX_FILES:
            raise ExportError(
                f"{archive} holds {name} of {size} bytes, {count} files of {total} bytes so far; "
                f"at most {MAX_FILES} of {limit} are unpacked from a file of this size.",
                "Do not use this file.",
            )
        yield Entry(name, size), _pieces(stream, size)
    # Two blocks of zeros end an archive, and fill it up to a whole record. Reading on compares gzip's own checksum.
    if noted:
        raise _refusal(archive, "a pax header of no file")
    rest = stream.read(2 * tarfile.RECORDSIZE)
    if len(rest) < _BLOCK:
        raise EOFError("it ends early")
    if any(rest) or len(rest) >= 2 * tarfile.RECORDSIZE:
        raise _refusal(archive, "more behind its end")


def _pieces(stream: gzip.GzipFile, size: int) -> Iterator[bytes]:
    """The `size` bytes of a file, and past what fills its last block."""
    left = size
    while left:
        piece = _exactly(stream, min(_PIECE, left))
        left -= len(piece)
        yield piece
    _exactly(stream, _padded(size) - size)


def _exactly(stream: gzip.GzipFile, size: int) -> bytes:
    found = stream.read(size)
    if len(found) != size:
        raise EOFError("it ends early")
    return found


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _records(content: bytes, archive: Path) -> dict[str, str]:
    """The records of a pax header, "LENGTH KEY=VALUE\\n" each; only what says a name, a size, a time or an owner."""
    found: dict[str, str] = {}
    while content:
        length = content.split(b" ", 1)[0]
        if not (length.isdigit() and len(length) <= 6 and len(length) + 3 < int(length) <= len(content)):
            raise _refusal(archive, "a pax header that cannot be read")
        record, content = content[: int(length)], content[int(length) :]
        key, equals, value = record[len(length) + 1 : -1].decode("utf-8").partition("=")
        if key not in _NOTED or not equals or record[-1:] != b"\n" or key in found:
            raise _refusal(archive, f"a pax header with {key[:MAX_NAME]!a}")
        found[key] = value
    if not found.get("size", "0").isdecimal() or len(found.get("size", "")) > 20:
        raise _refusal(archive, "a pax header with a size that is no number")
    return found


def _plain(name: str) -> bool:
    """Whether a name is a file's own, here and on Windows, and can be printed."""
    return (
        0 < len(name.encode("utf-8", "surrogateescape")) <= MAX_NAME
        and name.isprintable()
        and not {"/", "\\", ":"} & set(name)
        and name not in (".", "..")
        and PureWindowsPath(name).name == name
    )


def _shown(raw: bytes) -> str:
    return ascii(raw.split(b"\0", 1)[0].decode("utf-8", "replace"))


def _refusal(archive: Path, what: str, name: str = "") -> ExportError:
    held = f"{name} ({what})" if name else what
    return ExportError(f"{archive} holds {held}, which no bundle does.", "Do not use this file.")
