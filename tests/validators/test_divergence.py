import json
import subprocess
import sys
import zipfile

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from validators import Feed, ValidationError, first_divergence, repro_pack

LAYERS = 12
FEED = Feed("real, batch 2", {"input": np.random.default_rng(1).standard_normal((2, 8)).astype(np.float32)})


def net(path, *, wrong=None, fused=(), by=0.5):
    """Twelve layers MatMul -> Tanh; `wrong` has one weight changed; the products of `fused` are called otherwise."""
    rng = np.random.default_rng(0)
    nodes, tensors, value = [], [], "input"
    for layer in range(LAYERS):
        weight = rng.standard_normal((8, 8)).astype(np.float32)
        if layer == wrong:
            weight[3, 3] += by
        tensors.append(numpy_helper.from_array(weight, f"w{layer}"))
        product = f"fused{layer}" if layer in fused else f"product{layer}"
        nodes.append(helper.make_node("MatMul", [value, f"w{layer}"], [product], name=f"matmul{layer}"))
        nodes.append(helper.make_node("Tanh", [product], [f"tanh{layer}"], name=f"tanh_node{layer}"))
        value = f"tanh{layer}"
    nodes.append(helper.make_node("Add", [value, "input"], ["output"], name="add"))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, ["batch", 8])],
        tensors,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


@pytest.mark.parametrize("layer", range(0, LAYERS, 3))
def test_the_layer_with_the_changed_weight_is_named(tmp_path, layer):
    good, bad = net(tmp_path / "good.onnx"), net(tmp_path / "bad.onnx", wrong=layer)
    found = first_divergence(good, bad, FEED, atol=1e-5)
    assert (found.tensor, found.candidate_node) == (f"product{layer}", f"MatMul matmul{layer}")
    assert found.agreed == (f"tanh{layer - 1}" if layer else None)
    assert found.comparable == 2 * LAYERS + 1
    assert found.probes <= 2 * 7
    assert found.reference.shape == (2, 8)
    assert found.max_abs > found.tolerance
    assert found.reference.mean != found.candidate.mean
    assert f"first differs at product{layer}" in found.words


def test_where_the_layer_itself_was_fused_away_the_next_shared_tensor_is_named(tmp_path):
    good, bad = net(tmp_path / "good.onnx"), net(tmp_path / "bad.onnx", wrong=5, fused=(4, 5, 6))
    found = first_divergence(good, bad, FEED, atol=1e-5)
    assert (found.tensor, found.agreed) == ("tanh5", "tanh4")


def test_a_nan_is_a_difference_and_counted(tmp_path):
    good, bad = net(tmp_path / "good.onnx"), net(tmp_path / "bad.onnx", wrong=2, by=np.nan)
    found = first_divergence(good, bad, FEED, atol=1e-5)
    assert (found.tensor, found.max_abs, found.candidate.nan) == ("product2", None, 2)
    assert "not comparable" in found.words


def test_equal_graphs_do_not_part_and_nothing_is_written(tmp_path):
    good, same = net(tmp_path / "good.onnx"), net(tmp_path / "same.onnx")
    assert repro_pack(good, same, FEED, tmp_path / "repro.zip", atol=1e-6) is None
    assert not (tmp_path / "repro.zip").exists()


def test_the_pack_holds_the_smallest_graphs_and_shows_the_difference_alone(tmp_path):
    good, bad = net(tmp_path / "good.onnx"), net(tmp_path / "bad.onnx", wrong=7, fused=(7,))
    found = repro_pack(good, bad, FEED, tmp_path / "repro.zip", atol=1e-5)
    with zipfile.ZipFile(tmp_path / "repro.zip") as pack:
        pack.extractall(tmp_path / "repro")
    for name, operators in (("reference.onnx", ["MatMul", "Tanh"]), ("candidate.onnx", ["MatMul", "Tanh"])):
        graph = onnx.load(tmp_path / "repro" / name).graph
        assert [node.op_type for node in graph.node] == operators
        assert [value.name for value in graph.input] == ["tanh6"]
        assert [tensor.name for tensor in graph.initializer] == ["w7"]
    done = subprocess.run([sys.executable, "repro.py"], cwd=tmp_path / "repro", capture_output=True, text=True)
    assert float(done.stdout.rpartition(" ")[2]) == pytest.approx(found.max_abs, rel=1e-5)
    assert json.loads((tmp_path / "repro" / "versions.json").read_text())["onnxruntime"]
    assert json.loads((tmp_path / "repro" / "divergence.json").read_text())["tensor"] == "tanh7"


def test_a_file_that_is_no_model_is_one_line(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    with pytest.raises(ValidationError, match="bad.onnx cannot"):
        first_divergence(net(tmp_path / "good.onnx"), tmp_path / "bad.onnx", FEED, atol=1e-5)
