"""Images, cut, flipped and forged, for the bundle's server and for folders of images."""

from __future__ import annotations

import io
import random
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.faults.outcome import NET, Outcome, crashed, deployed, leanort

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "SGI", "DDS", "TGA", "ICO", "PCX")
TOGETHER = 25
"""Hostile images in one call of the server; a good one comes last and has to be answered."""


def run(folder: Path, tries: int, chance: random.Random) -> Outcome:
    """The server must answer the good image after all hostile ones; a folder with one of them is one line, or read."""
    outcome = Outcome()
    artifacts = deployed(folder)
    packed, bundle = folder / "b.tar.gz", folder / "bundle"
    done = leanort("bundle", "tiny", "--out", artifacts, "-o", packed)
    if done.returncode:
        raise RuntimeError(done.stderr)
    with tarfile.open(packed) as file:
        file.extractall(bundle, filter="data")
    server = next(bundle.rglob("serve.py"))
    good = folder / "good.png"
    _picture(chance).save(good)
    (folder / "net.py").write_text(NET, encoding="utf-8")
    for start in range(0, tries, TOGETHER):
        hostile = []
        served_folder = folder / f"served-{start}"
        served_folder.mkdir()
        for number in range(start, min(tries, start + TOGETHER)):
            path = served_folder / f"{number}.{chance.choice(['png', 'jpg', 'gif', 'tif', 'webp'])}"
            path.write_bytes(_forged(chance))
            hostile.append(path)
        shutil.copy(good, served_folder)  # its name sorts after the numbers
        words = [sys.executable, str(server), str(served_folder)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=300, check=False)
        except subprocess.TimeoutExpired:
            done = subprocess.CompletedProcess(words, 124, "", "no end after 300 s")
        served = good.name in done.stdout and "Traceback" not in done.stderr and done.returncode >= 0
        for path in hostile:
            outcome.expect(served, served, f"{path.name}: the server ended: {done.stderr[-200:]}")
        if start % (4 * TOGETHER) == 0:
            outcome.expect(*_folder_of(folder, hostile[0], chance))
    return outcome


def _folder_of(folder: Path, hostile: Path, chance: random.Random) -> tuple[bool, bool, str]:
    """A folder of images with one hostile one: planned, or refused in one line."""
    root = folder / f"folder-{hostile.stem}"
    for name in ("a", "b"):
        (root / "train" / name).mkdir(parents=True)
        for number in range(8):
            _picture(chance).save(root / "train" / name / f"{number}.png")
    (root / "train" / "a" / hostile.name).write_bytes(hostile.read_bytes())
    words = ["--data", f"imagefolder:{root}", "--input-size", "3,16,16", "--out", folder / "none"]
    done = leanort("plan", f"{folder / 'net.py'}:build", *words, seconds=120)
    return not crashed(done), done.returncode == 0, f"{hostile.name} in a folder: {(done.stdout + done.stderr)[-300:]}"


def _picture(chance: random.Random) -> Image.Image:
    pixels = np.random.default_rng(chance.randrange(2**31)).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _forged(chance: random.Random) -> bytes:
    return chance.choice([_flipped, _flipped, _cut, _bomb, _text_bomb, _thin, _noise])(chance)


def _written(chance: random.Random) -> bytearray:
    buffer = io.BytesIO()
    image = _picture(chance)
    form = chance.choice(FORMATS)
    try:
        image.save(buffer, form)
    except (OSError, KeyError, ValueError):  # this build of Pillow does not write it
        image.save(buffer, "PNG")
    return bytearray(buffer.getvalue())


def _flipped(chance: random.Random) -> bytes:
    content = _written(chance)
    for _ in range(chance.randrange(1, 12)):
        content[chance.randrange(min(len(content), 200))] = chance.randrange(256)
    return bytes(content)


def _cut(chance: random.Random) -> bytes:
    content = _written(chance)
    return bytes(content[: chance.randrange(len(content))])


def _png(width: int, height: int, *chunks: bytes) -> bytes:
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _bomb(chance: random.Random) -> bytes:
    side = chance.choice([9000, 13000, 20000, 60000])
    return _png(side, side, _chunk(b"IDAT", zlib.compress(bytes(1 << 22), 1)))


def _text_bomb(chance: random.Random) -> bytes:
    text = b"Comment\0\0" + zlib.compress(bytes(chance.choice([1, 80, 200]) << 20), 9)
    return _png(4, 4, _chunk(b"zTXt", text), _chunk(b"IDAT", zlib.compress(bytes(4 * 13))))


def _thin(chance: random.Random) -> bytes:
    width, height = chance.choice([(1, 60000), (60000, 1), (1, 1), (0, 5), (2**31 - 1, 1)])
    rows = bytes(min((3 * width + 1) * height, 1 << 22))
    return _png(width, height, _chunk(b"IDAT", zlib.compress(rows)))


def _noise(chance: random.Random) -> bytes:
    return chance.choice([b"", b"\x89PNG", b"GIF89a", b"P6 9 9 255\n", b"\xff\xd8\xff"]) + chance.randbytes(99)
