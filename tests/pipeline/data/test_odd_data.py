"""Data as nobody should give it: one line with the array's or the sample's name, or read as meant; never a traceback."""  # noqa: E501

import io
import itertools
import struct
import zipfile

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from foundation.errors import DataError, UserError
from pipeline import data
from pipeline.data.samples import Reading

RNG = np.random.default_rng(0)
X = RNG.integers(0, 255, (60, 8, 8), dtype=np.uint8)
Y = np.arange(60) % 3


def said(spec) -> str:
    with pytest.raises(DataError) as caught:
        data.load(spec)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    assert len(message) < 1000
    return message


def saved(tmp_path, **given) -> str:
    np.savez(tmp_path / "d.npz", **given)
    return f"npz:{tmp_path / 'd.npz'}"


def npy(header: str, content: bytes = b"") -> bytes:
    text = header.ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content


def zipped(tmp_path, method=zipfile.ZIP_STORED, **members: bytes) -> str:
    with zipfile.ZipFile(tmp_path / "d.npz", "w", method) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return f"npz:{tmp_path / 'd.npz'}"


def array_bytes(value, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, value, **options)
    return buffer.getvalue()


def changed(tmp_path, offset_local: int, offset_central: int, value: int) -> str:
    """An .npz with a two-byte field of each member's headers set to `value`."""
    saved(tmp_path, x=X, y=Y)
    content = bytearray((tmp_path / "d.npz").read_bytes())
    for mark, offset in ((b"PK\x03\x04", offset_local), (b"PK\x01\x02", offset_central)):
        place = content.find(mark)
        while place >= 0:
            content[place + offset : place + offset + 2] = struct.pack("<H", value)
            place = content.find(mark, place + 4)
    (tmp_path / "d.npz").write_bytes(content)
    return f"npz:{tmp_path / 'd.npz'}"


def test_a_single_array_given_as_npz(tmp_path):
    np.save(tmp_path / "d.npy", X)
    (tmp_path / "d.npy").rename(tmp_path / "d.npz")
    assert "one array" in said(f"npz:{tmp_path / 'd.npz'}")


def test_an_encrypted_npz(tmp_path):
    assert "encrypted" in said(changed(tmp_path, 6, 8, 1))


@pytest.mark.parametrize("method", [1, 6, 97, 99])
def test_a_compression_that_nobody_here_knows(tmp_path, method):
    assert "d.npz" in said(changed(tmp_path, 8, 10, method))


@pytest.mark.parametrize(
    "shape", ["(200000, 224, 224)", "(4000000000000000, 8, 8)", "(-1, 8, 8)", "(0, -3)", "(8,", "()"]
)
def test_a_header_that_claims_what_is_not_there(tmp_path, shape):
    header = npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}")
    assert "x" in said(zipped(tmp_path, x=header, y=array_bytes(Y)))


@pytest.mark.parametrize("shape", ["(200000, 224, 224)", "(4000000000000000, 8, 8)"])
def test_a_single_file_whose_header_claims_what_is_not_there(tmp_path, shape):
    (tmp_path / "d.npz").write_bytes(npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"))
    said(f"npz:{tmp_path / 'd.npz'}")


def test_a_small_archive_that_unpacks_to_much(tmp_path):
    header = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4000000000,), }", bytes(50_000_000))
    assert "x" in said(zipped(tmp_path, zipfile.ZIP_DEFLATED, x=header, y=array_bytes(Y)))


def test_a_member_that_is_cut_or_nonsense(tmp_path):
    for content in (
        b"",
        b"\x93NUMPY",
        array_bytes(X)[:-5],
        b"nonsense",
        npy("[" * 100),
        npy("{" + "'a':" * 20),
        npy("\0"),
    ):
        assert "x" in said(zipped(tmp_path, x=content, y=array_bytes(Y)))


def test_a_folder_and_a_fifo_and_an_empty_file(tmp_path):
    (tmp_path / "empty.npz").touch()
    assert "empty.npz" in said(f"npz:{tmp_path / 'empty.npz'}")
    assert "no such file" in said(f"npz:{tmp_path}")


