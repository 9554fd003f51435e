"""Named arrays in an .npz file: inputs by name, ids that stay whole numbers, files that are not read whole."""

import numpy as np
import pytest
import torch

from foundation.errors import DataError
from pipeline import data
from pipeline.data import arrays
from pipeline.data.npz import _Members
from pipeline.data.samples import Reading

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 900, (50, 12))
MASK = np.ones((50, 12), np.int64)
Y = np.arange(50) % 3


def saved(tmp_path, save=np.savez, **given) -> str:
    save(tmp_path / "d.npz", **given)
    return f"npz:{tmp_path / 'd.npz'}"


def test_arrays_are_inputs_by_their_names_and_ids_stay_whole_numbers(tmp_path):
    found = data.load(saved(tmp_path, input_ids=IDS.astype(np.int32), attention_mask=MASK, y=Y))
    ids, mask = found.inputs
    assert (ids.name, ids.shape, ids.kind, ids.high) == ("input_ids", (12,), "tokens", IDS.max() + 1)
    assert (mask.name, mask.kind) == ("attention_mask", "mask")
    assert found.fed.kwargs == ("input_ids", "attention_mask")
    assert found.labels == ("0", "1", "2")
    assert found.input_size is None
    (given, _), labels = next(found.batches("test", 10))
    assert given.dtype == torch.int64
    rows = {tuple(row): label for row, label in zip(IDS.tolist(), Y.tolist(), strict=True)}
    assert [rows[tuple(row)] for row in given.tolist()] == labels.tolist()


def test_parts_by_suffix_are_kept(tmp_path):
    cut = {"train": slice(0, 30), "validation": slice(30, 40), "test": slice(40, 50)}
    given = {f"{name}_{part}": array[at] for part, at in cut.items() for name, array in (("ids", IDS), ("target", Y))}
    found = data.load(saved(tmp_path, **given))
    assert (len(found.train), len(found.calibration), len(found.test)) == (30, 10, 10)
    assert torch.equal(next(found.batches("test"))[0][0], torch.from_numpy(IDS[40:]))


def test_a_validation_part_judges_where_there_is_no_test_part(tmp_path):
    found = data.load(saved(tmp_path, a_train=IDS[:40], y_train=Y[:40], a_val=IDS[40:], y_val=Y[40:]))
    assert torch.equal(next(found.batches("test"))[0][0], torch.from_numpy(IDS[40:]))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_tables_and_series_of_floats_stay_as_they_are(tmp_path, save):
    x, y = RNG.random((60, 9)) * 100, RNG.random((60, 2))
    found = data.load(saved(tmp_path, save, x=x, y=y))
    assert (found.inputs[0].shape, found.mean, found.labels, found.fed.args) == ((9,), (), (), 1)
    (given,), target = next(found.batches("train"))
    assert given.dtype == target.dtype == torch.float32
    rows = {tuple(row): tuple(value) for row, value in zip(np.float32(x).tolist(), np.float32(y).tolist(), strict=True)}
    assert {tuple(row): tuple(value) for row, value in zip(given.tolist(), target.tolist(), strict=True)}.items() <= (
        rows.items()
    )
    series = data.load(saved(tmp_path, save, series=RNG.random((60, 20, 3)), y=y))
    assert (series.inputs[0].name, series.inputs[0].shape) == ("series", (20, 3))


def test_images_named_by_the_recipe_are_an_input_like_any_other(tmp_path):
    spec = saved(tmp_path, x=RNG.random((60, 6, 4)), y=np.arange(60) % 2)
    assert data.load(spec).input_size == (1, 6, 4)
    found = data.load(spec, reading=Reading(inputs=("x",)))
    assert (found.inputs[0].shape, found.mean) == ((6, 4), ())


def test_whole_numbers_are_values_where_the_task_says_so(tmp_path):
    spec = saved(tmp_path, a=IDS, y=Y)
    assert data.load(spec).classes == 3
    assert data.load(spec, reading=Reading(targets="values")).classes is None
    images = saved(tmp_path, x=RNG.random((60, 6, 6)), y=RNG.random(60))
    with pytest.raises(DataError, match="not class numbers"):
        data.load(images)
    assert next(data.load(images, reading=Reading(targets="values")).batches("test"))[1].dtype == torch.float32


def test_the_recipe_chooses_inputs_and_target(tmp_path):
    spec = saved(tmp_path, a=IDS, b=IDS[::-1].copy(), note=np.array(["x"] * 50), age=RNG.random(50))
    found = data.load(spec, reading=Reading(inputs=("b",), target="age"))
    assert [one.name for one in found.inputs] == ["b"]
    with pytest.raises(DataError, match=r"no array 'aeg', which data\.target names.*Did you mean age"):
        data.load(spec, reading=Reading(target="aeg"))


