"""Archives from anywhere: what is refused, and that nothing is written before it is."""

import gzip
import os
import random
import tarfile
import tracemalloc

import pytest

from exporters import ExportError, check, pack, unpack, unpacking
from tests.exporters.bundles import linear, make, variant


def header(name="b/model.onnx", size=1, kind=tarfile.REGTYPE, **fields):
    entry = tarfile.TarInfo(name)
    entry.size, entry.type = size, kind
    for field, value in fields.items():
        setattr(entry, field, value)
    return entry


def raw(entry, content=b"", form=tarfile.GNU_FORMAT):
    """The bytes of an entry, its header as it is and its content filled up."""
    return entry.tobuf(form) + content + bytes(-len(content) % 512)


def archived(tmp_path, *entries, end=bytes(1024), level=9):
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(b"".join(entries) + end, level))
    return tmp_path / "x.tar.gz"


def pax(records: bytes, kind=tarfile.XHDTYPE, size=None):
    entry = header("b/PaxHeaders", len(records) if size is None else size, kind)
    return raw(entry, records)


def record(key: str, value: str) -> bytes:
    text = f" {key}={value}\n".encode()
    length = len(text) + len(str(len(text)))
    length = len(text) + len(str(length))
    return str(length).encode() + text


def refused(tmp_path, archive, said="which no bundle does"):
    with pytest.raises(ExportError, match=said) as raised:
        unpack(archive, tmp_path / "there")
    assert "\n" not in str(raised.value)
    assert [entry.name for entry in tmp_path.iterdir()] == [archive.name]
    return str(raised.value)


@pytest.mark.parametrize(
    "name",
    [
        "../evil", "/etc/evil", "b/../evil", "b/c/evil", "evil", "./evil", "b/", "b/.", "b/..", "//evil", "b//evil",
        "../../evil", "b\\..\\evil", "b/c:evil", "b/..\\evil", "b/a\nb", "b/\x1b[31m", "C:/evil", "b/ev\u202eil",
    ],
)  # fmt: skip
def test_a_name_that_leaves_the_folder_or_cannot_be_printed_is_refused(tmp_path, name):
    refused(tmp_path, archived(tmp_path, raw(header(name), b"x")))


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "b/c/evil", "b/..", "b/a\0b"])
def test_a_pax_name_is_held_to_the_same(tmp_path, name):
    refused(tmp_path, archived(tmp_path, pax(record("path", name)), raw(header(), b"x")))


@pytest.mark.parametrize("kind", [bytes([code]) for code in range(256) if bytes([code]) not in (b"0", b"\0")])
def test_whatever_is_no_plain_file_is_refused(tmp_path, kind):
    refused(tmp_path, archived(tmp_path, raw(header(kind=kind, linkname="/etc/passwd"), b"x")))


def test_names_that_stand_twice_are_refused(tmp_path):
    """On some disks, capitals make no difference."""
    for names in (("b/x", "b/x"), ("b/x", "b/X")):
        refused(tmp_path, archived(tmp_path, *(raw(header(name), b"x") for name in names)), "twice")
    refused(tmp_path, archived(tmp_path, raw(header("b/x"), b"x"), raw(header("c/y"), b"x")), "a second folder")


@pytest.mark.parametrize(
    "records",
    [
        record("GNU.sparse.major", "1"),
        record("GNU.sparse.map", "0,1125899906842624"),
        record("GNU.sparse.map", "x,y"),
        record("GNU.sparse.size", "1125899906842624"),
        record("GNU.sparse.realsize", "x"),
        record("GNU.sparse.numblocks", "garbage"),
        record("GNU.sparse.name", "../evil"),
        record("linkpath", "/etc/passwd"),
        record("hdrcharset", "BINARY"),
        record("size", "x"),
        record("size", "-1"),
        record("size", "9" * 30),
        record("size", "²"),
        record("path", "a") * 2,
        b"garbage",
        b"5 a=\n\xff",
        b"0 a=b\n",
        b"999999 path=x\n",
        b"9" * 4000,
        b"12 path=\xff\xfe\n\n",
        b"",
    ],
)  # fmt: skip
def test_pax_headers_with_anything_but_names_and_sizes_are_refused(tmp_path, records):
    refused(tmp_path, archived(tmp_path, pax(records), raw(header(), b"x")), "which no bundle does|cannot be unpacked")


def test_a_global_header_a_long_name_and_two_headers_are_refused(tmp_path):
    one = pax(record("path", "b/y"))
    for entry in (pax(record("path", "b/y"), tarfile.XGLTYPE), one + one, one):
        refused(tmp_path, archived(tmp_path, entry), "which no bundle does|cannot be unpacked")
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
        refused(tmp_path, archived(tmp_path, raw(header("././@LongLink", 200, kind), b"x" * 200), raw(header(), b"x")))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE])