ARRAYS = {
    "objects": ({"x": np.array([{}] * 60, dtype=object), "y": Y}, ": x "),
    "objects in y": ({"x": X, "y": np.array([{}] * 60, dtype=object)}, ": y "),
    "complex": ({"x": X.astype(complex), "y": Y}, "complex"),
    "text": ({"x": X.astype(str), "y": Y}, ": x "),
    "dates": ({"x": X.astype("datetime64[s]"), "y": Y}, ": x "),
    "records": ({"x": np.zeros((60, 8, 8), [("a", "f4")]), "y": Y}, ": x "),
    "no rows": ({"x": np.array(3.0), "y": Y}, ": x "),
    "labels of no dimension": ({"x": X, "y": np.array(3)}, ": y "),
    "no number": ({"x": X, "y": np.where(Y == 1, np.nan, Y)}, ": y "),
    "infinite": ({"x": X, "y": np.where(Y == 1, np.inf, Y)}, ": y "),
    "beyond 64 bits": ({"x": X, "y": np.where(Y == 1, 2.0**70, Y)}, ": y "),
    "beyond 63 bits": ({"x": X, "y": np.where(Y == 1, np.uint64(2**63 + 5), Y.astype(np.uint64))}, ": y "),
    "negative": ({"x": X, "y": Y - 1}, "-1"),
    "fractions": ({"x": X, "y": Y + 0.5}, ": y "),
    "labels of objects": ({"x": X, "y": Y.astype(str)}, ": y "),
    "empty": ({"x": X[:0], "y": Y[:0]}, "empty"),
    "one image": ({"x": X[:1], "y": Y[:1]}, "class"),
    "no width": ({"x": X[:, :, :0], "y": Y}, ": x "),
    "no channels": ({"x": np.zeros((60, 0, 8, 8), np.uint8), "y": Y}, ": x "),
    "not a number in the middle": ({"x": np.where(np.arange(60)[:, None, None] == 31, np.nan, X), "y": Y}, "sample 31"),
    "infinite in float32": ({"x": np.where(np.arange(60)[:, None, None] == 31, 1e300, X), "y": Y}, "sample 31"),
    "an empty part": ({"x_train": X, "y_train": Y, "x_test": X[:0], "y_test": Y[:0]}, "empty"),
    "a part without labels": ({"x_train": X, "y_train": Y, "x_test": X}, "y_test"),
    "names of nothing": ({"x": X, "y": Y, "labels": np.array(["a"])}, "label"),
    "names of no dimension": ({"x": X, "y": Y, "labels": np.array("abc")}, "labels"),
    "parts of two sizes": ({"x_train": X, "y_train": Y, "x_test": X[:, :5], "y_test": Y}, "shapes"),
    "all parts the same": ({"x_train": X, "y_train": Y, "x_test": X, "y_test": Y}, "also in"),
}  # fmt: skip


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("case", ARRAYS.values(), ids=ARRAYS)
def test_arrays_of_nonsense(tmp_path, case):
    arrays, word = case
    assert word in said(saved(tmp_path, **arrays))
    if set(arrays) == {"x", "y"}:
        assert word in said((arrays["x"], arrays["y"]))