def test_without_a_target_the_data_is_unlabelled(tmp_path):
    found = data.load(saved(tmp_path, input_ids=IDS, attention_mask=MASK))
    assert not found.labelled
    assert not found.labels


def test_the_same_sample_in_two_parts_is_left_out_of_training(tmp_path):
    found = data.load(saved(tmp_path, a_train=IDS[:40], y_train=Y[:40], a_test=IDS[35:], y_test=Y[35:]))
    assert len(found.train) + len(found.calibration) == 35
    assert "also occur in test" in found.notes[0]


def test_stored_arrays_are_mapped_and_compressed_ones_read(tmp_path):
    path = tmp_path / "d.npz"
    images = RNG.integers(0, 255, (40, 8, 6, 3), dtype=np.uint8)
    for save, kind in ((np.savez, np.memmap), (np.savez_compressed, np.ndarray)):
        save(path, x=images, y=Y[:40], f=np.asfortranarray(IDS))
        with _Members(path) as members:
            read = {name: members.read(name) for name in "xyf"}
        assert {type(one) for one in read.values()} == {kind}
        np.testing.assert_array_equal(read["x"], images)
        np.testing.assert_array_equal(read["f"], IDS)
    np.savez(path, x=images, y=Y[:40])
    mapped = _mapped(path)
    tensor = arrays.arrays(mapped, None, "d")[0]
    assert np.shares_memory(tensor.numpy(), mapped)
    found = data.load(f"npz:{path}")
    assert found.input_size == (3, 8, 6)


def _mapped(path):
    with _Members(path) as members:
        return members.read("x")


def test_a_flipped_byte_in_a_stored_array_is_found(tmp_path):
    spec = saved(tmp_path, a=IDS, y=Y)
    path = tmp_path / "d.npz"
    content = bytearray(path.read_bytes())
    content[content.find(IDS.tobytes()) + 4001] ^= 4
    path.write_bytes(content)
    with pytest.raises(DataError, match="a cannot be read: Bad CRC"):
        data.load(spec)


def test_targets_of_many_numbers_are_read_with_their_samples(tmp_path):
    places = RNG.integers(0, 4, (50, 6, 5))
    found = data.load(saved(tmp_path, a=IDS, y=places))
    rows = {tuple(row): place for row, place in zip(IDS.tolist(), places, strict=True)}
    for part in data.PARTS:
        for (given, *_), target in found.batches(part, 7):
            assert target.dtype == torch.int64
            np.testing.assert_array_equal(target, [rows[tuple(row)] for row in given.tolist()])


BAD = {
    "a target of two types": (
        {"a_train": IDS, "y_train": Y, "a_test": IDS + 1, "y_test": Y / 2},
        "y is whole numbers in",
    ),
    "not a number": (
        {"a": np.where(np.arange(50)[:, None] == 31, np.nan, IDS)},
        "NaN or infinity in sample 31",
    ),
    "infinite in float32": ({"a": np.where(np.arange(50)[:, None] == 31, 1e300, IDS)}, "sample 31"),
    "negative ids": ({"a": np.where(np.arange(50)[:, None] == 31, -1, IDS), "y": Y}, "-1 in sample 31"),
    "unequal": ({"a": IDS, "b": IDS[:49], "y": Y}, "a has 50 samples, b has 49"),
    "target of another length": ({"a": IDS, "y": Y[:49]}, "y has 49"),
    "texts": ({"a": np.array(["x"] * 50), "y": Y}, "a holds <U1, not numbers"),
    "objects": ({"a": np.array([{}] * 50, dtype=object), "y": Y}, "Python objects"),
    "a number": ({"a": np.array(3), "y": Y}, "a is a single number"),
    "empty": ({"a": IDS[:0], "y": Y[:0]}, "is empty"),
    "no width": ({"a": IDS[:, :0], "y": Y}, "nothing in it"),
    "target alone": ({"y": Y}, "but not x"),
    "no training part": ({"a_test": IDS, "y_test": Y}, "no training part"),
    "missing in a part": ({"a_train": IDS, "b_train": IDS, "a_test": IDS}, "not b_test"),
    "twice": ({"a": IDS, "a_train": IDS, "y": Y}, "a and a_train for one part"),
    "parts of two widths": ({"a_train": RNG.random((9, 3)), "a_test": RNG.random((9, 4))}, "has the shape"),
    "classes of text": ({"a": IDS, "y": np.array(["u", "v"] * 25)}, "not class numbers"),
    "values not a number": ({"a": IDS, "y": np.where(Y == 1, np.nan, 0.5)}, "NaN or infinity in sample 1"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_arrays_are_one_line(tmp_path, case):
    given, says = case
    with pytest.raises(DataError) as caught:
        data.load(saved(tmp_path, **given))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.hint
