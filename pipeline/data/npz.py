"""Named arrays in an .npz file: `x` alone is images, other names are inputs of their own, and one array is the target.

Members that are stored as they are (numpy.savez) are mapped into memory, so that only the samples at hand are read;
compressed ones (numpy.savez_compressed) have to be unpacked, each as a whole.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib.format import MAGIC_PREFIX, read_array, read_array_header_1_0, read_array_header_2_0, read_magic
from torch import Tensor

from foundation.errors import DataError, first_line, nearest
from pipeline.data.arrays import class_numbers, from_arrays
from pipeline.data.assemble import Raw, at_once, cut_parts
from pipeline.data.folders import HASHED_BYTES
from pipeline.data.parts import PARTS, UNKNOWN, Array, Batch, Fed, Part, Split
from pipeline.data.samples import TARGETS, Reading, Shapes
from pipeline.models.calling import flattened
from pipeline.models.source import Input

_SUFFIXES: dict[str, Part] = {
    "_train": "train",
    "_test": "test",
    "_calibration": "calibration",
    "_validation": "calibration",
    "_val": "calibration",
}
Arrays = dict[str, dict[Part, Array]]
"""Name without its suffix -> part -> array."""


def from_npz(path: Path, seed: int, reading: Reading | None = None) -> Raw:
    """An .npz file, never unpickled. Raises DataError for arrays that are no numbers, or of unequal length."""
    name, reading = f"npz:{path}", reading or Reading()
    if not path.is_file():
        raise DataError(f"{path}: no such file.", "Give npz:PATH of a file with arrays x and y, or named as inputs.")
    with _Members(path) as members:
        inputs, target, classes = _roles(members, name, reading)
        arrays: Arrays = {}
        for base in (*inputs, *((target,) if target is not None else ())):
            arrays[base] = {part: members.read(member) for part, member in members.parts[base].items()}
    if target is None and classes is not None:
        raise DataError(f"{path} names classes, but holds no y.", "Add y, or leave labels out.")
    if inputs == ("x",) and reading.inputs is None and not reading.dims and _are_images(arrays, target):
        x, y = arrays["x"], arrays[target] if target is not None else {}
        if target is None or reading.targets != "values":
            return from_arrays({part: (x[part], y.get(part)) for part in x}, name, seed, classes)
    return _named(path, arrays, inputs, target, classes, seed, reading)


def _are_images(arrays: Arrays, target: str | None) -> bool:
    """Whether `x` is taken for images: bytes or floats of two or three dimensions per sample."""
    x = arrays["x"]["train"]
    if x.dtype.kind not in "iufb" or not x.ndim:  # refused, by its name, where images are read
        return True
    if x.dtype.kind in "iu" and x.dtype != np.uint8:
        return x.ndim in (3, 4) and not (target is not None and arrays[target]["train"].ndim > 1)
    return x.ndim in (3, 4)


def _roles(
    members: _Members, name: str, reading: Reading
) -> tuple[tuple[str, ...], str | None, tuple[str, ...] | None]:
    """Which arrays are inputs, which is the target, and the names of classes where there are such."""
    known = list(members.parts)
    target = reading.target
    for key, wanted in (("data.inputs", reading.inputs or ()), ("data.target", (target,) if target else ())):
        for one in wanted:
            if one not in known:
                raise DataError(
                    f"{name} holds no array {one!r}, which {key} names; it holds {', '.join(members.names)}.",
                    nearest(one, known) or f"Name one of them in {key}.",
                )
    classes: tuple[str, ...] | None = None
    others = [one for one in TARGETS if one in known and one != "labels"]
    if target != "labels" and "labels" in known and (others or target or members.is_text("labels")):
        read = members.read(members.parts["labels"]["train"]) if "train" in members.parts["labels"] else np.empty(0)
        if read.ndim != 1:
            raise DataError(f"{name}: labels has the shape {read.shape}.", "Give one name per class, or leave it out.")
        classes = tuple(str(one) for one in read)
        known.remove("labels")
    if target is None:
        target = next((one for one in TARGETS if one in known), None)
    inputs = tuple(one for one in known if one != target) if reading.inputs is None else reading.inputs
    held = f"{members.path} holds {', '.join(members.names) or 'nothing'}"
    if not inputs:
        raise DataError(f"{held}, but not x and y.", "Name the inputs as the model's forward does, and the target y.")
    wanted = (*inputs, *((target,) if target is not None else ()))
    parts = {part for base in wanted for part in members.parts[base]}
    if "train" not in parts:
        raise DataError(f"{held}, but no training part.", "Name the arrays x and y, or x_train, y_train, x_test, …")
    for base in wanted:
        for part in PARTS:
            if part in parts and part not in members.parts[base]:
                like = next(members.parts[one][part] for one in wanted if part in members.parts[one])
                suffix = next((one for one in _SUFFIXES if like.endswith(one)), "")
                raise DataError(f"{held}, but not {base}{suffix}.", "Give every input and the target for every part.")
    return inputs, target, classes


def _named(
    path: Path,
    arrays: Arrays,
    inputs: tuple[str, ...],
    target: str | None,
    classes: tuple[str, ...] | None,
    seed: int,
    reading: Reading,
) -> Raw:
    """Arrays that are inputs as they are: whole numbers are ids, floats are values."""
    name = f"npz:{path}"
    given = [part for part in PARTS if part in arrays[inputs[0]]]
    places = {part: f"{name} ({part})" if len(given) > 1 else name for part in given}
    by_position = inputs == ("x",) and reading.inputs is None and not reading.dims
    names, _, tree = flattened((0,), {}) if by_position else flattened((), dict.fromkeys(inputs, 0))
    shapes = Shapes(name, names, reading.dims)
    high = dict.fromkeys(inputs, 1)
    parts: dict[Part, Split] = {}
    digests: dict[Part, list[bytes]] = {}
    whole = sum(value.nbytes for base in inputs for value in arrays[base].values())
    for part in given:
        columns = {base: arrays[base][part] for base in inputs}
        goal = arrays[target][part] if target is not None else None
        count = _count(columns, goal, target, places[part])
        for base, value in columns.items():
            high[base] = max(high[base], 1 + _checked(value, f"{places[part]}: {base}"))
        if count:
            shapes.add(tuple(_tensor(value[:1])[0] for value in columns.values()), f"{places[part]}, sample 0")
        labels: Tensor | None = torch.full((count,), UNKNOWN)
        if goal is not None:
            labels = _labels(goal, f"{places[part]}: {target}", reading)
        parts[part] = _split(count, list(columns.values()), goal, labels)
        digests[part] = _digests(path, part, list(columns.values()), by_content=whole <= HASHED_BYTES)
    if len({split.labels is None for split in parts.values()}) > 1:
        raise DataError(
            f"{name}: {target} is whole numbers in some parts and other numbers elsewhere.", "Save it in one type."
        )
    cut, hashes = cut_parts(parts, digests, seed, name)
    described = tuple(
        Input(one.name, one.shape, one.kind, high[base], one.free) if one.kind == "tokens" else one
        for base, one in zip(inputs, shapes.inputs(), strict=True)
    )
    return Raw(
        name,
        cut,
        hashes,
        classes,
        labelled=target is not None,
        inputs=described,
        fed=Fed(1 if by_position else 0, () if by_position else inputs, tree),
        lengths=shapes.lengths(),
    )


def _count(columns: Mapping[str, Array], goal: Array | None, target: str | None, place: str) -> int:
    """Samples of a part. Raises DataError where arrays have none, or unequal numbers of them."""
    held = {**columns, **({str(target): goal} if goal is not None else {})}
    for base, value in held.items():
        if not value.ndim:
            raise DataError(f"{place}: {base} is a single number.", "Give one row per sample.")
        if len(value) and not value.size:
            raise DataError(f"{place}: {base} has the shape {value.shape}: nothing in it.", "Leave it out.")
    first, *others = held
    for one in others:
        if len(held[one]) != len(held[first]):
            raise DataError(
                f"{place}: {first} has {len(held[first])} samples, {one} has {len(held[one])}.",
                "Give one row per sample in every array; name those that are inputs in data.inputs.",
            )
    if not len(held[first]):
        raise DataError(f"{place} is empty.", "Give a data set with samples in it.")
    return len(held[first])


def _checked(value: Array, what: str) -> int:
    """The highest whole number of an array, 0 of floats. Raises DataError where it holds no finite plain numbers."""
    if value.dtype.kind not in "iufb":
        raise DataError(
            f"{what} holds {value.dtype}, not numbers.",
            "Give numbers (texts: jsonl:PATH), or name the inputs without it: --set 'data.inputs=[\"...\"]'",
        )
    highest = 0
    step = at_once(value[:1].size)
    for start in range(0, len(value), step):
        block = value[start : start + step]
        if value.dtype.kind == "f":
            with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
                good = np.isfinite(block.astype(np.float32)).reshape(len(block), -1).all(1)
            if not good.all():
                number = start + int((~good).argmax())
                raise DataError(f"{what} holds NaN or infinity in sample {number}.", "Correct it or leave it out.")
        elif value.dtype.kind in "iu" and _is_ids(value):
            low, high = int(block.min()), int(block.max())
            if low < 0 or high > np.iinfo(np.int64).max:
                rows = block.reshape(len(block), -1)
                number = start + int(((rows < 0).any(1) if low < 0 else (rows == high).any(1)).argmax())
                raise DataError(
                    f"{what} holds {low if low < 0 else high} in sample {number}: ids are whole numbers from 0.",
                    "Give floats for values.",
                )
            highest = max(highest, high)
    return highest


def _is_ids(value: Array) -> bool:
    """Whether whole numbers are ids; bytes of two dimensions or more per sample are pixels."""
    return value.dtype != np.uint8 or value.ndim < 3


def _tensor(rows: Array) -> Tensor:
    """Rows of an array as the model gets them: ids int64, booleans, pixels 0..1 and values float32."""
    if rows.dtype.kind == "b":
        return torch.from_numpy(np.array(rows))
    if rows.dtype.kind in "iu" and _is_ids(rows):
        return torch.from_numpy(rows.astype(np.int64))
    made = torch.from_numpy(rows.astype(np.float32))
    if rows.dtype != np.uint8:
        return made
    made = made / 255
    return made[:, None] if rows.ndim == 3 else made


def _labels(goal: Array, what: str, reading: Reading) -> Tensor | None:
    """Class numbers; None for values, which are checked. Raises DataError for anything else."""
    single = goal.ndim == 1 or (goal.ndim == 2 and goal.shape[1] == 1)
    whole = goal.dtype.kind in "iu" and single and reading.targets != "values"
    if whole or reading.targets == "classes" or goal.dtype.kind not in "iufb":
        return class_numbers(goal, what)
    if goal.dtype.kind == "f":
        _checked(goal, what)
    return None


def _split(count: int, columns: Sequence[Array], goal: Array | None, labels: Tensor | None) -> Split:
    def stream(chunks: Sequence[list[int]]) -> Iterator[Batch]:
        for chunk in chunks:
            target = None
            if goal is not None and labels is None:
                target = torch.from_numpy(goal[chunk].astype(np.float32 if goal.dtype.kind == "f" else np.int64))
            yield tuple(_tensor(value[chunk]) for value in columns), target

    return Split(count, stream, labels)


def _digests(path: Path, part: Part, columns: Sequence[Array], *, by_content: bool) -> list[bytes]:
    """A hash per sample; of a large file by name, size and time of change, so that it is not read first."""
    status = path.stat()
    found = []
    for number in range(len(columns[0])):
        if by_content:
            content = b"".join(np.ascontiguousarray(value[number]).tobytes() for value in columns)
        else:
            content = f"{path} {status.st_size} {status.st_mtime_ns} {part} {number}".encode()
        found.append(hashlib.sha256(content).digest())
    return found


class _Members:
    """The arrays of an archive: known by their headers, read or mapped when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []
        """As they stand in the file."""
        self.parts: dict[str, dict[Part, str]] = {}
        """Name without its suffix -> part -> name."""

    def __enter__(self) -> _Members:
        try:
            with self.path.open("rb") as file:
                if file.read(len(MAGIC_PREFIX)) == MAGIC_PREFIX:
                    raise DataError(f"{self.path} is one array, not an archive of several.", _HINT)
            self.archive = zipfile.ZipFile(self.path)
        except DataError:
            raise
        except Exception as error:  # zipfile raises anything, given any bytes
            raise DataError(f"{self.path} cannot be read: {first_line(error)}", _HINT) from error
        self.names = [one.filename.removesuffix(".npy") for one in self.archive.infolist()]
        for name in self.names:
            suffix = next((one for one in _SUFFIXES if name.endswith(one)), "")
            part = _SUFFIXES[suffix] if suffix else "train"
            found = self.parts.setdefault(name.removesuffix(suffix), {})
            if part in found:
                raise DataError(f"{self.path} holds {found[part]} and {name} for one part.", "Leave one of them out.")
            found[part] = name
        named = {part for found in self.parts.values() for part in found}
        if "calibration" in named and "test" not in named:  # the second of two parts is the judge
            self.parts = {
                base: {"test" if part == "calibration" else part: name for part, name in found.items()}
                for base, found in self.parts.items()
            }
        return self

    def __exit__(self, *_: object) -> None:
        self.archive.close()

    def is_text(self, base: str) -> bool:
        """Whether an array holds texts."""
        return any(self.read(name).dtype.kind in "US" for name in self.parts[base].values())

    def read(self, name: str) -> Array:
        """An array, mapped where it is stored as it is. It must claim no more than the archive holds, and fit."""
        member = next(one for one in self.archive.infolist() if one.filename.removesuffix(".npy") == name)
        what = f"{self.path}: {name}"
        try:
            with self.archive.open(member) as stream:
                shape, fortran, dtype = _header(stream, member.file_size, what)
                start = stream.tell()
            plain = member.compress_type == zipfile.ZIP_STORED and dtype.kind in "iufb" and math.prod(shape) > 0
            if plain:
                mapped = self._mapped(member, start, shape, fortran, dtype)
                if mapped is not None:
                    return mapped
            _check_memory(math.prod(shape) * dtype.itemsize, what)
            with self.archive.open(member) as stream:
                found: Array = read_array(stream, allow_pickle=False)
        except DataError:
            raise
        except Exception as error:  # zipfile, its decompressors and numpy's parser raise anything, given any bytes
            raise DataError(f"{what} cannot be read: {first_line(error)}", _HINT) from error
        return found

    def _mapped(
        self, member: zipfile.ZipInfo, start: int, shape: tuple[int, ...], fortran: bool, dtype: np.dtype[Any]
    ) -> Array | None:
        """An array that lies in the file as it is; None where its bytes are not those that were written."""
        with self.path.open("rb") as file:
            file.seek(member.header_offset)
            local = file.read(30)
        names, extra = struct.unpack("<HH", local[26:30])
        begin = member.header_offset + 30 + names + extra
        if member.file_size <= HASHED_BYTES:  # as zipfile does when it reads; of more, it would take too long
            content = np.memmap(self.path, np.uint8, "r", begin, (member.file_size,))
            checksum = 0
            for place in range(0, len(content), 1 << 24):
                checksum = zlib.crc32(content[place : place + (1 << 24)].data, checksum)
            if checksum != member.CRC:
                return None
        # Copied where written to, which nobody does: torch warns of memory that cannot be written.
        return np.memmap(self.path, dtype, "c", begin + start, shape, "F" if fortran else "C")


_HINT = "Save numeric arrays with numpy.savez."


def _header(stream: IO[bytes], size: int, what: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and type of the array at the start of `stream`, `size` bytes long; it is all there."""
    version = read_magic(stream)
    read = {(1, 0): read_array_header_1_0, (2, 0): read_array_header_2_0}.get(version)
    if read is None:  # 3.0 is written for arrays with named fields alone
        raise DataError(f"{what} is no array of numbers.", "Give uint8 or float images, and whole numbers as labels.")
    shape, fortran, dtype = read(stream)
    if dtype.hasobject:
        raise DataError(f"{what} cannot be read: it holds Python objects.", "Give arrays of numbers.")
    needed = math.prod(shape) * dtype.itemsize
    if any(length < 0 for length in shape) or needed > size - stream.tell():
        raise DataError(f"{what} claims the shape {shape}, which the file does not hold.", "Save the array again.")
    return shape, fortran, dtype


def _check_memory(needed: int, what: str) -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise DataError(
            f"{what} takes {needed / 1e9:.1f} GB unpacked, and this machine has {memory / 1e9:.1f} GB of memory.",
            "Save it with numpy.savez, which does not compress, or give a data set that reads sample by sample.",
        )
