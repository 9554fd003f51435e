"""Texts in .jsonl files, one JSON object per line, as ids of the model's own tokenizer.

{"text": ..., "label": ...}                    a class by name or number, or a value; without label, unlabelled
{"text": ..., "text_pair": ..., "label": ...}  two texts
{"tokens": [...], "labels": [...]}             words, and a label for each
"""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from foundation.errors import DataError, brief, first_line, nearest
from pipeline.data.assemble import Raw
from pipeline.data.folders import parts_of
from pipeline.data.objects import from_samples
from pipeline.data.parts import IGNORED, UNKNOWN, Batch, Part
from pipeline.data.prepared import Prepared
from pipeline.data.samples import Reading, Sample, batched
from pipeline.data.tokens import FILE, Tokenizer

LARGEST = sys.float_info.max
"""Of a value: numbers beyond are no floats."""
LENGTH = "tokens"
"""Name of the free dimension."""
_TEXT, _PAIR, _WORDS = "text", "text_pair", "tokens"
_LABELS = ("label", "labels", "target", "y")

Label = str | int | float | list[str] | list[int] | None


@dataclass(frozen=True)
class _Form:
    """What the first line shows, and all others have: which keys there are, and what labels are."""

    words: bool
    pair: bool
    label: str | None
    kind: Literal["text", "number", "value", "texts", "numbers", "none"]


def from_jsonl(path: Path, seed: int, reading: Reading) -> Raw:
    """A .jsonl file, or a folder of train.jsonl and test.jsonl (and val.jsonl), tokenized as they are read.

    Raises DataError, with the line, for what is no JSON object, has other keys than the first, or an unknown label; and
    where no tokenizer is known.
    """
    name = f"jsonl:{path}"
    files: dict[Part, Path] = parts_of(path, ".jsonl") if path.is_dir() else {"train": path}
    if not files["train"].is_file():
        raise DataError(
            f"{path}: no such file, nor a folder with train.jsonl in it.",
            'Give jsonl:PATH with {"text": ..., "label": ...} per line.',
        )
    if reading.tokenizer is None:
        raise DataError(
            f"{name} holds texts, and no tokenizer is known for them.",
            f"Take a model from a folder with a {FILE} (hf:FOLDER), or name one: --set data.tokenizer=FILE",
        )
    tokenizer = Tokenizer(reading.tokenizer, reading.max_tokens)
    lines = {part: _Lines(file, reading) for part, file in files.items()}
    first = lines["train"]
    for part, one in lines.items():
        if one.form != first.form and not _both_numbers(one.form, first.form):
            raise DataError(
                f"{files[part]}, line 1: it has other keys or labels than {files['train']}.",
                "Give all parts the same form.",
            )
    values = any(one.form.kind == "value" for one in lines.values())
    labels = () if values or first.form.kind == "none" else _classes(first, name, reading)
    texts = {part: _Texts(one, tokenizer, labels, values, reading) for part, one in lines.items()}
    dims: dict[str, tuple[str | int, ...]] = dict.fromkeys(texts["train"].fed, ("batch", LENGTH))
    raw = from_samples(texts, name, seed, replace(reading, target=None, dims={**dims, **reading.dims}))
    high = max((one.high for one in raw.inputs if one.name == "input_ids"), default=0)
    if tokenizer.vocabulary is not None and high > tokenizer.vocabulary:
        raise DataError(
            f"{tokenizer.file} gives the id {high - 1}, and the model beside it knows {tokenizer.vocabulary} tokens.",
            "Take the tokenizer that belongs to the model.",
        )
    inside = labels if first.form.words else ()
    return replace(raw, names=inside, files={FILE: tokenizer.content})


def _both_numbers(one: _Form, other: _Form) -> bool:
    numbers = {"number", "value"}
    return {one.kind, other.kind} <= numbers and replace(one, kind=other.kind) == other


def _classes(lines: _Lines, name: str, reading: Reading) -> tuple[str, ...]:
    """Names of classes: texts as the model numbers them, or in their order; or the numbers from 0."""
    found = sorted(lines.labels, key=str) if lines.form.kind.startswith("text") else []
    if found:
        return reading.ordered([str(one) for one in found])
    high = max((int(one) for one in lines.labels if isinstance(one, int)), default=0)
    if high >= 1 << 20:
        raise DataError(f"{name} has the label {high}.", "Number the classes from 0, without gaps.")
    return tuple(map(str, range(high + 1)))