def test_a_small_archive_with_a_large_header_or_file_costs_no_memory(tmp_path, kind):
    """A third of a gigabyte of zeros in 300 kB, of which nothing is unpacked."""
    size = 300 << 20
    with gzip.open(tmp_path / "x.tar.gz", "wb", compresslevel=6) as file:
        file.write(header("b/x", size, kind).tobuf(tarfile.GNU_FORMAT))
        for _ in range(size >> 20):
            file.write(bytes(1 << 20))
        file.write(bytes(1024))
    tracemalloc.start()
    refused(tmp_path, tmp_path / "x.tar.gz", "which no bundle does|at most 1000 of")
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("size", [8 << 30, 1 << 50, -1, (1 << 63) - 1])
def test_a_size_that_no_bundle_has_is_refused_before_anything_is_read(tmp_path, size):
    refused(tmp_path, archived(tmp_path, raw(header(size=size), b"x")), "at most 1000 of")
    if size > 0:
        refused(tmp_path, archived(tmp_path, pax(record("size", str(size))), raw(header(), b"x")), "at most 1000 of")


def test_old_sparse_files_are_refused(tmp_path):
    """94 kB that claim 8 GB: the map of holes stands in the header itself."""
    block = bytearray(header("b/x", 512, tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    for holes in (b"00000000000\0" * 2, b"garbage!", b"\x80" + b"\xff" * 11):
        block[386 : 386 + len(holes)] = holes
        block[483:495] = b"77777777777\0"
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        assert "a sparse file" in refused(tmp_path, archived(tmp_path, bytes(block) + bytes(512)))


def test_more_files_than_any_bundle_has_are_refused(tmp_path):
    entries = [raw(header(f"b/{i}", 0)) for i in range(unpacking.MAX_FILES + 1)]
    refused(tmp_path, archived(tmp_path, *entries), "1001 files")


def test_what_lies_behind_the_end_is_refused(tmp_path):
    whole = raw(header(), b"x")
    refused(tmp_path, archived(tmp_path, whole, end=bytes(1024) + raw(header("b/../y"), b"x")))
    refused(tmp_path, archived(tmp_path, whole, end=bytes(1 << 20)), "behind its end")


def test_damaged_archives_are_refused(tmp_path):
    whole = archived(tmp_path, raw(header(), b"x" * 5000 + os.urandom(5000), tarfile.USTAR_FORMAT)).read_bytes()
    entry = bytearray(raw(header(), b"x"))
    entry[0] ^= 1
    for content in (
        b"", b"no archive", whole[:5], whole[: len(whole) // 2], whole[:-4], whole[:-8] + bytes(8), whole + b"more",
        gzip.compress(b""), gzip.compress(bytes(entry) + bytes(1024)), gzip.compress(b"x" * 512), gzip.compress(b"x"),
        gzip.compress(raw(header(), b"x")), gzip.compress(raw(header(), b"x") + bytes(512)),
    ):  # fmt: skip
        (tmp_path / "x.tar.gz").write_bytes(content)
        refused(tmp_path, tmp_path / "x.tar.gz", "cannot be unpacked")


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.tar.gz")
    refused(tmp_path, tmp_path / "pipe.tar.gz", "no such file")
    (tmp_path / "pipe.tar.gz").unlink()
    (tmp_path / "x.tar.gz").mkdir()
    refused(tmp_path, tmp_path / "x.tar.gz", "no such file")


def test_a_bundle_for_which_there_is_no_room_is_not_begun(tmp_path, monkeypatch):
    class Usage:
        free = 100

    archive = archived(tmp_path, raw(header(size=200), b"x" * 200))
    monkeypatch.setattr(unpacking.shutil, "disk_usage", lambda path: Usage)
    refused(tmp_path, archive, "unpacks to 200 bytes")


def test_a_name_beyond_ascii_or_of_many_letters_goes_there_and_back(tmp_path):
    """tarfile writes a pax header for it."""
    made = make([variant(linear(tmp_path / f"{'größe' * 12}.onnx"))], tmp_path / "bundle")
    archive = tmp_path / f"{'naïve' * 20}.tar.gz"
    pack(made.path, archive)
    unpack(archive, tmp_path / "there")
    assert check(tmp_path / "there")["ok"]


def test_what_is_packed_can_be_unpacked_or_is_not_packed(tmp_path, monkeypatch):
    made = make([variant(linear(tmp_path / "linear.onnx"))], tmp_path / "bundle")
    monkeypatch.setattr(unpacking, "MAX_FILES", 3)
    with pytest.raises(ExportError, match="at most 3"):
        pack(made.path, tmp_path / "x.tar.gz")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bundle", "linear.onnx"]


def test_archives_of_random_headers_are_refused_in_one_line(tmp_path):
    """Whatever stands in a header; nothing but ExportError comes out."""
    generator = random.Random(0)
    for _ in range(300):
        block = bytearray(raw(header(), b"x", generator.choice([tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])))
        for _ in range(generator.randint(1, 6)):
            block[generator.randrange(345)] = generator.randrange(256)
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block[:512])
        archive = archived(tmp_path, bytes(block), level=1)
        try:
            unpack(archive, tmp_path / "there")
        except ExportError as error:
            assert "\n" not in str(error)
            assert not (tmp_path / "there").exists()
        else:
            (file,) = (tmp_path / "there").iterdir()
            assert file.read_bytes() == b"x"
            file.unlink()
            file.parent.rmdir()
