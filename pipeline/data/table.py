"""Tables in .csv files: a row per sample, numbers standardised, texts of few values one-hot, a column the target."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from foundation.errors import DataError, brief, first_line, nearest
from pipeline.data.assemble import CHUNK, Raw, cut_parts
from pipeline.data.folders import parts_of
from pipeline.data.parts import ONE_IMAGE, Array, Batch, Part, Split, blocks
from pipeline.data.samples import Reading
from pipeline.models.source import Input

CATEGORIES = 64
"""Different texts that a column may hold to become one-hot."""
CLASSES = 1000
"""Different values that a target may have to be classes."""
FEW = 50
"""Different whole numbers that a target may have to be taken for classes where nobody says so."""
MISSING = frozenset(("", "?", "na", "n/a", "nan", "null", "none"))
"""Cells that hold nothing, in small letters."""
MISTYPED = 0.1
"""Share of cells that are no number, up to which the others of the column show that numbers were meant."""
FEATURES = "features"
_DATE = re.compile(r"\d{4}-\d\d?-\d\d?([T ].*)?|\d\d?[./]\d\d?[./]\d{2,4}([T ].*)?|\d\d?:\d\d(:\d\d)?")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_COMMA = re.compile(r"[+-]?\d+,\d+")
_DELIMITERS = ",;\t|"
COLUMNS = "columns.json"


@dataclass
class _Column:
    """What the training part shows of a column."""

    name: str
    seen: int = 0
    missing: int = 0
    numbers: bool = True
    whole: bool = True
    dates: int = 0
    commas: int = 0
    words: int = 0
    """Cells that are no number."""
    values: dict[str, int] = field(default_factory=dict)
    """Different cells -> how often; of more than `CLASSES`, the first."""
    text: tuple[int, str] = (0, "")
    """Line and cell of the first that is no number."""

    def add(self, cell: str, line: int) -> None:
        if cell.lower() in MISSING:
            self.missing += 1
            return
        self.seen += 1
        if len(self.values) <= CLASSES:
            self.values[cell] = self.values.get(cell, 0) + 1
        number = _NUMBER.fullmatch(cell)
        if number is None and self.numbers:
            self.numbers, self.text = False, (line, cell)
        self.whole = self.whole and number is not None and _is_whole(cell)
        self.words += number is None
        self.commas += _COMMA.fullmatch(cell) is not None
        self.dates += number is None and _DATE.fullmatch(cell) is not None


@dataclass(frozen=True)
class _Kind:
    """What a column becomes: one standardised number, one number per text, or the target."""

    name: str
    kind: Literal["number", "category", "classes", "values"]
    values: tuple[str, ...] = ()


def from_csv(path: Path, seed: int, reading: Reading) -> Raw:
    """A .csv file, or a folder of train.csv and test.csv (and val.csv). Each file is read twice, never kept as a whole.

    Raises DataError, with the line, for a row of another length, a number that is none, a target that is missing.
    """
    name = f"csv:{path}"
    files: dict[Part, Path] = parts_of(path, ".csv") if path.is_dir() else {"train": path}
    if not path.exists() or not files["train"].is_file():
        raise DataError(
            f"{path}: no such file, nor a folder with train.csv in it.",
            "Give csv:PATH of a file whose first line names its columns.",
        )
    header, kinds = _kinds(files["train"], reading)
    tables = {part: _Table(file, header, kinds) for part, file in files.items()}
    cut, digests = cut_parts(
        {part: table.split() for part, table in tables.items()},
        {part: table.digests for part, table in tables.items()},
        seed,
        name,
    )
    inputs = kinds[:-1]
    means, deviations, missing = _moments(cut["train"], inputs)
    encoding = _Encoding(inputs, means, deviations)
    notes = _notes(inputs, missing, tables)
    goal = kinds[-1]
    described = {"inputs": encoding.described(), "target": {"name": goal.name, "kind": goal.kind}}
    return Raw(
        name,
        {part: encoding.encoded(split) for part, split in cut.items()},
        digests,
        goal.values if goal.kind == "classes" else None,
        inputs=(Input(FEATURES, (encoding.width,)),),
        fed=ONE_IMAGE,
        files={COLUMNS: (json.dumps(described, indent=2) + "\n").encode()},
        notes=notes,
    )


def _is_whole(cell: str) -> bool:
    return cell.lstrip("+-").isdecimal()


def _rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Line and cells of each row, the header first, empty lines left out. Raises DataError for what is no table."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            first = text.readline()
            text.seek(0)
            delimiter = max(_DELIMITERS, key=first.count)
            reader = csv.reader(text, delimiter=delimiter, strict=True)
            width = 0
            for row in reader:
                if not row:
                    continue
                width = width or len(row)
                if len(row) != width:
                    raise DataError(
                        f"{file}, line {reader.line_num}: {len(row)} cells, and the first line names {width} columns.",
                        "Give every row one cell per column; a cell that holds the delimiter belongs in quotes.",
                    )
                yield reader.line_num, [cell.strip() for cell in row]
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is no UTF-8 text: {first_line(error)}.", "Save it as UTF-8.") from error
    except csv.Error as error:
        raise DataError(
            f"{file}, line {reader.line_num}: {first_line(error)}.", "Correct the quotes or the cell."
        ) from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}.", "Check its rights.") from error


def _kinds(file: Path, reading: Reading) -> tuple[list[str], list[_Kind]]:
    """The names in the first line, and what each column that is used becomes, the target last."""
    rows = _rows(file)
    header = next(rows, (0, []))[1]
    _check_header(file, header)
    target = reading.target or header[-1]
    for key, wanted in (("data.target", (target,)), ("data.inputs", reading.inputs or ())):
        for one in wanted:
            if one not in header:
                raise DataError(
                    f"{file} has no column {one!r}, which {key} names; it has {', '.join(header[:20])}.",
                    nearest(one, header) or f"Name one of them in {key}.",
                )
    columns = [_Column(one) for one in header]
    count = 0
    for line, cells in rows:
        count += 1
        for column, cell in zip(columns, cells, strict=True):
            column.add(cell, line)
    if not count:
        raise DataError(f"{file} is empty: it has no row below the names.", "Give a table with rows.")
    used = [one for one in columns if one.name != target and (reading.inputs is None or one.name in reading.inputs)]
    if not used:
        raise DataError(f"{file} has no column beside the target {target}.", "Give at least one input.")
    goal = columns[header.index(target)]
    return header, [*(_input_kind(file, one) for one in used), _target_kind(file, goal, count, reading)]


def _check_header(file: Path, header: Sequence[str]) -> None:
    hint = "Let the first line name the columns, each by a name of its own."
    if not header:
        raise DataError(f"{file} is empty.", hint)
    if all(_NUMBER.fullmatch(one) for one in header):
        raise DataError(f"{file}: the first line holds numbers, not names of columns.", hint)
    for place, one in enumerate(header):
        if not one or header.index(one) != place:
            raise DataError(
                f"{file}: column {place + 1} has {'the name ' + one + ' again' if one else 'no name'}.", hint
            )
    if len(header) < 2:
        raise DataError(f"{file} has a single column, {header[0]}.", "Give inputs and a target, with commas between.")


def _input_kind(file: Path, column: _Column) -> _Kind:
    leave = "Leave it out: --set 'data.inputs=[...]' names the columns that are used."
    if not column.seen:
        raise DataError(f"{file}: the column {column.name} is empty.", leave)
    if column.numbers:
        return _Kind(column.name, "number")
    line, cell = column.text
    if 2 * column.dates > column.seen:
        raise DataError(
            f"{file}: the column {column.name} holds dates or times, such as {brief(cell)} in line {line}.",
            f"Give numbers in its place, such as day, month or hours passed. {leave}",
        )
    if 2 * column.commas > column.seen:
        raise DataError(
            f"{file}: the column {column.name} holds numbers with a comma, such as {brief(cell)} in line {line}.",
            f"Write them with a point, as 3.5. {leave}",
        )
    mistyped = column.words <= MISTYPED * column.seen
    if mistyped or len(column.values) > CATEGORIES:
        what = "holds numbers, but" if mistyped else f"holds more than {CATEGORIES} texts, such as"
        raise DataError(
            f"{file}: the column {column.name} {what} {brief(cell)} in line {line}.",
            "Correct the cell, or leave it empty." if mistyped else leave,
        )
    return _Kind(column.name, "category", tuple(sorted(column.values)))


def _target_kind(file: Path, column: _Column, count: int, reading: Reading) -> _Kind:
    name, different = column.name, len(column.values)
    line, cell = column.text
    if reading.targets == "values" and not column.numbers:
        raise DataError(
            f"{file}, line {line}: the target {name} is {brief(cell)}, no number.",
            "Give numbers, or classes as the task.",
        )
    few = different == 2 or (different <= FEW and 10 * different <= count)
    classes = reading.targets == "classes" or not column.numbers or (column.whole and few)
    if reading.targets == "values" or not classes:
        return _Kind(name, "values")
    if different > CLASSES:
        raise DataError(
            f"{file}: the target {name} holds more than {CLASSES} different values, too many for classes.",
            "Name another column: --set data.target=NAME; for numbers name the task: --set task.name=regression",
        )
    order = sorted(column.values, key=float) if column.numbers else sorted(column.values)
    return _Kind(name, "classes", tuple(order))


class _Table:
    """A file's cells as numbers, in a file without a name: of the inputs, then of the target; NaN where a number is
    missing, -1 for a text that the training part does not have.
    """

    def __init__(self, file: Path, header: Sequence[str], kinds: Sequence[_Kind]) -> None:
        self.kinds = kinds
        self.digests: list[bytes] = []
        self.strange: dict[str, int] = {}
        """Column -> cells with a text that the training file does not have."""
        rows = _rows(file)
        own = next(rows, (0, []))[1]
        if own != list(header):
            odd = next((one for one in own if one not in header), None) or next(
                (one for one in header if one not in own), "the order"
            )
            raise DataError(
                f"{file} names other columns in its first line than the training file: {odd}.",
                "Give all parts the same columns.",
            )
        places = [header.index(kind.name) for kind in kinds]
        codes: list[Mapping[str, int]] = [{value: code for code, value in enumerate(kind.values)} for kind in kinds]
        spool = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as what is mapped
        for line, cells in rows:
            row = np.empty(len(kinds))
            for number, (kind, place) in enumerate(zip(kinds, places, strict=True)):
                row[number] = self._number(cells[place], kind, codes[number], f"{file}, line {line}")
            spool.write(row.tobytes())
            self.digests.append(hashlib.sha256("\0".join(cells[place] for place in places[:-1]).encode()).digest())
        spool.flush()
        if not self.digests:
            raise DataError(f"{file} is empty: it has no row below the names.", "Give a table with rows.")
        self.cells: Array = np.memmap(spool, np.float64, "r", shape=(len(self.digests), len(kinds)))

    def _number(self, cell: str, kind: _Kind, codes: Mapping[str, int], place: str) -> float:
        target = kind.kind in ("classes", "values")
        if cell.lower() in MISSING:
            if target:
                said = f" ({cell!r} counts as that)" if cell else ""
                raise DataError(f"{place}: the target {kind.name} is missing{said}.", "Give it, or leave the row out.")
            return -1.0 if kind.kind == "category" else float("nan")
        if kind.kind in ("category", "classes"):
            code = codes.get(cell)
            if code is None and target:
                raise DataError(
                    f"{place}: the target {kind.name} is {brief(cell)}, a class that the training part has not.",
                    "Give every class training samples.",
                )
            if code is None:
                self.strange[kind.name] = self.strange.get(kind.name, 0) + 1
            return -1.0 if code is None else float(code)
        if not _NUMBER.fullmatch(cell):
            raise DataError(
                f"{place}: {kind.name} is {brief(cell)}, no number.", "Correct the cell, or leave it empty."
            )
        value = float(cell)
        if abs(value) > float(np.finfo(np.float32).max):
            raise DataError(f"{place}: {kind.name} is {brief(cell)}, beyond what float32 holds.", "Scale the column.")
        return value

    def split(self) -> Split:
        """The part, its inputs as they stand in the table."""
        goal = self.cells[:, -1]
        classes = self.kinds[-1].kind == "classes"
        labels = torch.from_numpy(goal.astype(np.int64)) if classes else None

        def stream(chunks: Sequence[list[int]]) -> Iterator[Batch]:
            for chunk in chunks:
                rows = torch.from_numpy(self.cells[chunk])
                yield (rows[:, :-1],), None if classes else rows[:, -1].float()

        return Split(len(self.digests), stream, labels)


@dataclass(frozen=True)
class _Encoding:
    """From cells to features: numbers less the training part's mean over its deviation, texts one-hot."""

    kinds: Sequence[_Kind]
    means: Sequence[float]
    deviations: Sequence[float]
    """Of the columns of numbers, in order."""

    @property
    def width(self) -> int:
        return sum(len(kind.values) or 1 for kind in self.kinds)

    def described(self) -> list[dict[str, Any]]:
        """What each column becomes, for whoever feeds the model."""
        moments = iter(zip(self.means, self.deviations, strict=True))
        found: list[dict[str, Any]] = []
        for kind in self.kinds:
            if kind.kind == "category":
                found.append({"name": kind.name, "kind": kind.kind, "values": list(kind.values)})
            else:
                mean, deviation = next(moments)
                found.append({"name": kind.name, "kind": kind.kind, "mean": mean, "deviation": deviation})
        return found

    def features(self, cells: Tensor) -> Tensor:
        """(samples, columns) float64 to (samples, width) float32; what is missing becomes the mean, or no text."""
        moments = iter(zip(self.means, self.deviations, strict=True))
        made = []
        for place, kind in enumerate(self.kinds):
            column = cells[:, place]
            if kind.kind == "category":
                made.append((column[:, None] == torch.arange(len(kind.values))).float())
            else:
                mean, deviation = next(moments)
                made.append(((column - mean) / deviation).nan_to_num(0.0).float()[:, None])
        return torch.cat(made, 1)

    def encoded(self, split: Split) -> Split:
        """The same part with features in the place of cells."""

        def stream(chunks: Sequence[list[int]]) -> Iterator[Batch]:
            return (((self.features(cells),), target) for (cells,), target in split.stream(chunks))

        return Split(split.count, stream, split.labels)


