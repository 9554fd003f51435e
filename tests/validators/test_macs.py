"""Multiply-accumulates of an ONNX file: each operator against its formula written out."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from validators import Feed, ValidationError, count_macs

MS = "com.microsoft"


def saved(path, nodes, inputs, weights=(), outputs=("y",), opset=23):
    """A model of `nodes`; `inputs` name -> shape, `weights` name -> array."""
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape[1:]])
            for name, shape in inputs.items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in dict(weights).items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(MS, 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path, Feed("f", {name: np.ones(shape, np.float32) for name, shape in inputs.items()})


def ones(*shape):
    return np.ones(shape, np.float32)


def node(operator, inputs, domain="", **attributes):
    return helper.make_node(operator, inputs.split(), ["y"], domain=domain, **attributes)


@pytest.mark.parametrize(
    ("made", "inputs", "weights", "macs"),
    [
        (node("Conv", "x w", group=2, strides=[2, 2]), {"x": (3, 4, 9, 9)}, {"w": ones(6, 2, 3, 3)}, 6 * 4 * 4 * 2 * 9),
        (node("FusedConv", "x w", MS, activation="Relu"), {"x": (3, 4, 5, 5)}, {"w": ones(6, 4, 1, 1)}, 6 * 25 * 4),
        (node("ConvTranspose", "x w"), {"x": (3, 4, 5, 5)}, {"w": ones(4, 7, 2, 2)}, 4 * 25 * 7 * 4),
        (node("Gemm", "x w", transB=1), {"x": (3, 8)}, {"w": ones(5, 8)}, 8 * 5),
        (node("MatMul", "x w"), {"x": (3, 6, 8)}, {"w": ones(8, 5)}, 6 * 8 * 5),
        (node("MatMul", "x z"), {"x": (3, 2, 6, 8), "z": (3, 2, 8, 7)}, {}, 2 * 6 * 8 * 7),
        (node("FusedMatMul", "x z", MS, transA=1), {"x": (3, 8, 6), "z": (3, 8, 7)}, {}, 6 * 8 * 7),
        (node("Einsum", "x z", equation="b...i, bij -> b...j"), {"x": (3, 2, 6, 8), "z": (3, 8, 7)}, {}, 2 * 6 * 8 * 7),
        (
            node("Attention", "x k v"),
            {"x": (3, 4, 6, 8), "k": (3, 4, 9, 8), "v": (3, 4, 9, 5)},
            {},
            4 * 6 * 9 * (8 + 5),
        ),
        (
            node("Attention", "x k v", q_num_heads=4, kv_num_heads=2),
            {"x": (3, 6, 32), "k": (3, 9, 16), "v": (3, 9, 10)},
            {},
            4 * 6 * 9 * (8 + 5),
        ),
        (
            node("Attention", "x w c", MS, num_heads=2),
            {"x": (3, 6, 8)},
            {"w": ones(8, 24), "c": ones(24)},
            6 * 8 * 24 + 6 * 6 * 16,
        ),
        (
            node("MultiHeadAttention", "x k v", MS, num_heads=2),
            {"x": (3, 6, 8), "k": (3, 9, 8), "v": (3, 9, 10)},
            {},
            6 * 9 * 18,
        ),
    ],
    ids=lambda value: value.op_type if isinstance(value, onnx.NodeProto) else "",
)  # fmt: skip
def test_an_operator_is_counted_by_its_formula(tmp_path, made, inputs, weights, macs):
    path, feed = saved(tmp_path / "m.onnx", [made], inputs, weights)
    assert count_macs(path, feed) == macs


def test_a_recurrent_layer_counts_both_products_at_every_step(tmp_path):
    nodes = [
        helper.make_node("Transpose", ["x"], ["steps"], perm=[1, 0, 2]),
        helper.make_node("LSTM", ["steps", "w", "r"], ["all", "y"], hidden_size=7),
    ]
    path, feed = saved(tmp_path / "m.onnx", nodes, {"x": (3, 5, 4)}, {"w": ones(1, 28, 4), "r": ones(1, 28, 7)})
    assert count_macs(path, feed) == 5 * (28 * 4 + 28 * 7)


def test_weights_computed_in_the_graph_and_what_follows_each_other_are_counted_and_norms_are_not(tmp_path):
    nodes = [
        helper.make_node("Transpose", ["w"], ["wt"]),
        helper.make_node("MatMul", ["x", "wt"], ["a"]),
        helper.make_node("LayerNormalization", ["a", "s"], ["b"]),
        helper.make_node("Gemm", ["b", "v"], ["y"]),
    ]
    path, feed = saved(tmp_path / "m.onnx", nodes, {"x": (2, 8)}, {"w": ones(6, 8), "s": ones(6), "v": ones(6, 3)})
    assert count_macs(path, feed) == 8 * 6 + 6 * 3


def test_a_part_is_never_given_for_all(tmp_path):
    """Operators that multiply in ways that are not known here, and those of a branch."""
    path, feed = saved(
        tmp_path / "a.onnx",
        [node("GroupQueryAttention", "x k v p p n t", MS, num_heads=2, kv_num_heads=2)],
        {"x": (1, 1, 16), "k": (1, 1, 16), "v": (1, 1, 16)},
        {"p": ones(1, 2, 0, 8), "n": np.array([0], np.int32), "t": np.array(1, np.int32)},
    )
    assert count_macs(path, feed) is None
    branch = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["b"])], "g", [], [helper.make_tensor_value_info("b", 1, None)]
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("If", ["yes"], ["c"], then_branch=branch, else_branch=branch),
        helper.make_node("Add", ["a", "c"], ["y"]),
    ]
    path, feed = saved(tmp_path / "b.onnx", nodes, {"x": (2, 8)}, {"w": ones(8, 8), "yes": np.array(True)})
    assert count_macs(path, feed) is None
    (tmp_path / "c.ort").write_bytes(b"")
    assert count_macs(tmp_path / "c.ort", feed) is None


def test_weights_beside_the_file_are_not_needed_twice(tmp_path):
    path, feed = saved(tmp_path / "m.onnx", [node("MatMul", "x w")], {"x": (2, 64)}, {"w": ones(64, 64)})
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="m.data", size_threshold=0)
    assert count_macs(path, feed) == 64 * 64


def test_what_cannot_be_read_or_run_is_one_line(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    path, feed = saved(tmp_path / "m.onnx", [node("MatMul", "x w")], {"x": (2, 64)}, {"w": ones(64, 64)})
    with pytest.raises(ValidationError, match="bad.onnx"):
        count_macs(tmp_path / "bad.onnx", feed)
    with pytest.raises(ValidationError, match="cannot be counted"):
        count_macs(path, Feed("f", {"x": ones(2, 63)}))
