"""Data sets: parts that never overlap, the same batches by seed, and the errors a user can make."""

import hashlib
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

from foundation.errors import DataError
from pipeline import data
from pipeline.data.assemble import listed
from pipeline.data.folders import classed
from pipeline.data.imagefolder import ImageFiles
from tests import hostile_images


def hashes(found: data.Data, part: data.Part) -> set[bytes]:
    images = torch.cat([x for (x,), _ in found.batches(part)])
    return {hashlib.sha256(one.numpy().tobytes()).digest() for one in images}


def sizes(found: data.Data) -> tuple[int, int, int]:
    return len(found.train), len(found.calibration), len(found.test)


def arrays(count: int = 60, classes: int = 3, shape: tuple[int, ...] = (1, 6, 6), seed: int = 0):
    generator = np.random.default_rng(seed)
    return generator.random((count, *shape), dtype=np.float32), np.arange(count) % classes


def folder(path: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 12, seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    for name in classes:
        (path / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path / name / f"{i}.png")
    return path


class Own(Dataset):
    """Random transforms, as a training set has them."""

    classes = ("a", "b")

    def __init__(self, count: int = 40, start: int = 0) -> None:
        self.count, self.start = count, start

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        image = torch.full((3, 4, 4), float(index + self.start)) + torch.rand(1)
        return image, index % 2


# ── digits ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_digits_are_cut_once_and_for_all():
    found = data.load("digits")
    assert sizes(found) == (1293, 144, 360)
    assert (found.classes, found.input_size) == (10, (3, 32, 32))
    assert found.fingerprint == data.load("digits", seed=5).fingerprint
    every = [hashes(found, part) for part in data.PARTS]
    assert len(set.union(*every)) == sum(map(len, every)) == 1797
    assert torch.bincount(found.test.labels).min() >= 35


def test_batches_are_normalised_and_have_the_asked_for_size():
    found = data.load("digits", input_size=(1, 16, 20))
    batches = list(found.batches("train", 100))
    images = torch.cat([x for (x,), _ in batches])
    assert images.shape == (1293, 1, 16, 20)
    assert images.dtype == torch.float32
    assert abs(float(images.mean())) < 0.02
    assert abs(float(images.std()) - 1) < 0.2
    assert [len(y) for _, y in batches] == [100] * 12 + [93]
    assert data.load("digits", input_size=(1, 16, 20)).fingerprint != data.load("digits").fingerprint


def test_order_and_augmentation_follow_the_seed_and_leave_the_global_generator_alone():
    found = data.load("digits")
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)

    def first(seed: int, **options) -> torch.Tensor:
        return next(found.batches("train", 32, True, seed, **options))[0][0]

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
    assert torch.equal(first(1, augment=True), first(1, augment=True))
    assert not torch.equal(first(1, augment=True), first(1))
    assert torch.equal(torch.rand(1), expected)


def test_shuffling_pairs_each_image_with_its_own_label():
    found = data.load("digits")
    plain = {
        bytes(x.numpy().tobytes()): int(y) for (xs,), ys in found.batches("train") for x, y in zip(xs, ys, strict=True)
    }
    shuffled = [
        (bytes(x.numpy().tobytes()), int(y))
        for (xs,), ys in found.batches("train", 64, True, 3)
        for x, y in zip(xs, ys, strict=True)
    ]
    assert len(shuffled) == 1293
    assert all(plain[x] == y for x, y in shuffled)
    assert [y for _, y in shuffled] != list(plain.values())


def test_drop_last_leaves_out_the_short_batch_only():
    found = data.load("digits")
    assert [len(y) for _, y in found.batches("test", 100, drop_last=True)] == [100, 100, 100]
    assert [len(y) for _, y in found.batches("test", 500, drop_last=True)] == [360]


