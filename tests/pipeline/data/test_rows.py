"""Data sets of rows, as the datasets library has them: mappings of lists, by position or one after the other."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from foundation.errors import DataError
from pipeline import Config, models
from pipeline.data import find
from pipeline.data.samples import Reading
from pipeline.tasks.entry import meet

DRAWN = np.random.default_rng(0).standard_normal((80, 6)).astype(np.float32)
LABELS = DRAWN[:, :3].argmax(1)
ROWS = [{"input": x.tolist(), "label": int(y)} for x, y in zip(DRAWN, LABELS, strict=True)]


NAMES = ("low", "middle", "high")


class Named:
    """What a column of classes says of itself."""

    names = NAMES


FEATURES = {"input": object(), "label": Named()}
OTHERS = {"label": object(), "kind": Named()}


class Rows:
    """The protocol of `datasets.Dataset`: a length, rows as mappings of lists, and what the columns hold."""

    features = FEATURES

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, at):
        return dict(ROWS[at])


class Streamed:
    """The protocol of `datasets.IterableDataset`: rows one after the other, no length."""

    features = FEATURES

    def __iter__(self):
        yield from ROWS


def check(data, names=NAMES):
    assert [(one.name, one.shape, one.kind) for one in data.inputs] == [("input", (6,), "float")]
    assert data.labels == names
    (inputs,), target = next(data.batches("train", 400))
    known = {tuple(row["input"]): row["label"] for row in ROWS}
    found = {tuple(round(float(v), 5) for v in row): int(label) for row, label in zip(inputs, target, strict=True)}
    assert len(found) > 50
    wanted = {tuple(round(v, 5) for v in row): label for row, label in known.items()}
    assert found.items() <= wanted.items()


@pytest.mark.parametrize("made", [Rows, Streamed])
def test_lists_of_numbers_are_one_input_each(made):
    check(find.load(made()))


def test_classes_have_the_names_of_the_column_that_is_the_target():
    class Two(Rows):
        features = OTHERS

        def __getitem__(self, at):
            return {"input": ROWS[at]["input"], "kind": ROWS[at]["label"]}

    assert find.load(Two(), reading=Reading(target="kind")).labels == NAMES


def test_an_only_input_goes_to_the_only_argument_whatever_they_are_called():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x, scale=1.0):
            return self.layer(x) * scale

    source = models.load(Net(), num_classes=3, input_size=(6,))
    source, data, _ = meet(source, find.load(Rows()), Config().data, Config().task)
    assert [one.name for one in source.inputs] == ["input"]
    (inputs,), _ = next(data.batches("test", 4))
    net = source.build()
    assert torch.equal(net(inputs), net.layer(inputs))


def test_two_inputs_are_still_asked_for_by_name():
    class Net(nn.Module):
        def forward(self, x, y):
            return x + y

    rows = [{"left": [1.0, n], "right": [2.0, n]} for n in range(40)]
    with pytest.raises(Exception, match="'left', which the forward of"):
        meet(models.load(Net(), input_size=(2,)), find.load(rows), Config().data, Config().task)


FORMATS = (None, "numpy", "torch")


@pytest.mark.parametrize("form", FORMATS)
def test_the_library_s_own_data_sets(form):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"input": datasets.Sequence(datasets.Value("float32")), "label": datasets.ClassLabel(names=list(NAMES))}
    )
    made = datasets.Dataset.from_list(ROWS, features=features).with_format(form)
    check(find.load(made))
    parts = find.load(made.train_test_split(0.25, seed=0))
    assert (len(parts.test), parts.labels) == (20, NAMES)


@pytest.mark.parametrize("form", FORMATS)
def test_the_library_s_own_streams(form, tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    made = datasets.load_dataset(
        "json", data_files=str(tmp_path / "rows.jsonl"), split="train", streaming=True, cache_dir=str(tmp_path)
    )
    check(find.load(made.with_format(form) if form else made), ("0", "1", "2"))


def test_rows_that_are_no_numbers_are_one_line():
    datasets = pytest.importorskip("datasets")
    for made in (datasets.Dataset.from_list([{"text": "a b", "label": 0}] * 40),
                 datasets.Dataset.from_list(ROWS).with_format("pandas")):  # fmt: skip
        with pytest.raises(DataError, match="no numbers"):
            find.load(made)
