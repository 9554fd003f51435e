"""Tables: typed columns, missing cells, classes and values; and rows as nobody should write them."""

import json

import numpy as np
import pytest
import torch

from foundation.errors import DataError
from pipeline import data
from pipeline.data.samples import Reading

COLOURS = ("red", "green", "blue")


def lines(count=60, start=0):
    return [f"{start + n},{COLOURS[n % 3]},{7},{n / 10}" for n in range(count)]


HEADER = "size,colour,always,price"


def written(tmp_path, rows=None, header=HEADER, name="d.csv") -> str:
    (tmp_path / name).write_text("\n".join([header, *(lines() if rows is None else rows)]) + "\n")
    return f"csv:{tmp_path / name}"


def rows_of(found, part):
    (features,), target = next(found.batches(part, 1000))
    return features, target


def test_numbers_are_standardised_texts_one_hot_and_the_last_column_is_the_target(tmp_path):
    found = data.load(written(tmp_path))
    assert [(one.name, one.shape) for one in found.inputs] == [("features", (5,))]
    assert found.classes is None
    features, price = rows_of(found, "train")
    assert features.dtype == price.dtype == torch.float32
    assert float(features[:, 0].mean()) == pytest.approx(0, abs=1e-5)
    assert float(features[:, 0].std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert torch.equal(features[:, 4], torch.zeros(len(features)))  # always 7
    assert torch.equal(features[:, 1:4].sum(1), torch.ones(len(features)))
    columns = json.loads(found.files["columns.json"])
    size, colour, always = columns["inputs"]
    assert colour == {"name": "colour", "kind": "category", "values": ["blue", "green", "red"]}
    assert (always["mean"], always["deviation"]) == (7, 1)
    assert columns["target"] == {"name": "price", "kind": "values"}
    back = features[:, 0].double() * size["deviation"] + size["mean"]
    np.testing.assert_allclose(back / 10, price, atol=1e-4)
    assert all(columns["inputs"][1]["values"][code] == COLOURS[round(float(value)) % 3]
               for code, value in zip(features[:, 1:4].argmax(1).tolist(), back, strict=True))  # fmt: skip


def test_the_same_numbers_standardise_the_other_parts(tmp_path):
    written(tmp_path, lines(40), name="train.csv")
    written(tmp_path, lines(10, 100), name="test.csv")
    found = data.load(f"csv:{tmp_path}")
    size = json.loads(found.files["columns.json"])["inputs"][0]
    features, _ = rows_of(found, "test")
    np.testing.assert_allclose(features[:, 0], (np.arange(100, 110) - size["mean"]) / size["deviation"], rtol=1e-5)
    assert len(found.test) == 10


@pytest.mark.parametrize("delimiter", ";\t|")
def test_other_delimiters_quotes_and_a_byte_order_mark(tmp_path, delimiter):
    text = "\n".join([HEADER, *lines()]).replace(",", delimiter).replace("red", f'"r{delimiter} ""d"""')
    (tmp_path / "d.csv").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n\r\n")
    found = data.load(f"csv:{tmp_path / 'd.csv'}")
    assert f'r{delimiter} "d"' in json.loads(found.files["columns.json"])["inputs"][1]["values"]


@pytest.mark.parametrize(
    ("cells", "names"),
    [(["no", "yes"], ("no", "yes")), (["3", "10", "5"], ("3", "5", "10")), (["-1", "1"], ("-1", "1"))],
)
def test_texts_and_few_whole_numbers_are_classes_by_name(tmp_path, cells, names):
    found = data.load(written(tmp_path, [f"{n},{cells[n % len(cells)]}" for n in range(60)], "size,kind"))
    assert found.labels == names
    features, labels = rows_of(found, "test")
    assert labels.dtype == torch.int64
    assert len(features) == len(labels)


def test_the_task_decides_where_whole_numbers_could_be_both(tmp_path):
    spec = written(tmp_path, [f"{n},{n % 3}" for n in range(60)], "size,kind")
    assert data.load(spec).classes == 3
    found = data.load(spec, reading=Reading(targets="values"))
    assert found.classes is None
    assert set(rows_of(found, "test")[1].tolist()) <= {0.0, 1.0, 2.0}
    many = written(tmp_path, [f"{n},{n // 2}" for n in range(60)], "size,kind")
    assert data.load(many).classes is None


def test_the_recipe_names_target_and_columns(tmp_path):
    found = data.load(written(tmp_path), reading=Reading(inputs=("size", "price"), target="colour"))
    assert found.labels == ("blue", "green", "red")
    assert found.inputs[0].shape == (2,)
    with pytest.raises(DataError, match=r"no column 'pirce'.*Did you mean price"):
        data.load(written(tmp_path), reading=Reading(target="pirce"))


@pytest.mark.parametrize("cell", ["", "NaN", "n/a", "?", "NULL"])
def test_missing_cells_are_the_mean_or_no_text_and_that_is_said(tmp_path, cell):
    rows = lines()
    rows[7] = f"{cell},red,7,0.7"
    rows[8] = f"8,{cell},7,0.8"
    for seed in range(20):  # until both are in the training part
        found = data.load(written(tmp_path, rows), seed=seed)
        features, price = rows_of(found, "train")
        prices = [round(one, 1) for one in price.tolist()]
        if 0.7 in prices and 0.8 in prices:
            break
    assert float(features[prices.index(0.7), 0]) == 0
    assert float(features[prices.index(0.8), 1:4].sum()) == 0
    assert "numbers of the training part become their column's mean: size (1)." in found.notes[0]
    assert "texts of the training part become none of the others: colour (1)." in found.notes[1]
    assert features.isfinite().all()


def test_a_text_that_training_does_not_have_is_none_and_that_is_said(tmp_path):
    written(tmp_path, lines(40), name="train.csv")
    written(tmp_path, ["3,violet,7,0.5", *lines(5, 100)], name="test.csv")
    found = data.load(f"csv:{tmp_path}")
    assert "colour (1)" in found.notes[0]
    assert float(rows_of(found, "test")[0][0, 1:4].sum()) == 0


def test_the_fingerprint_follows_the_content_and_the_cut_the_seed(tmp_path):
    spec = written(tmp_path)
    first = data.load(spec).fingerprint
    assert data.load(spec).fingerprint == first
    assert data.load(spec, seed=1).fingerprint != first
    written(tmp_path, [*lines(59), "59,red,7,5.8"])
    assert data.load(spec).fingerprint != first


def changed(place, line):
    rows = lines()
    rows[place] = line
    return rows


BAD = {
    "ragged": (changed(30, "1,red,7"), HEADER, "line 32: 3 cells, and the first line names 4 columns"),
    "too long": (changed(30, "1,red,7,8,9"), HEADER, "line 32: 5 cells"),
    "no header": (["1,2,3", "4,5,6"], "7,8,9", "the first line holds numbers, not names"),
    "a name twice": (None, "size,size,always,price", "column 2 has the name size again"),
    "no name": (None, "size,,always,price", "column 2 has no name"),
    "one column": (["1", "2"], "price", "single column"),
    "no rows": ([], HEADER, "no row below the names"),
    "target missing": (changed(30, "1,red,7,"), HEADER, "line 32: the target price is missing"),
    "target not a number": (changed(30, "1,red,7,nan"), HEADER, "line 32: the target price is missing"),
    "dates": (
        [f"2024-01-{n + 1:02},{n}" for n in range(28)],
        "day,price",
        "dates or times, such as '2024-01-01'",
    ),
    "days": ([f"{n + 1}.3.2024,{n}" for n in range(28)], "day,price", "holds dates"),
    "names": ([f"name{n},{n}" for n in range(80)], "who,price", "more than 64 texts"),
    "a typing error": ([*(f"{n},{n}" for n in range(80)), "8O,3"], "size,price", "holds numbers, but '8O' in line 82"),
    "one among few numbers": ([*(f"{n % 9},{n}" for n in range(80)), "8O,3"], "size,price", "but '8O' in line 82"),
    "infinite": ([*(f"{n},{n}" for n in range(80)), "inf,3"], "size,price", "'inf' in line 82"),
    "beyond float32": (changed(30, "1e60,red,7,1"), HEADER, "line 32: size is '1e60'"),
    "an empty column": ([f"{n},,{n}" for n in range(30)], "a,b,c", "the column b is empty"),
    "an open quote": (changed(30, '1,"red,7,1'), HEADER, "line"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_tables_are_one_line_with_what_to_do(tmp_path, case):
    rows, header, says = case
    with pytest.raises(DataError) as caught:
        data.load(written(tmp_path, rows, header))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_parts_with_other_columns_and_other_classes_are_named(tmp_path):
    written(tmp_path, lines(40), name="train.csv")
    written(tmp_path, lines(10), "size,color,always,price", name="test.csv")
    with pytest.raises(DataError, match=r"other columns .* color"):
        data.load(f"csv:{tmp_path}")
    written(tmp_path, [f"{n},{'ab'[n % 2]}" for n in range(40)], "size,kind", name="train.csv")
    written(tmp_path, ["3,c"], "size,kind", name="test.csv")
    with pytest.raises(DataError, match="line 2: the target kind is 'c', a class that the training part has not"):
        data.load(f"csv:{tmp_path}")


def test_texts_where_values_are_wanted_and_files_that_are_none(tmp_path):
    with pytest.raises(DataError, match="line 2: the target kind is 'a', no number"):
        data.load(written(tmp_path, ["1,a", "2,b"], "size,kind"), reading=Reading(targets="values"))
    with pytest.raises(DataError, match="no such file"):
        data.load(f"csv:{tmp_path / 'nowhere.csv'}")
    (tmp_path / "d.csv").write_bytes(b"a,b\n\xff\xfe,1\n")
    with pytest.raises(DataError, match="no UTF-8 text"):
        data.load(f"csv:{tmp_path / 'd.csv'}")
    (tmp_path / "d.csv").write_bytes(b"")
    with pytest.raises(DataError, match="is empty"):
        data.load(f"csv:{tmp_path / 'd.csv'}")


def test_numbers_with_a_comma_are_no_categories(tmp_path):
    rows = [f"{n},5;{n % 2}" for n in range(40)]
    with pytest.raises(DataError, match="the column a holds numbers with a comma, such as '0,5' in line 2") as caught:
        data.load(written(tmp_path, rows, header="a;y"))
    assert "with a point" in caught.value.hint


def test_a_target_that_counts_as_missing_is_told_by_its_word(tmp_path):
    rows = [f"{n},{('none', 'some')[n % 2]}" for n in range(40)]
    with pytest.raises(DataError, match="the target y is missing \\('none' counts as that\\)"):
        data.load(written(tmp_path, rows, header="a,y"))