def test_a_sample_is_spread_over_the_part():
    found = data.load("digits")
    assert found.sample("calibration", 8)[0].shape == (8, 3, 32, 32)
    assert torch.equal(found.sample("test", 2)[0][1], torch.cat([x for (x,), _ in found.batches("test")])[-1])
    assert len(found.sample("test", 10_000)[0]) == 360


def test_augmentation_of_nothing_changes_nothing_and_a_shift_shifts():
    images = torch.rand(2, 1, 8, 8)
    generator = torch.Generator().manual_seed(0)
    still = data.Augmentation(degrees=0, shift=0, scale=0)(images, generator)
    assert torch.allclose(still, images, atol=1e-5)
    moved = data.Augmentation(degrees=0, shift=0.5, scale=0, padding="zeros")(torch.ones(64, 1, 8, 8), generator)
    share = moved.mean((1, 2, 3))
    assert 0.25 <= float(share.min()) < 0.6
    assert float(share.max()) > 0.8


# ── npz ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("shape", "size"), [((6, 6), (1, 6, 6)), ((1, 6, 6), (1, 6, 6)), ((3, 6, 8), (3, 6, 8)), ((6, 8, 3), (3, 6, 8))]
)
def test_arrays_in_one_piece_are_cut_in_three(tmp_path, shape, size):
    x, y = arrays(60, 3, shape)
    np.savez(tmp_path / "a.npz", x=x, y=y)
    found = data.load(f"npz:{tmp_path / 'a.npz'}")
    assert sizes(found) == (43, 5, 12)
    assert found.input_size == size
    assert torch.bincount(found.test.labels).tolist() == [4, 4, 4]
    every = [hashes(found, part) for part in data.PARTS]
    assert len(set.union(*every)) == 60
    images = torch.cat([one for (one,), _ in found.batches("train")])
    assert images.mean((0, 2, 3)).abs().max() < 1e-5
    assert (images.std((0, 2, 3)) - 1).abs().max() < 1e-5


def test_the_cut_follows_the_seed(tmp_path):
    x, y = arrays()
    np.savez(tmp_path / "a.npz", x=x, y=y)
    spec = f"npz:{tmp_path / 'a.npz'}"
    assert data.load(spec).fingerprint == data.load(spec).fingerprint
    assert hashes(data.load(spec), "test") != hashes(data.load(spec, seed=1), "test")


def test_parts_given_in_the_file_are_kept(tmp_path):
    (x, y), (tx, ty) = arrays(40, 2, seed=1), arrays(10, 2, seed=2)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=tx, y_test=ty)
    found = data.load(f"npz:{tmp_path / 'a.npz'}")
    assert sizes(found) == (36, 4, 10)
    assert found.test.labels.tolist() == ty.tolist()


def test_bytes_are_scaled_and_one_channel_is_repeated(tmp_path):
    x, y = arrays()
    np.savez(tmp_path / "a.npz", x=(x * 255).astype(np.uint8), y=y, labels=np.array(["ant", "bee", "cow"]))
    found = data.load(f"npz:{tmp_path / 'a.npz'}", input_size=(3, 12, 12))
    (images,), _ = next(found.batches("train"))
    assert images.shape[1:] == (3, 12, 12)
    assert torch.equal(images[:, 0], images[:, 2])
    assert 0 < found.mean[0] < 1
    assert found.labels == ("ant", "bee", "cow")


def test_the_fingerprint_follows_the_content(tmp_path):
    x, y = arrays()
    np.savez(tmp_path / "a.npz", x=x, y=y)
    first = data.load(f"npz:{tmp_path / 'a.npz'}").fingerprint
    (tmp_path / "moved").mkdir()
    np.savez(tmp_path / "moved" / "b.npz", x=x, y=y)
    assert data.load(f"npz:{tmp_path / 'moved' / 'b.npz'}").fingerprint == first
    x[7, 0, 0, 0] += 1
    np.savez(tmp_path / "a.npz", x=x, y=y)
    assert data.load(f"npz:{tmp_path / 'a.npz'}").fingerprint != first
    x[7, 0, 0, 0] -= 1
    y[7] = (y[7] + 1) % 3
    np.savez(tmp_path / "a.npz", x=x, y=y)
    assert data.load(f"npz:{tmp_path / 'a.npz'}").fingerprint != first