TENSORS = {
    "sparse": lambda x: x.float().to_sparse(),
    "complex": lambda x: x.to(torch.complex64),
    "on no device": lambda x: x.float().to("meta"),
    "quantised": lambda x: torch.quantize_per_tensor(x.float(), 1.0, 0, torch.quint8),
}
MEANT = {
    "bfloat16": lambda x: x.bfloat16(),
    "float16": lambda x: x.half(),
    "float64": lambda x: x.double(),
    "int8": lambda x: (x // 2).to(torch.int8),
    "int64": lambda x: x.long(),
    "bool": lambda x: x > 100,
    "that wants a gradient": lambda x: x.float().requires_grad_(),
    "not contiguous": lambda x: x.mT,
    "conjugated": lambda x: torch.complex(x.float(), x.float()).conj().imag,
}


class Listed:
    def __init__(self, x, y=Y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.x[index], self.y[index]


@pytest.mark.parametrize("odd", TENSORS.values(), ids=TENSORS)
def test_tensors_that_are_no_images(odd):
    made = odd(torch.from_numpy(X))
    assert "x" in said((made, torch.from_numpy(Y)))
    assert "sample 0" in said(Listed([odd(torch.from_numpy(one)) for one in X]))


@pytest.mark.parametrize("meant", MEANT.values(), ids=MEANT)
def test_tensors_of_other_types_are_read_as_meant(meant):
    made = meant(torch.from_numpy(X))
    for spec in ((made, torch.from_numpy(Y)), Listed([meant(torch.from_numpy(one)) for one in X])):
        (images,), labels = next(data.load(spec, reading=Reading(images=True)).batches("train"))
        assert images.dtype == torch.float32
        assert not images.requires_grad
        assert images.isfinite().all()
        assert len(images) == len(labels)


class Odd(Listed):
    def __init__(self, place=31, **odd):
        super().__init__(torch.from_numpy(X).float())
        self.place, self.odd = place, odd

    def __getitem__(self, index):
        if index == self.place:
            if "error" in self.odd:
                raise self.odd["error"]
            return self.odd["sample"]
        return super().__getitem__(index)


class Mute(Exception):  # noqa: N818
    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __str__


class Unsaid:
    def __repr__(self):
        raise RuntimeError("no text")

    __int__ = __repr__


IMAGE = torch.zeros(8, 8)
SAMPLES = {
    "none": None,
    "one": IMAGE,
    "three": (IMAGE, 1, 2),
    "of objects": (np.array([[{}]]), 1),
    "text": ("image", 1),
    "text in an array": (np.array([["a"]]), 1),
    "other size": (torch.zeros(9, 8), 1),
    "other channels": (torch.zeros(3, 8, 8), 1),
    "other dimensions": (torch.zeros(1, 1, 8, 8), 1),
    "not a number": (IMAGE + torch.nan, 1),
    "infinite": (IMAGE + torch.inf, 1),
    "beyond float32": (IMAGE.double() + 1e300, 1),
    "complex": (IMAGE.to(torch.complex64), 1),
    "complex not a number": (IMAGE.to(torch.complex64) * torch.nan, 1),
    "sparse": (IMAGE.to_sparse(), 1),
    "on no device": (IMAGE.to("meta"), 1),
    "label not a number": (IMAGE, float("nan")),
    "label infinite": (IMAGE, torch.tensor(torch.inf)),
    "label of fractions": (IMAGE, 1.5),
    "label tensor of fractions": (IMAGE, torch.tensor(0.5)),
    "label beyond 64 bits": (IMAGE, 2**70),
    "label of text": (IMAGE, "cat"),
    "label of digits in text": (IMAGE, "1"),
    "labels": (IMAGE, torch.tensor([0, 1])),
    "label on no device": (IMAGE, torch.tensor(1, device="meta")),
    "label none": (IMAGE, None),
    "label that cannot be said": (IMAGE, Unsaid()),
    "label of a long text": (IMAGE, "x" * 1_000_000),
    "label complex": (IMAGE, 1j),
}  # fmt: skip


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_an_odd_sample_in_the_middle_is_named(sample):
    assert "sample 31" in said(Odd(sample=sample))


@pytest.mark.parametrize("error", [Mute(), ValueError("x\ny"), SystemExit(0), KeyError(), IndexError("x" * 1_000_000),
                                   StopIteration(), RecursionError(), MemoryError(), AssertionError(), OSError(28, "full")])  # fmt: skip  # noqa: E501
def test_a_sample_that_raises_is_named(error):
    message = said(Odd(error=error))
    assert "sample 31" in message
    assert type(error).__name__ in message


class Length(Listed):
    def __init__(self, length):
        super().__init__(torch.from_numpy(X).float())
        self.length = length

    def __len__(self):
        return self.length()


def broken():
    raise Mute


@pytest.mark.parametrize(
    "length", [broken, lambda: -1, lambda: "x", lambda: 2**70, lambda: None, lambda: 0, lambda: 100]
)
def test_a_length_that_is_none(length):
    said(Length(length))
    said([Length(length), Listed(torch.from_numpy(X).float())])


def test_a_length_shorter_than_what_there_is_is_taken_at_its_word():
    assert sum(len(data.load(Length(lambda: 30)).split(part)) for part in ("train", "calibration", "test")) == 30


class Endless(IterableDataset):
    def __iter__(self):
        return itertools.repeat((IMAGE, 1))


class Lazy:
    """Raises IndexError for no position and knows no length, as an old-style sequence."""

    def __getitem__(self, index):
        return IMAGE, 1


@pytest.mark.parametrize("spec", [Endless(), DataLoader(Endless()), itertools.repeat((IMAGE, 1)), Lazy(), 3, None, object(),  # noqa: E501
                                  (), [], {}, {"train": None}, {1: 2}, (1, 2), (None, None, None), b"bytes", {IMAGE: 1}])  # fmt: skip  # noqa: E501
def test_what_is_no_data_at_all(spec, monkeypatch):
    monkeypatch.setattr("pipeline.data.objects.MOST_SPOOLED", 100)
    said(spec)


def test_targets_that_do_not_fit(monkeypatch):
    monkeypatch.setattr("pipeline.data.objects.SCANNED", 10)
    for targets in (
        [0, 1],
        "cat",
        [None] * 60,
        np.array([{}] * 60),
        torch.zeros(60, 2),
        [1.5] * 60,
        [2**70] * 60,
        Unsaid(),
    ):
        source = Listed(torch.from_numpy(X).float())
        source.targets = targets
        assert "targets" in said(source)


def test_class_names_that_cannot_be_read():
    for classes in ([Unsaid()] * 3, ["a"]):
        source = Listed(torch.from_numpy(X).float())
        source.classes = classes
        said(source)


def test_a_module_file_that_returns_nonsense(tmp_path):
    path = tmp_path / "mine.py"
    for body in ("return None", "raise Mute", "yield 1", "import torch; return torch.zeros(3)", "return iter(int, 1)",
                 "raise ValueError('x' * 1_000_000)"):  # fmt: skip
        path.write_text(
            f"class Mute(Exception):\n    def __str__(self):\n        raise RuntimeError\ndef samples():\n    {body}\n"
        )
        with pytest.raises(UserError) as caught:
            data.load(f"{path}:samples")
        assert len(str(caught.value)) < 1000


def test_a_set_that_changes_between_two_readings_is_an_error_of_the_data():
    class Moody(Listed):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            image = self.x[index]
            return (image if self.reads <= 60 else image[:5]), self.y[index]

    found = data.load(Moody(torch.from_numpy(X).float()))
    with pytest.raises(DataError, match="sample"):
        list(found.batches("train"))
