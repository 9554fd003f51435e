"""Files that are not read are refused by name, in one line that says what to do, before anything else is done."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from foundation.errors import ModelError
from pipeline import models
from pipeline.models.onnx_reading import shaping, table
from tests.pipeline.models.onnx_files import saved


def refused(path, **settings) -> str:
    with pytest.raises(ModelError) as failure:
        models.load(f"onnx:{path}", **settings)
    assert failure.value.hint
    assert "\n" not in str(failure.value)
    return str(failure.value)


OPERATORS = [
    ("y = NonZero (x)", 13, "NonZero (node of y), which cannot be read: it gives as many elements as the data says"),
    ("y = RandomNormalLike (x)", 13, "RandomNormalLike (node of y), which cannot be read: it draws random numbers"),
    ("q, s, z = DynamicQuantizeLinear (x) y = DequantizeLinear (q, s, z)", 13, "is quantised"),
    ("y = Hardmax (x)", 13, "Hardmax (node of y), which cannot be read."),
    ("h = Relu (x) y = LSTM <hidden_size=2, layout=1> (h, w, r)", 14, "LSTM (node of y): peepholes"),
    ("y = GRU <hidden_size=2> (x, w, r)", 14, "linear_before_reset=0"),
    ('y = Resize <mode="cubic", coordinate_transformation_mode="asymmetric"> (x, , s)', 13, "mode cubic with"),
    ('y = Resize <mode="cubic", cubic_coeff_a=-0.5> (x, , s)', 13, "cubic_coeff_a is not read"),
    ('y = Resize <mode="linear", coordinate_transformation_mode="pytorch_half_pixel"> (x, , eighth)', 13,
     "of a side of 1 are not read"),
    ("n = ReduceSum <keepdims=0> (x) i = Cast <to=7> (n) m = Min (i, minus) u = Max (m, minus) y = Reshape (x, u)", 13,
     "its sizes depend on the data"),
    ("y = Relu (nothing)", 13, "reads nothing, which nothing before it gives"),
    ("h = Add (x, x)", 13, "nothing gives its output y"),
    ("y = Reshape (x, seven)", 13, "onnxruntime cannot run the file at batch 1"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "opset", "reason"), OPERATORS)
def test_what_cannot_be_read_is_named(tmp_path, body, opset, reason):
    values = {
        "s": np.asarray([1, 1, 2, 2], np.float32),
        "eighth": np.asarray([1, 1, 0.125, 1], np.float32),
        "minus": np.asarray([-1], np.int64),
        "seven": np.asarray([7, 7], np.int64),
    }
    path = saved(tmp_path, body, opset=opset, weights={"w": (1, 8, 8), "r": (1, 8, 2)}, values=values)
    assert reason in refused(path)


@pytest.mark.parametrize(
    ("domain", "body", "reason"),
    [
        ("com.microsoft", "y = com.microsoft.FusedMatMul (x, x)", "as it was before onnxruntime's optimisation"),
        ("com.microsoft", "y = com.microsoft.BiasGelu (x, b)", "onnxruntime's own operator BiasGelu"),
        ("my.company", "y = my.company.Fancy (x)", "of the domain my.company"),
    ],
)
def test_operators_of_other_domains_are_refused(tmp_path, domain, body, reason):
    assert reason in refused(saved(tmp_path, body, opset=17, weights={"b": (8,)}, domains=(domain,)))


def test_control_flow_is_refused_by_its_name(tmp_path):
    path = tmp_path / "model.onnx"
    cond = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    branch = helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "b", [], [
        helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    ])  # fmt: skip
    node = helper.make_node("If", ["c"], ["y"], name="maybe", then_branch=branch, else_branch=branch)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3]), cond],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    said = refused(path)
    assert "uses If (node maybe)" in said
    assert "control flow" in said


def test_every_reason_is_for_an_operator_that_is_not_read():
    assert not set(table.REASONS) & set(table.READINGS)


def test_a_file_that_is_none(tmp_path):
    assert "no such file" in refused(tmp_path / "none.onnx")
    path = tmp_path / "text.onnx"
    path.write_text("not a model", encoding="utf-8")
    assert "Is it a whole ONNX file" in refused(path)
    path.write_bytes(b"")
    refused(path)
    assert "no such file" in refused(tmp_path)


def test_an_onnx_file_by_its_path_alone_gets_the_form_that_is_wanted(tmp_path):
    path = saved(tmp_path, "y = Relu (x)", opset=13)
    with pytest.raises(ModelError, match=f"Give onnx:{path}"):
        models.load(str(path))


def test_an_old_opset_is_refused_with_what_converts_it(tmp_path):
    assert "version_converter" in refused(saved(tmp_path, "y = Relu (x)", opset=6))


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname", "sub/../../weights.bin"])
def test_weights_outside_the_files_folder_are_never_read(tmp_path, location):
    folder = tmp_path / "inner"
    folder.mkdir()
    (tmp_path / "weights.bin").write_bytes(np.ones(6, np.float32).tobytes())
    path = saved(folder, "y = Add (x, w)", opset=13, x=("n", 6), weights={"w": (6,)})
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    path.write_bytes(model.SerializeToString())
    assert "outside its folder" in refused(path)


def test_weights_beside_the_file_belong_to_its_fingerprint(tmp_path):
    path = saved(tmp_path, "y = Gemm (x, w)", opset=13, x=("n", 600), weights={"w": (600, 40)})
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="weights.data", size_threshold=0)
    before = models.load(f"onnx:{path}")
    assert before.fingerprint == models.load(f"onnx:{path}").fingerprint
    data = tmp_path / "weights.data"
    data.write_bytes(np.zeros(600 * 40, np.float32).tobytes())
    after = models.load(f"onnx:{path}")
    assert after.fingerprint != before.fingerprint
    assert not next(after.build().parameters()).any()
    data.write_bytes(b"short")
    assert "has fewer" in refused(path)


def test_weights_of_half_precision_are_refused(tmp_path):
    values = {"w": np.ones(6, np.float16)}
    path = saved(tmp_path, "y = Add (x, w)", opset=13, x=("n", 6), values=values, kind=10, out=10)
    assert "half precision" in refused(path)


def test_inputs_that_nothing_here_feeds_are_refused(tmp_path):
    assert "is float64" in refused(saved(tmp_path, "y = Relu (x)", opset=14, kind=TensorProto.DOUBLE, out=11))
    assert "no tensor of numbers" in refused(
        saved(tmp_path, "y = Identity (x)", opset=14, kind=TensorProto.STRING, out=8)
    )
    assert "without a batch" in refused(saved(tmp_path, "y = Relu (x)", opset=14, x=()))


def test_another_size_than_the_file_takes_is_refused_with_the_one_that_it_takes(tmp_path):
    path = saved(tmp_path, "y = Relu (x)", opset=13)
    said = refused(path, input_size=(3, 16, 16))
    assert "takes x 3x8x8, not input of shape 3x16x16" in said
    assert models.load(f"onnx:{path}", input_size=(3, 8, 8)).inputs[0].shape == (3, 8, 8)


def test_a_batch_other_than_one_cannot_be_freed(tmp_path):
    assert "fixes its batch to 4" in refused(saved(tmp_path, "y = Relu (x)", opset=13, x=(4, 3, 8, 8)))


def test_a_batch_of_one_that_is_built_into_the_graph_is_said(tmp_path):
    body = "t = Transpose <perm=[1,0]> (x) y = Reshape (t, fixed)"
    path = saved(tmp_path, body, opset=13, x=(1, 6), values={"fixed": np.asarray([6, 1], np.int64)})
    assert "fixes its batch to 1" in refused(path)


def test_a_reading_that_computes_otherwise_is_refused_with_the_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "READINGS", table.READINGS)
    monkeypatch.setitem(table.READINGS, "Relu", lambda _node, x: torch.relu(x) * 1.001)
    said = refused(saved(tmp_path, "y = Relu (x)", opset=13))
    assert "y differs from onnxruntime's by 0.001 of its scale at batch 1; 0.0001 is allowed" in said
    monkeypatch.setitem(table.READINGS, "Relu", lambda _node, x: torch.relu(x) * 1.00001)
    source = models.load(f"onnx:{saved(tmp_path, 'y = Relu (x)', opset=13)}")
    assert "1e-05 of the outputs' scale" in source.origin.note


def test_a_graph_that_makes_a_huge_tensor_is_refused_before_it_is_made(tmp_path):
    values = {"huge": np.asarray([1 << 20, 1 << 20], np.int64), "zero": np.asarray([0], np.int64)}
    body = "h = ConstantOfShape (huge) r = Slice (h, zero, zero) y = Add (x, r)"
    assert "elements" in refused(saved(tmp_path, body, opset=13, values=values))


@pytest.mark.parametrize(
    "body",
    [
        "h = Range (f0, f9, f1)",
        "h = Range (i0, i9, i1)",
        "h = Tile (ids, times)",
        "h = Expand (ids, long)",
        "h = Pad (x, pads)",
        "i = Cast <to=7> (x) h = OneHot (i, i9, pair)",
        "h = ConstantOfShape (long)",
    ],
)
def test_whatever_makes_many_elements_out_of_few_is_refused(tmp_path, monkeypatch, body):
    monkeypatch.setattr(shaping, "MOST_ELEMENTS", 10_000)
    integers = {"i0": 0, "i1": 1, "i9": 100_000, "ids": [1, 2], "times": [50_000], "long": [50_000, 2], "zero": [0]}
    values = {name: np.asarray(value, np.int64) for name, value in integers.items()}
    values |= {name: np.asarray(value, np.float32) for name, value in {"f0": 0, "f1": 1, "f9": 1e5}.items()}
    values |= {"pair": np.asarray([0, 1], np.float32), "pads": np.asarray([0] * 7 + [100_000], np.int64)}
    path = saved(
        tmp_path, f"{body} c = Cast <to=1> (h) r = ReduceSum <keepdims=0> (c) y = Add (x, r)", opset=13, values=values
    )
    assert "it makes a tensor of" in refused(path)


def test_constants_of_types_that_torch_lacks_are_refused(tmp_path):
    values = {"w": np.asarray(["a", "b"], object)}
    path = saved(tmp_path, "y = Relu (x)", opset=13)
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(values["w"], "words"))
    onnx.save(model, path)
    assert "of type string" in refused(path)


@pytest.mark.parametrize(
    "body",
    [
        "y = Gemm (x)",
        "y = Gather (x)",
        "y = Div (x, x, x)",
        "y = Conv (x)",
        "y = Relu <alpha=1> (x)",
        "y = Cast (x)",
        "y = Add ()",
    ],
)
def test_nodes_that_break_their_operators_rules_are_refused(tmp_path, body):
    assert "cannot be read" in refused(saved(tmp_path, body, opset=13))


def test_a_node_without_outputs_is_refused(tmp_path):
    path = saved(tmp_path, "h = Relu (x) y = Relu (x)", opset=13)
    model = onnx.load(path)
    del model.graph.node[0].output[:]
    onnx.save(model, path)
    assert "cannot be read" in refused(path)


@pytest.mark.parametrize("place", [b"heart", b"batch"])
def test_names_that_are_no_text_are_refused(tmp_path, place):
    path = saved(tmp_path, "heart = Relu (x) y = Relu (heart)", opset=13)
    path.write_bytes(path.read_bytes().replace(place, place[:-1] + b"\x92"))
    assert "cannot be read" in refused(path)
