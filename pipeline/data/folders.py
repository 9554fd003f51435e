"""Files in folders: parts, classes, and what tells one file from another, for a million of them in seconds."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from foundation.errors import DataError
from pipeline.data.parts import UNKNOWN, Part

HASHED_BYTES = 2 << 30
"""Up to this size files are fingerprinted by content, above it by names, sizes and times of change."""
_TRAIN = ("train", "training")
_HELD = ("test", "testing", "val", "valid", "validation")
"""Folders or files beside `train`: the first that there is is the test part, a second one the calibration part. Of any
case.
"""


@dataclass(frozen=True)
class Classed:
    """The files of a folder, and the class of each: no names, and every number `UNKNOWN`, where there are none."""

    classes: tuple[str, ...]
    files: list[str]
    labels: list[int]


def parts_of(path: Path, suffix: str = "") -> dict[Part, Path]:
    """`train`, `test`, `val` in the folder `path`, with that suffix; all of `path` as the training part where none is.

    Two parts are training and test; of three, `val` is the calibration part. Raises DataError for folders of such names
    without a training part, which are no classes, and for two spellings of one name.
    """
    wanted = {f"{key}{suffix}": key for key in (*_TRAIN, *_HELD)}
    if not path.is_dir():
        return {"train": path}
    with os.scandir(path) as entries:  # a million may lie there
        named = [one for one in entries if one.name.lower() in wanted and (one.is_file() if suffix else one.is_dir())]
    there: dict[str, Path] = {}
    for one in sorted(path / entry.name for entry in named):
        key = wanted[one.name.lower()]
        if key in there:
            raise DataError(f"{path} holds both {there[key].name} and {one.name}.", "Leave one of them.")
        there[key] = one
    training = [there[key] for key in _TRAIN if key in there]
    held = [there[key] for key in _HELD if key in there]
    if held and not training:
        raise DataError(
            f"{path} holds {' and '.join(one.name for one in held)}, and no training part.",
            f"Name that train{suffix}; a class of such a name needs another one.",
        )
    if not training:
        return {"train": path}
    parts: dict[Part, Path] = {"train": training[0]}
    parts.update(zip(("test", "calibration"), held, strict=False))
    return parts


def classed(folder: Path, suffixes: Collection[str], what: str) -> Classed:
    """The files of one kind, by the folder right under `folder` that they lie in, in the order of their names.

    Files that lie in `folder` itself, with no folder beside them, have no classes. Raises DataError for no file at all.
    """
    hint = f"Put each class's {what} into a folder of its own, or unlabelled ones right here."
    with os.scandir(folder) as entries:
        listed = sorted((entry.name, entry.is_dir()) for entry in entries)
    names = tuple(name for name, is_folder in listed if is_folder)
    loose = [os.path.join(folder, name) for name, _ in listed if _is_of(name, suffixes)]  # noqa: PTH118  # a million
    if not names:
        if not loose:
            raise DataError(f"{folder}: no {what} and no class folder in it.", hint)
        return Classed((), loose, [UNKNOWN] * len(loose))
    files: list[str] = []
    labels: list[int] = []
    empty = []
    for number, name in enumerate(names):
        before = len(files)
        for root, _, found in sorted(os.walk(folder / name, followlinks=True)):
            files.extend(os.path.join(root, one) for one in sorted(found) if _is_of(one, suffixes))  # noqa: PTH118
        labels.extend([number] * (len(files) - before))
        if len(files) == before:
            empty.append(name)
    if empty:
        raise DataError(f"{folder}: no {what} in the class folder {', '.join(empty[:5])}.", hint)
    return Classed(names, files, labels)


def classed_parts(
    name: str,
    folders: Mapping[Part, Path],
    suffixes: Collection[str],
    what: str,
    ordered: Callable[[Sequence[str]], tuple[str, ...]],
) -> dict[Part, Classed]:
    """`classed` of each part's folder, all with the training part's class names, `ordered`, and numbers by these.

    Raises DataError where another part has a class that it has not, or some parts have classes and others none.
    """
    found = {part: classed(folder, suffixes, what) for part, folder in folders.items()}
    given = found["train"].classes
    names = ordered(given)
    if len({bool(one.classes) for one in found.values()}) > 1:
        raise DataError(
            f"{name}: some parts have class folders and others none.", "Give labels for all parts, or for none."
        )
    numbers = {one: number for number, one in enumerate(names)}
    made: dict[Part, Classed] = {}
    for part, one in found.items():
        unknown = sorted(set(one.classes) - set(given))
        if unknown:
            raise DataError(
                f"{folders[part]} has classes that {folders['train']} has not: {', '.join(unknown[:5])}.",
                "Give every part the same class folders.",
            )
        labels = [numbers[one.classes[label]] for label in one.labels] if names else one.labels
        made[part] = Classed(names, one.files, labels)
    return made


SHARED_OUT = 500
"""Files from which on processes read them beside the training; fewer are read sooner than shared out."""


def readers(count: int) -> int:
    """Processes that read `count` files: beside the one that trains, or none."""
    return min(4, (os.cpu_count() or 1) - 1) if count >= SHARED_OUT else 0


def _is_of(name: str, suffixes: Collection[str]) -> bool:
    return os.path.splitext(name)[1].lower() in suffixes  # noqa: PTH122  # a million of them


def digests_of(files: Sequence[Sequence[str]], what: str) -> list[list[bytes]]:
    """Of lists of files, a hash of each, by content where all of them together are no more than `HASHED_BYTES`.

    Raises DataError, naming the file, for one that is missing or no plain file: of a pipe, reading would wait for ever.
    """
    seen = [[_status(file, what) for file in some] for some in files]
    whole = sum(one.st_size for some in seen for one in some)
    if whole <= HASHED_BYTES:
        return [[_content(file, what) for file in some] for some in files]
    return [
        [
            hashlib.sha256(f"{file} {one.st_size} {one.st_mtime_ns}".encode()).digest()
            for file, one in zip(some, status, strict=True)
        ]
        for some, status in zip(files, seen, strict=True)
    ]


def _status(file: str, what: str) -> os.stat_result:
    try:
        status = os.stat(file)  # noqa: PTH116  # a million of them
    except OSError as error:
        reason = "it is no file" if isinstance(error, FileNotFoundError) else error.strerror
        raise DataError(f"{file} is not a readable {what}: {reason}.", "Replace or remove it.") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{file} is not a readable {what}: it is no file.", "Replace or remove it.")
    return status


def _content(file: str, what: str) -> bytes:
    try:
        with open(file, "rb") as content:  # noqa: PTH123  # a million of them
            return hashlib.sha256(content.read()).digest()
    except OSError as error:
        raise DataError(f"{file} is not a readable {what}: {error.strerror}.", "Replace or remove it.") from error
