"""Packed bundles, cut, flipped and rebuilt with hostile entries."""

from __future__ import annotations

import gzip
import io
import random
import resource
import subprocess
import tarfile
import time
import zlib
from pathlib import Path

from benchmarks.faults.outcome import SURROUNDINGS, Outcome, command, deployed, leanort

SECONDS = 60.0
MEMORY = 6 << 30
ROOM = 512 << 20
"""Bytes that a check may write: the largest file that the process may make."""


def run(folder: Path, tries: int, chance: random.Random) -> Outcome:
    """`leanort bundle --check` of a changed archive: refused, in one line, in bounded time, memory and space."""
    outcome = Outcome()
    artifacts = deployed(folder)
    good = folder / "good.tar.gz"
    done = leanort("bundle", "tiny", "--out", artifacts, "-o", good)
    if done.returncode:
        raise RuntimeError(done.stderr)
    plain = gzip.decompress(good.read_bytes())
    files = _files(good.read_bytes())
    for number in range(tries):
        change = chance.choice(CHANGES)
        path = folder / f"{number}.tar.gz"
        content = change(plain, good.read_bytes(), chance)
        path.write_bytes(content)
        began = time.perf_counter()
        try:
            done = subprocess.run(
                command("bundle", "--check", path), capture_output=True, text=True, errors="replace", timeout=SECONDS,
                check=False, preexec_fn=_bounded, **SURROUNDINGS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            outcome.expect(False, False, f"{number}, {change.__name__}: no end after {SECONDS:g} s")
            continue
        said = done.stdout + done.stderr
        broke = "Traceback" in said or "bug in leanort" in said or "MemoryError" in said or done.returncode < 0
        in_time = time.perf_counter() - began < SECONDS
        right = not broke and in_time and (done.returncode != 0 or _files(content) == files)
        outcome.expect(
            right, done.returncode == 0, f"{number}, {change.__name__}: exit {done.returncode} {said[-200:]}"
        )
        path.unlink()
    return outcome


def _bounded() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, ROOM))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _files(packed: bytes) -> list[tuple[str, bytes]] | None:
    """Every file's path and content as tarfile reads them, None where it finds anything but plain files.

    Where they are the same there is nothing to refuse: a time, an owner or a mode in a header reaches no unpacked file.
    """
    found = []
    try:
        with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as file:
            for member in file:
                content = file.extractfile(member) if member.isreg() else None
                if content is None:
                    return None
                found.append((member.path, content.read()))
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error):
        return None
    return found


def a_flip(plain: bytes, packed: bytes, chance: random.Random) -> bytes:
    """One bit of the packed file."""
    content = bytearray(packed)
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return bytes(content)


def a_flip_inside(plain: bytes, packed: bytes, chance: random.Random) -> bytes:
    """One byte of the archive, packed again."""
    content = bytearray(plain)
    content[chance.randrange(len(content))] ^= chance.randrange(1, 256)
    return gzip.compress(bytes(content), 1)


def a_header(plain: bytes, packed: bytes, chance: random.Random) -> bytes:
    """Bytes of an entry's header, its checksum made right."""
    content = bytearray(plain)
    with tarfile.open(fileobj=io.BytesIO(plain)) as file:
        starts = [member.offset for member in file]
    start = chance.choice(starts)
    for _ in range(chance.randrange(1, 4)):
        content[start + chance.randrange(512)] = chance.choice(b"\0 07gSLKx2561/.\xff\x80")
    content[start + 148 : start + 156] = b" " * 8
    content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    return gzip.compress(bytes(content), 1)


def a_cut(plain: bytes, packed: bytes, chance: random.Random) -> bytes:
    """The archive cut short, packed or not."""
    if chance.random() < 0.5:
        return packed[: chance.randrange(len(packed))]
    return gzip.compress(plain[: chance.randrange(len(plain))], 1)


def an_entry(plain: bytes, packed: bytes, chance: random.Random) -> bytes:
    """One hostile entry more, in front or behind."""
    entry = tarfile.TarInfo(
        chance.choice(["bundle/more", "../more", "/tmp/more", "selftest.py", "a/" * 90 + "b", "\x1b[2J", "c\udce9"])
    )
    entry.type = chance.choice(
        [
            tarfile.REGTYPE,
            tarfile.SYMTYPE,
            tarfile.LNKTYPE,
            tarfile.FIFOTYPE,
            tarfile.CHRTYPE,
            tarfile.DIRTYPE,
            b"S",
            b"V",
        ]
    )
    entry.linkname = chance.choice(["", "/etc/passwd", "../../x", "manifest.json"])
    entry.mode = chance.choice([0o644, 0o4755, 0])
    data = b"x" * chance.choice([0, 10, 600])
    entry.size = len(data) if entry.type == tarfile.REGTYPE else 0
    if chance.random() < 0.3:
        entry.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.map": f"0,{2**50}", "size": str(2**50)}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, errors="surrogateescape") as file:
        file.addfile(entry, io.BytesIO(data))
    block = buffer.getvalue()
    block = block[: len(block.rstrip(b"\0")) + 511 & ~511]
    ends = len(plain.rstrip(b"\0")) + 511 & ~511
    return gzip.compress(block + plain if chance.random() < 0.5 else plain[:ends] + block + bytes(1024), 1)


def a_giant(plain: bytes, packed: bytes, chance: random.Random) -> bytes:
    """An entry or a header that claims, or is, far more than a bundle holds."""
    header = tarfile.TarInfo("bundle/model.onnx")
    header.type = chance.choice([tarfile.REGTYPE, b"x", b"g", b"L", b"K", b"S"])
    claimed = chance.choice([8 << 30, 1 << 40, 3 << 30, 700 << 20])
    header.size = claimed
    block = header.tobuf(tarfile.GNU_FORMAT)
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1) as file:
        file.write(block)
        for _ in range(min(claimed, chance.choice([0, 64, 900]) << 20) >> 20):
            file.write(bytes(1 << 20))
    return buffer.getvalue()


def noise(plain: bytes, packed: bytes, chance: random.Random) -> bytes:
    """No archive at all."""
    return chance.choice([b"", b"\x1f\x8b", packed[:10], chance.randbytes(2000), b"PK\x03\x04" + chance.randbytes(99)])


CHANGES = (a_flip, a_flip_inside, a_header, a_cut, an_entry, a_giant, noise)