def _moments(train: Split, kinds: Sequence[_Kind]) -> tuple[list[float], list[float], list[int]]:
    """Mean and deviation of each column of numbers, and how many cells of each column are missing there."""
    numbers = torch.tensor([kind.kind == "number" for kind in kinds])
    count, total, squares = (torch.zeros(len(kinds), dtype=torch.float64) for _ in range(3))
    shift: Tensor | None = None
    for (cells,), _ in train.stream(blocks(range(len(train)), CHUNK)):
        shift = cells.nanmean(0).nan_to_num(0.0) if shift is None else shift  # keeps the squares small
        known = cells.isfinite() & (numbers | (cells >= 0))
        apart = torch.where(known, cells - shift, 0.0)
        count, total, squares = count + known.sum(0), total + apart.sum(0), squares + apart.square().sum(0)
    assert shift is not None
    filled = count.clamp_min(1)
    mean = shift + total / filled
    spread = ((squares - total.square() / filled).clamp_min(0) / filled).sqrt()
    deviation = torch.where(spread > 1e-12 * mean.abs().clamp_min(1e-12), spread, 1.0)  # a constant column stays 0
    missing = [len(train) - int(one) for one in count]
    return mean[numbers].tolist(), deviation[numbers].tolist(), missing


def _notes(kinds: Sequence[_Kind], missing: Sequence[int], tables: Mapping[Part, _Table]) -> tuple[str, ...]:
    notes = []
    for kind, becomes in (
        ("number", "become their column's mean"),
        ("category", "become none of the others"),
    ):
        counted = zip(kinds, missing, strict=True)
        filled = [f"{one.name} ({count})" for one, count in counted if count and one.kind == kind]
        if filled:
            what = "numbers" if kind == "number" else "texts"
            notes.append(f"Missing {what} of the training part {becomes}: {', '.join(filled)}.")
    for part, table in tables.items():
        odd = [f"{one} ({count})" for one, count in table.strange.items()]
        if odd:
            notes.append(f"Texts of the {part} part that the training part does not have are none: {', '.join(odd)}.")
    return tuple(notes)