class _Lines:
    """Where each line of a file begins, its label's form checked; the texts stay in the file."""

    def __init__(self, file: Path, reading: Reading) -> None:
        self.file = file
        self.starts, self.numbers = array("q"), array("q")
        """Byte at which each line that is not empty begins, and its number from 1."""
        self.digests: list[bytes] = []
        self.labels: dict[Any, int] = {}
        """Different labels of lines or words -> how often."""
        self.given: list[Label] = []
        """Of each line, where a label is one thing."""
        form: _Form | None = None
        whole = True
        try:
            with file.open("rb") as content:
                start = 0
                for number, line in enumerate(content, 1):
                    if line.strip():
                        entry = self.parsed(line, number)
                        form = form or self._form(entry, number, reading)
                        label = self._label(entry, form, number)
                        whole = whole and not isinstance(label, float)
                        self._keep(label, form)
                        self.starts.append(start)
                        self.numbers.append(number)
                        texts = [entry.get(key) for key in (_TEXT, _PAIR, _WORDS)]
                        self.digests.append(hashlib.sha256(json.dumps(texts).encode()).digest())
                    start += len(line)
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}.", "Check its rights.") from error
        if form is None:
            raise DataError(f"{file} is empty.", 'Give one {"text": ..., "label": ...} per line.')
        if form.kind in ("number", "value"):
            # Numbers are classes where all are whole and counted from 0, unless the task wants values.
            counted = whole and min(self.labels) >= 0 and len(self.labels) <= max(2, len(self.starts) // 2)
            values = reading.targets == "values" or not (counted or reading.targets == "classes")
            form = replace(form, kind="value" if values else "number")
            if reading.targets == "classes" and not (whole and min(self.labels) >= 0):
                odd = next(one for one in self.labels if isinstance(one, float) or one < 0)
                raise DataError(f"{file} has the label {odd}, no class number.", "Give texts, or whole numbers from 0.")
        self.form = form

    def place(self, index: int) -> str:
        """The line."""
        return f"line {self.numbers[index]}"

    def parsed(self, line: bytes, number: int) -> dict[str, Any]:
        """The object in a line. Raises DataError."""
        where = f"{self.file}, line {number}"
        try:
            found = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is no JSON: {first_line(error)}.", "Give one JSON object per line.") from error
        if not isinstance(found, dict):
            raise DataError(f"{where} is {brief(found)}, no JSON object.", 'Give {"text": ..., "label": ...}.')
        return found

    def _form(self, entry: dict[str, Any], number: int, reading: Reading) -> _Form:
        where = f"{self.file}, line {number}"
        if (_TEXT in entry) == (_WORDS in entry):
            raise DataError(
                f"{where} has the keys {', '.join(entry) or 'none'}, not text or tokens.",
                next((hint for one in entry if (hint := nearest(one, (_TEXT, _WORDS)))), "")
                or 'Give {"text": ..., "label": ...} or {"tokens": [...], "labels": [...]}.',
            )
        if reading.target is not None and reading.target not in entry:
            raise DataError(
                f"{where} has no key {reading.target!r}, which data.target names; it has {', '.join(entry)}.",
                nearest(reading.target, entry) or "Name one of them.",
            )
        key = reading.target or next((one for one in _LABELS if one in entry and entry[one] is not None), None)
        label = entry.get(key) if key is not None else None
        words = _WORDS in entry
        if label is None:
            return _Form(words, _PAIR in entry, None, "none")
        if words:
            texts = isinstance(label, list) and any(isinstance(one, str) for one in label)
            return _Form(True, False, key, "texts" if texts else "numbers")
        return _Form(False, _PAIR in entry, key, "text" if isinstance(label, str) else "number")

    def _label(self, entry: dict[str, Any], form: _Form, number: int) -> Label:
        """The label of a line, which is as those before it. Raises DataError."""
        where = f"{self.file}, line {number}"
        self._check_texts(entry, form, where)
        label = entry.get(form.label) if form.label is not None else None
        if form.kind == "none":
            odd = next((one for one in _LABELS if entry.get(one) is not None), None)
            if odd is not None:
                raise DataError(
                    f"{where} has a {odd}, lines before it have none.", "Give labels for all lines or none."
                )
            return None
        if label is None:
            raise DataError(
                f"{where} has no {form.label}, lines before it have one.", "Give labels for all lines or none."
            )
        if form.words:
            kind = str if form.kind == "texts" else int
            good = isinstance(label, list) and all(isinstance(one, kind) and not isinstance(one, bool) for one in label)
            if not good:
                raise DataError(f"{where}: {form.label} is {brief(label)}.", "Give one name or one number per token.")
            if len(label) != len(entry[_WORDS]):
                raise DataError(
                    f"{where} has {len(entry[_WORDS])} tokens and {len(label)} labels.", "Give one label per token."
                )
            if form.kind == "numbers" and any(one < 0 and one != IGNORED for one in label):
                raise DataError(
                    f"{where} has the label {min(label)}.",
                    f"Number the classes from 0; {IGNORED} is a token without one.",
                )
            return list(label)
        if form.kind == "text" and isinstance(label, str):
            return label
        plain = isinstance(label, int | float) and not isinstance(label, bool) and abs(label) <= LARGEST
        if form.kind == "text" or not plain:
            wanted = "text" if form.kind == "text" else "finite number"
            raise DataError(
                f"{where}: {form.label} is {brief(label)}, no {wanted} as in the lines before it.",
                "Give a text for each line, or a number for each.",
            )
        return label if isinstance(label, int) else float(label)

    def _check_texts(self, entry: dict[str, Any], form: _Form, where: str) -> None:
        wanted = (_WORDS,) if form.words else (_TEXT, _PAIR) if form.pair else (_TEXT,)
        for key in wanted:
            value = entry.get(key)
            if form.words:
                good = isinstance(value, list) and value and all(isinstance(one, str) for one in value)
            else:
                good = isinstance(value, str) and (key == _PAIR or bool(value.strip()))
            if not good:
                what = "is missing" if key not in entry else f"is {brief(value)}"
                raise DataError(
                    f"{where}: {key} {what}.",
                    "Give words, one at least." if form.words else "Give a text with something in it.",
                )

    def _keep(self, label: Label, form: _Form) -> None:
        if not form.words:
            self.given.append(label)
        for one in label if isinstance(label, list) else [label]:
            if one is not None and one != IGNORED:
                self.labels[one] = self.labels.get(one, 0) + 1


class _Texts(Prepared):
    """Lines of a file as ids, the tokenizer asked when a line is read."""

    scanned = 5_000

    def __init__(
        self, lines: _Lines, tokenizer: Tokenizer, classes: Sequence[str], values: bool, reading: Reading
    ) -> None:
        self.lines, self.tokenizer, self.digests, self.values = lines, tokenizer, lines.digests, values
        form = lines.form
        self.codes = {name: code for code, name in enumerate(classes)} if form.kind.startswith("text") else None
        if form.kind == "none":
            self.targets = torch.full((len(lines.digests),), UNKNOWN)
        elif not form.words and not values:
            self.classes = tuple(classes)
            self.targets = torch.tensor([self._code(one, index) for index, one in enumerate(lines.given)])
        elif form.words:
            for one in lines.labels:
                self._code(one, None)
        self.inputs: tuple[str, ...] = ("input_ids", "attention_mask")
        if form.pair and tokenizer.segments() is not False and (tokenizer.segments() or self._second_segment()):
            self.inputs = (*self.inputs, "token_type_ids")
        self.fed = tuple(one for one in self.inputs if reading.inputs is None or one in reading.inputs)
        """The inputs that are taken of a sample, in order."""

    def _second_segment(self) -> bool:
        """Whether the tokenizer tells one text from the other."""
        return any(self.tokenizer("a", "b").segments)

    def _code(self, label: Any, index: int | None) -> int:
        """Number of a class. Raises DataError for one that the training part has not."""
        code = self.codes.get(label) if self.codes is not None else int(label)
        if code is None:
            where = f"{self.lines.file}, {self.place(index)}" if index is not None else str(self.lines.file)
            raise DataError(
                f"{where}: the label {brief(label)} is a class that the training part has not.",
                nearest(str(label), self.codes or ()) or "Give every class training samples.",
            )
        return code

    def place(self, index: int) -> str:
        """The line."""
        return self.lines.place(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with self.lines.file.open("rb") as content:
            content.seek(self.lines.starts[index])
            entry = self.lines.parsed(content.readline(), self.lines.numbers[index])
        form = self.lines.form
        try:
            made = self.tokenizer(
                entry[_WORDS] if form.words else entry[_TEXT], entry.get(_PAIR) if form.pair else None
            )
        except (ValueError, KeyError) as error:
            where = f"{self.lines.file}, {self.place(index)}"
            raise DataError(f"{where}: {first_line(error)}.", "Correct the line.") from error
        columns = {"input_ids": made.ids, "attention_mask": made.mask, "token_type_ids": made.segments}
        sample: dict[str, Any] = {name: torch.tensor(columns[name]) for name in self.inputs}
        if form.words and form.label is not None:
            sample["labels"] = self._word_labels(entry[form.label], made.words)
        elif self.values:
            sample["labels"] = torch.tensor(float(entry[form.label or ""]))
        elif self.targets is not None and form.kind != "none":
            sample["labels"] = self.targets[index]
        return sample

    def _word_labels(self, labels: Sequence[Any], words: Sequence[int | None]) -> Tensor:
        """The label of each word at its first token; `IGNORED` at its later ones, and at marks of beginning and end."""
        found, before = [], None
        for word in words:
            first = word is not None and word != before
            label = labels[word] if first and word is not None else IGNORED
            found.append(IGNORED if label == IGNORED else self._code(label, None))
            before = word
        return torch.tensor(found)

    def batch(self, samples: Sequence[Sample]) -> Batch:
        """Texts filled up to the longest: ids with the padding id, mask with 0, labels of tokens with `IGNORED`."""
        inputs = tuple(
            pad_sequence([one[place] for one, _ in samples], True, self.tokenizer.padding if name == "input_ids" else 0)
            for place, name in enumerate(self.fed)
        )
        target = batched(samples)[1] if not self.lines.form.words else None
        if self.lines.form.words and samples[0][1] is not None:
            target = pad_sequence([goal for _, goal in samples], True, IGNORED)
        return inputs, target