def bad(x=None, y=None):
    good_x, good_y = arrays()
    return {"x": good_x if x is None else x, "y": good_y if y is None else y}


def with_nan() -> np.ndarray:
    x, _ = arrays()
    x[3, 0, 1, 1] = np.nan
    return x


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (bad(x=with_nan()), "NaN or infinity in 1 samples"),
        (bad(y=np.zeros(60, dtype=int)), "single class"),
        (bad(y=np.arange(60) % 3 - 1), "label -1, outside"),
        (bad(y=np.where(np.arange(60) % 2, 0, 40)), "nothing to train on for 39 of 41 classes"),
        (bad(y=np.linspace(0, 2, 60)), "not class numbers"),
        (bad(y=np.full(60, np.nan)), "not class numbers"),
        (bad(y=np.array(["a"] * 60)), "not class numbers"),
        (bad(y=np.arange(59) % 3), "60 images, but y has the shape"),
        (bad(x=np.array(["a"] * 60)), "not numbers"),
        (bad(x=np.zeros((0, 1, 6, 6), dtype=np.float32), y=np.zeros(0, dtype=int)), "is empty"),
        ({"y": arrays()[1]}, "holds y, but not x and y"),
        ({"x": np.array([object()] * 3), "y": np.arange(3)}, "cannot be read"),
        ({**bad(), "labels": np.array(["a", "b"])}, r"label 2, outside 0\.\.1"),
    ],
)
def test_bad_arrays_are_one_line_with_what_to_do(tmp_path, content, says):
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(DataError, match=says) as caught:
        data.load(f"npz:{tmp_path / 'a.npz'}")
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_missing_and_damaged_files_say_so(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        data.load(f"npz:{tmp_path / 'a.npz'}")
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(DataError, match="cannot be read"):
        data.load(f"npz:{tmp_path / 'a.npz'}")
    (tmp_path / "b.npz").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read"):
        data.load(f"npz:{tmp_path / 'b.npz'}")


def test_three_channels_cannot_become_one(tmp_path):
    x, y = arrays(shape=(3, 6, 6))
    np.savez(tmp_path / "a.npz", x=x, y=y)
    with pytest.raises(DataError, match="3 channels, which cannot become 1"):
        data.load(f"npz:{tmp_path / 'a.npz'}", input_size=(1, 6, 6))


def test_a_sample_in_two_parts_stays_in_the_later_one_only(tmp_path):
    (x, y), (tx, ty) = arrays(40, 2, seed=1), arrays(10, 2, seed=2)
    x[:4] = tx[:4]
    found = data.load({"train": (x, y), "test": (tx, ty), "calibration": arrays(6, 2, seed=3)})
    assert sizes(found) == (36, 6, 10)
    assert found.notes == ("4 of the train samples also occur in test or calibration; left out of train.",)
    assert hashes(found, "train").isdisjoint(hashes(found, "test"))
    assert not torch.isin(
        torch.cat([one for (one,), _ in found.batches("train")]).sum((1, 2, 3)),
        torch.cat([one for (one,), _ in found.batches("test")]).sum((1, 2, 3)),
    ).any()


def test_the_same_data_for_training_and_test_is_refused():
    x, y = arrays()
    with pytest.raises(DataError, match="every train sample is also in"):
        data.load({"train": (x, y), "test": (x.copy(), y), "calibration": arrays(6, 3, seed=3)})
    same = TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    with pytest.raises(DataError, match="same data for training and test"):
        data.load((same, same))


# ── image folders ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_per_class_is_cut_in_three(tmp_path):
    found = data.load(f"imagefolder:{folder(tmp_path / 'pets')}", input_size=(3, 16, 16))
    assert found.labels == ("cat", "dog")
    assert sizes(found) == (17, 2, 5)
    every = [hashes(found, part) for part in data.PARTS]
    assert len(set.union(*every)) == 24
    (images,), labels = next(found.batches("train", 8, True, 1, augment=True))
    assert images.shape == (8, 3, 16, 16)
    assert labels.dtype == torch.int64


def test_images_are_covered_not_squeezed(tmp_path):
    for name, shade in (("dark", 0), ("light", 255)):
        (tmp_path / name).mkdir()
        for i in range(8):
            picture = Image.new("RGB", (90, 30), (shade, i, 0))
            picture.paste((0, 0, 255), (0, 0, 30, 30))
            picture.paste((0, 0, 255), (60, 0, 90, 30))
            picture.save(tmp_path / name / f"{i}.png")
    found = data.load(f"imagefolder:{tmp_path}", input_size=(3, 30, 30))
    (images,), labels = next(found.batches("test"))
    blue = images[:, 2] * found.std[2] + found.mean[2]
    red = images[:, 0] * found.std[0] + found.mean[0]
    assert float(blue.max()) < 0.01  # the blue sides are cut away
    assert torch.allclose(red.mean((1, 2)), labels.float(), atol=1e-5)


def image_files(path):
    found = classed(path, (".png",), "images")
    return list(zip(found.files, found.labels, strict=True))


def test_train_and_test_folders_are_kept_and_workers_read_the_same(tmp_path):
    folder(tmp_path / "train")
    folder(tmp_path / "val", count=4, seed=1)
    found = data.load(f"imagefolder:{tmp_path}", input_size=(3, 16, 16))
    assert sizes(found) == (22, 2, 8)
    assert found.test.labels.tolist() == [0] * 4 + [1] * 4
    files = image_files(tmp_path / "val")
    split = listed(ImageFiles(files, (3, 16, 16)), found.test.labels, workers=1)
    by_worker = torch.cat([x for (x,), _ in split.stream([[0, 1, 2], [3, 4, 5], [6, 7]])])
    assert torch.equal(by_worker, torch.cat([x for (x,), _ in found.test.stream([list(range(8))])]))


def test_both_val_and_test_folders_give_calibration_and_test(tmp_path):
    for seed, (part, count) in enumerate({"train": 12, "val": 4, "test": 3}.items()):
        folder(tmp_path / part, count=count, seed=seed)
    assert sizes(data.load(f"imagefolder:{tmp_path}", input_size=(3, 16, 16))) == (24, 8, 6)


@pytest.mark.parametrize(("train", "test"), [("Training", "Testing"), ("Train", "Test"), ("TRAIN", "Valid")])
def test_parts_are_known_however_they_are_spelt(tmp_path, train, test):
    folder(tmp_path / train)
    folder(tmp_path / test, count=3, seed=1)
    found = data.load(f"imagefolder:{tmp_path}", input_size=(3, 16, 16))
    assert found.labels == ("cat", "dog")
    assert sizes(found)[2] == 6


def test_a_part_without_a_training_part_is_no_class(tmp_path):
    folder(tmp_path / "test")
    folder(tmp_path / "val", seed=1)
    with pytest.raises(DataError, match="holds test and val, and no training part"):
        data.load(f"imagefolder:{tmp_path}", input_size=(3, 16, 16))
    folder(tmp_path / "train")
    folder(tmp_path / "Train")
    with pytest.raises(DataError, match="holds both Train and train"):
        data.load(f"imagefolder:{tmp_path}", input_size=(3, 16, 16))


def test_the_same_image_in_two_folders_is_left_out_of_training(tmp_path):
    folder(tmp_path / "train")
    folder(tmp_path / "test", count=4, seed=1)
    (tmp_path / "test" / "cat" / "copy.png").write_bytes((tmp_path / "train" / "cat" / "3.png").read_bytes())
    found = data.load(f"imagefolder:{tmp_path}", input_size=(3, 16, 16))
    assert sum(sizes(found)) == 24 + 9 - 1
    assert hashes(found, "train").isdisjoint(hashes(found, "test"))


def test_a_new_picture_changes_the_fingerprint(tmp_path):
    spec = f"imagefolder:{folder(tmp_path)}"
    first = data.load(spec).fingerprint
    assert data.load(spec).fingerprint == first
    Image.new("RGB", (20, 20)).save(tmp_path / "cat" / "3.png")
    assert data.load(spec).fingerprint != first


def test_bad_folders_say_so(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        data.load(f"imagefolder:{tmp_path / 'nowhere'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="class folder"):
        data.load(f"imagefolder:{tmp_path / 'empty'}")
    with pytest.raises(DataError, match="single class"):
        data.load(f"imagefolder:{folder(tmp_path / 'one', ('cat',))}")
    (folder(tmp_path / "text") / "cat" / "2.png").write_text("no picture")
    with pytest.raises(DataError, match=r"2\.png is not a readable image"):
        data.load(f"imagefolder:{tmp_path / 'text'}")
    folder(tmp_path / "parts" / "train")
    folder(tmp_path / "parts" / "val", ("cat", "cow"), seed=1)
    with pytest.raises(DataError, match=r"has classes that .* has not: cow"):
        data.load(f"imagefolder:{tmp_path / 'parts'}")
    with pytest.raises(DataError, match="cannot be cut"):
        data.load(f"imagefolder:{folder(tmp_path / 'few', count=1)}")


def test_a_picture_that_breaks_later_is_named(tmp_path):
    found = data.load(f"imagefolder:{folder(tmp_path)}")
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(DataError, match=r"\.png is not a readable image"):
        list(found.batches("train"))


# ── objects ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_arrays_data_sets_and_loaders_are_the_same_data():
    (x, y), (tx, ty) = arrays(40, 2, seed=1), arrays(10, 2, seed=2)
    train, test = (TensorDataset(torch.from_numpy(a), torch.from_numpy(b)) for a, b in ((x, y), (tx, ty)))
    forms = [
        data.load({"train": train, "test": test}),
        data.load((train, test)),
        data.load({"train": DataLoader(train, 7, shuffle=True), "test": DataLoader(test, 3)}),
        data.load({"train": train, "test": (tx, ty)}),
    ]
    assert len({form.fingerprint for form in forms}) == 1
    assert all(sizes(form) == (36, 4, 10) for form in forms)
    assert all(form.mean == (0.0,) for form in forms)  # what own code returns is what the model gets
    (images,), labels = next(forms[2].batches("test"))
    assert torch.equal(images, torch.from_numpy(tx))
    assert labels.tolist() == ty.tolist()


def test_reading_samples_leaves_the_global_generator_alone():
    x, y = arrays(40, 2)
    found = data.load(TensorDataset(torch.from_numpy(x), torch.from_numpy(y)))
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(found.batches("train", 8, True, 1))
    assert torch.equal(torch.rand(1), expected)


def test_three_parts_and_a_single_one_are_taken():
    parts = tuple(Own(count, start) for count, start in ((20, 0), (10, 100), (6, 200)))
    found = data.load(parts)
    assert sizes(found) == (20, 6, 10)
    assert found.labels == ("a", "b")
    assert sizes(data.load(Own(50))) == (36, 4, 10)
    assert sizes(data.load({"train": Own(20), "val": Own(10, 100)})) == (18, 2, 10)


def test_random_transforms_do_not_change_the_fingerprint():
    assert data.load(Own()).fingerprint == data.load(Own()).fingerprint
    assert data.load(Own()).fingerprint != data.load(Own(start=1)).fingerprint


def test_samplers_that_cut_one_data_set_are_respected():
    whole = Own(40)
    loaders = [
        DataLoader(whole, 4, sampler=SubsetRandomSampler(range(start, stop))) for start, stop in ((0, 30), (30, 40))
    ]
    found = data.load(loaders)
    assert sizes(found) == (27, 3, 10)
    assert float(next(found.batches("test"))[0][0].min()) >= 30
    subsets = data.load((Subset(whole, range(30)), Subset(whole, range(30, 40))))
    assert sizes(subsets) == (27, 3, 10)


def test_a_loaded_data_set_passes_through():
    found = data.load("digits")
    assert data.load(found) is found


FILE = """
import torch
from torch.utils.data import TensorDataset

def make(input_size=None, seed=0):
    x = torch.rand(40, 3, 6, 6)
    return TensorDataset(x, torch.arange(40) % 4)

def broken():
    raise KeyError("gone")

def nothing():
    return None
"""


def test_a_callable_in_a_file_gives_data(tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    found = data.load(f"{tmp_path / 'mine.py'}:make")
    assert found.classes == 4
    assert found.fingerprint == data.load(f"{tmp_path / 'mine.py'}:make").fingerprint
    with pytest.raises(DataError, match=r"KeyError: 'gone' \(mine.py, line 10\)"):
        data.load(f"{tmp_path / 'mine.py'}:broken")
    with pytest.raises(DataError, match="a NoneType has neither positions"):
        data.load(f"{tmp_path / 'mine.py'}:nothing")
    with pytest.raises(DataError, match="Did you mean make"):
        data.load(f"{tmp_path / 'mine.py'}:mak")


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(1, 2, 2), 0


class Ragged(Own):
    def __getitem__(self, index: int):
        return torch.zeros(3, 4, 4 + index % 2), index % 2


class Broken(Own):
    def __getitem__(self, index: int):
        return torch.full((3, 4, 4), float("nan") if index == 9 else 0.5), index % 2


class Alone(Own):
    def __getitem__(self, index: int):
        return torch.full((3, 4, 4), index / self.count)


class Half(Own):
    def __getitem__(self, index: int):
        return torch.rand(3, 4, 4), None if index == 3 else 0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("digit", "Did you mean digits"),
        ("mnist", "Give digits, imagefolder:PATH"),
        ("imagefoldr:x", "Did you mean imagefolder"),
        ("nowhere:make", "no Python module named 'nowhere'"),
        (3, "a int has neither positions nor an order"),
        ([Own(), Stream()], r"sample 0 has the shape \(1, 2, 2\), others \(3, 4, 4\)"),
        ({"train": Own(), "tset": Own()}, "Did you mean test"),
        ({"test": Own()}, "no training part"),
        (Ragged(), r"sample 1 has the shape \(3, 4, 5\)"),
        (Broken(), "NaN or infinity"),
        (Half(), "sample 3 has no label, others have one"),
        ({"train": Own(), "test": Alone()}, r"\(test\), sample 0 has no label, others have one"),
        (Own(0), "is empty"),
        ((Own(), Own(0)), "is empty"),
        (
            {"train": Own(), "test": TensorDataset(torch.rand(4, 1, 4, 4), torch.zeros(4))},
            r"has the shape \(1, 4, 4\), others \(3, 4, 4\)",
        ),
        (
            {"train": Own(), "test": TensorDataset(torch.rand(4, 3, 4, 4), torch.full((4,), 7))},
            r"label 7, outside 0\.\.1",
        ),
    ],
)
def test_bad_objects_are_one_line_with_what_to_do(content, says):
    with pytest.raises(DataError, match=says) as caught:
        data.load(content)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_only_some_samples_of_a_very_large_set_are_read_first(monkeypatch):
    monkeypatch.setattr("pipeline.data.objects.SCANNED", 10)
    read = []

    class Large(Own):
        targets = tuple(i % 2 for i in range(40))

        def __getitem__(self, index: int):
            read.append(index)
            return super().__getitem__(index)

    found = data.load((Large(40), Own(10, 100)))
    assert len(read) <= 10
    assert sizes(found) == (36, 4, 10)
    assert torch.bincount(found.train.labels).tolist() == [18, 18]


# ── hostile files ────────────────────────────────────────────────────────────────────────────────────────────────────


def reads(path: Path, size: tuple[int, int, int]) -> None:
    """Everything that a run reads of a folder."""
    found = data.load(f"imagefolder:{path}", input_size=size)
    for part in data.PARTS:
        list(found.batches(part))


@pytest.mark.parametrize("name", hostile_images.refused())
def test_a_hostile_image_is_one_line_with_its_name(tmp_path, name, capfd):
    folder(tmp_path / "pets", count=4)
    bad = tmp_path / "pets" / "cat" / f"{name}.png"  # whatever it is, it is called an image
    bad.write_bytes(hostile_images.refused()[name])
    with pytest.raises(DataError, match="is not a readable image: ") as raised:
        reads(tmp_path / "pets", (3, 224, 224))
    assert str(bad) in raised.value.message
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500
    assert capfd.readouterr() == ("", "")


def test_damaged_images_of_every_format_are_read_or_named(tmp_path):
    for number, (name, content) in enumerate(hostile_images.damaged(4).items()):
        path = tmp_path / name
        path.write_bytes(content)
        try:
            ImageFiles([(str(path), number)], (3, 16, 16))[0]
        except DataError as error:
            assert name in error.message
            assert "\n" not in str(error)


def test_unusual_images_are_read(tmp_path):
    folder(tmp_path / "pets", count=4)
    for name, content in hostile_images.unusual().items():
        (tmp_path / "pets" / "cat" / f"{name}.png").write_bytes(content)
    reads(tmp_path / "pets", (3, 16, 16))
    for name in ("grey16.png", "grey16.tiff", "grey16.pgm"):
        image, _ = ImageFiles([(str(tmp_path / "pets" / "cat" / f"{name}.png"), 0)], (1, 16, 16))[0]
        assert set(image.flatten().tolist()) == {hostile_images.GREY16 >> 8}


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path):
    for number, put in enumerate((os.mkfifo, lambda path: path.symlink_to("nowhere"))):
        path = folder(tmp_path / str(number)) / "cat" / "x.png"
        put(path)
        with pytest.raises(DataError, match=r"x\.png is not a readable image: it is no file"):
            data.load(f"imagefolder:{tmp_path / str(number)}")


def test_an_image_that_a_worker_cannot_read_is_one_line(tmp_path):
    path = folder(tmp_path / "pets", count=4) / "cat" / "2.png"
    files = image_files(tmp_path / "pets")
    path.write_bytes(path.read_bytes()[:60])
    split = listed(ImageFiles(files, (3, 16, 16)), torch.zeros(8, dtype=torch.long), workers=1)
    with pytest.raises(DataError, match=r"2\.png is not a readable image") as raised:
        list(split.stream([[0, 1], [2, 3]]))
    assert "\n" not in str(raised.value)
    assert "Traceback" not in str(raised.value)


@pytest.mark.parametrize("label", [60, 10**6, 2**31, 2**40, 2**63 - 1])
@pytest.mark.parametrize("given", ["arrays", "npz", "objects"])
def test_a_large_label_is_refused_before_as_many_names_are_made(tmp_path, label, given):
    x, y = arrays()
    y[7:9] = label  # twice, so that the parts can be cut
    y[9:20] = label
    spec: object = (x, y)
    if given == "npz":
        np.savez(tmp_path / "d.npz", x=x, y=y)
        spec = f"npz:{tmp_path / 'd.npz'}"
    elif given == "objects":
        spec = [(torch.from_numpy(one), int(number)) for one, number in zip(x, y, strict=True)]
    tracemalloc.start()
    with pytest.raises(DataError, match=f"has the label {label}") as raised:
        data.load(spec)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    assert "too few for classes" in raised.value.message


@pytest.mark.parametrize("label", [2**63, 2**70, -(2**70), float("inf"), float("nan")])
def test_a_label_that_is_no_class_number_is_refused(label):
    samples = [(torch.full((1, 4, 4), float(i)), i % 2) for i in range(20)] + [(torch.zeros(1, 4, 4), label)]
    with pytest.raises(DataError, match="sample 20.*(no numbers|beyond 64 bits|NaN or infinity)"):
        data.load(samples)


# ── without labels ───────────────────────────────────────────────────────────────────────────────────────────────────


def loose(path: Path, count: int = 20) -> Path:
    """Images that lie in the folder itself; other counts give other images."""
    folder(path, ("all",), count, seed=count)
    for file in list((path / "all").iterdir()):
        file.rename(path / file.name)
    (path / "all").rmdir()
    return path


def unlabelled(kind: str, path: Path) -> object:
    x, _ = arrays(40)
    if kind == "npz":
        np.savez(path / "x.npz", x=x)
        return f"npz:{path / 'x.npz'}"
    if kind == "npz in parts":
        np.savez(path / "x.npz", x_train=x[:30], x_test=x[30:])
        return f"npz:{path / 'x.npz'}"
    if kind == "folder":
        return f"imagefolder:{loose(path / 'photos')}"
    if kind == "folder in parts":
        loose(path / "photos" / "train")
        loose(path / "photos" / "test", 6)
        return f"imagefolder:{path / 'photos'}"
    return {
        "array": x,
        "tensor": torch.from_numpy(x),
        "list": [torch.from_numpy(one) for one in x],
        "alone": Alone(),
        "no label": [(torch.from_numpy(one), None) for one in x],
        "one of a tuple": TensorDataset(torch.from_numpy(x)),
        "parts": {"train": x[:30], "test": x[30:]},
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["npz", "npz in parts", "folder", "folder in parts", "array", "tensor", "list", "alone", "no label",
     "one of a tuple", "parts"],
)  # fmt: skip
def test_data_without_labels_is_cut_into_parts_that_share_no_sample(kind, tmp_path):
    found = data.load(unlabelled(kind, tmp_path))
    assert not found.labelled
    assert found.classes is None
    assert all(sizes(found))
    assert {int(y) for part in ("train", "calibration", "test") for _, ys in found.batches(part) for y in ys} == {-1}
    parts = [hashes(found, part) for part in ("train", "calibration", "test")]
    assert not parts[0] & parts[1]
    assert not (parts[0] | parts[1]) & parts[2]


def test_answers_stand_in_the_place_of_labels(tmp_path):
    found = data.load(unlabelled("npz", tmp_path))
    answers = {part: torch.arange(len(found.split(part))) % 7 for part in ("train", "calibration", "test")}
    answered = found.answered(answers, 7)
    assert answered.classes == 7
    assert not answered.labelled
    assert torch.equal(torch.cat([y for _, y in answered.batches("train", 8)]), answers["train"])
    assert torch.equal(answered.sample("test", 3)[0], found.sample("test", 3)[0])


@pytest.mark.parametrize("missing", [("x_test",), ("y_test",), ("y_train",)])
def test_an_archive_with_labels_for_some_parts_alone_is_refused(tmp_path, missing):
    x, y = arrays(40)
    held = {"x_train": x[:30], "y_train": y[:30], "x_test": x[30:], "y_test": y[30:]}
    np.savez(tmp_path / "x.npz", **{name: value for name, value in held.items() if name not in missing})
    with pytest.raises(DataError, match="but not [xy]_t"):
        data.load(f"npz:{tmp_path / 'x.npz'}")


def test_names_of_classes_without_labels_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", x=arrays(40)[0], labels=np.array(["a", "b"]))
    with pytest.raises(DataError, match="names classes, but holds no y"):
        data.load(f"npz:{tmp_path / 'x.npz'}")


def test_a_part_with_class_folders_beside_one_without_is_refused(tmp_path):
    folder(tmp_path / "photos" / "train")
    loose(tmp_path / "photos" / "test")
    with pytest.raises(DataError, match="some parts have class folders and others none"):
        data.load(f"imagefolder:{tmp_path / 'photos'}")
