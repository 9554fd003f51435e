import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporters import describe
from exporters.to_ort import load, session_options
from foundation.errors import ExportError
from foundation.links import leaves, load_whole, plain_files
from validators import OrtRunner, ValidationError, count_macs, first_divergence, measure, random_feeds


@pytest.fixture
def stored(tmp_path) -> Path:
    """A model with its weights in another file, in a folder of blobs named otherwise."""
    weight = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 32])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    onnx.save(model, blobs / "1", save_as_external_data=True, location="w.data", size_threshold=0)
    (blobs / "w.data").rename(blobs / "2")
    return blobs


def snapshot(blobs: Path, *, link_model: bool) -> Path:
    """The model as Hugging Face's cache shows it; or only its weights are a link."""
    folder = blobs.parent / "snapshots" / "abc"
    folder.mkdir(parents=True)
    if link_model:
        (folder / "model.onnx").symlink_to("../../blobs/1")
    else:
        (folder / "model.onnx").write_bytes((blobs / "1").read_bytes())
    (folder / "w.data").symlink_to("../../blobs/2")
    return folder / "model.onnx"


@pytest.mark.parametrize("link_model", [True, False])
def test_everything_that_reads_a_file_follows_its_links(stored, link_model):
    path = snapshot(stored, link_model=link_model)
    runner = OrtRunner(path, threads=1)
    feed = random_feeds(runner.inputs, seed=0, batches=(2,))[0]
    assert runner.infer(feed.arrays)["y"].shape == (2, 32)
    assert count_macs(path, feed) == 64 * 32
    assert measure(path, feed, threads=1, loads=1).bytes > 64 * 32 * 4
    assert first_divergence(path, path, feed, atol=1e-5) is None
    assert describe(path).parameters == 64 * 32
    assert load(path, session_options(1)).get_inputs()[0].name == "x"


def test_the_weights_are_linked_not_copied_and_gone_afterwards(stored):
    path = snapshot(stored, link_model=True)
    with plain_files(path) as plain:
        assert not plain.is_symlink()
        weights = plain.parent / "w.data"
        assert not weights.is_symlink()
        if stored.stat().st_dev == plain.parent.stat().st_dev:
            assert weights.samefile(stored / "2")
    assert not plain.parent.exists()


def test_where_hard_links_are_refused_it_is_copied(stored, monkeypatch):
    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refused)
    with plain_files(snapshot(stored, link_model=True)) as plain:
        assert (plain.parent / "w.data").read_bytes() == (stored / "2").read_bytes()


def test_a_file_without_links_is_itself(stored):
    (stored / "2").rename(stored / "w.data")
    with plain_files(stored / "1") as plain:
        assert plain == stored / "1"


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/../../secret", "away/secret"])
def test_a_name_in_the_model_cannot_leave_its_folder(stored, name):
    path = snapshot(stored, link_model=False)
    (stored.parent / "snapshots" / "secret").write_bytes(bytes(64 * 32 * 4))
    (path.parent / "away").symlink_to("..")
    model = onnx.load(path, load_external_data=False)
    entries = {entry.key: entry for entry in model.graph.initializer[0].external_data}
    entries["location"].value = name
    path.write_bytes(model.SerializeToString())
    assert leaves(path.parent, name)
    with plain_files(path) as plain:
        assert plain == path
    with pytest.raises(ValidationError, match="cannot load"):
        OrtRunner(path, threads=1)
    with pytest.raises(ValueError, match="outside its folder"):
        load_whole(path)
    with pytest.raises(ExportError, match="outside its folder"):
        describe(path)


def test_a_link_to_nothing_is_said(stored):
    path = snapshot(stored, link_model=True)
    (stored / "2").unlink()
    with pytest.raises(ExportError, match="missing"):
        describe(path)
    with pytest.raises(ValidationError, match="cannot load"):
        OrtRunner(path, threads=1)
