import numpy as np
import onnx
import pytest
from onnx import parser

from exporters import ExportError, describe


def save(text, path, **tensors):
    model = parser.parse_model(text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in tensors.items())
    onnx.save(model, path)
    return path


def test_a_summary_counts_weights_but_not_shapes_and_looks_into_subgraphs(tmp_path):
    path = save(
        """<ir_version: 9, opset_import: ["" : 18]>
        g (float[n, 4] x, bool flag) => (float[n, 2] y)
        {
            flat = Reshape (x, target)
            y = If (flag) <
                then_branch = t () => (float[n, 2] a) { a = MatMul (flat, w) },
                else_branch = e () => (float[n, 2] b) { h = MatMul (flat, w)  b = Relu (h) }
            >
        }""",
        tmp_path / "m.onnx",
        w=np.ones((4, 2), np.float32),
        target=np.array([-1, 4]),
    )
    summary = describe(path)
    assert summary.parameters == 8
    assert summary.operators == {"MatMul": 2, "If": 1, "Relu": 1, "Reshape": 1}
    assert [(spec.name, spec.dtype, spec.shape) for spec in summary.inputs] == [
        ("x", "float", ("n", 4)),
        ("flag", "bool", ()),
    ]
    assert summary.opset == 18
    assert summary.bytes == path.stat().st_size
    assert summary.external_files == ()


def test_weights_outside_the_folder_are_refused(tmp_path):
    path = save(
        """<ir_version: 9, opset_import: ["" : 18]> g (float[n, 4] x) => (float[n, 2] y) { y = MatMul (x, w) }""",
        tmp_path / "m.onnx",
        w=np.ones((4, 2), np.float32),
    )
    model = onnx.load(path)
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], "../secret")
    model.graph.initializer[0].ClearField("raw_data")
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match="outside its folder"):
        describe(path)


def test_missing_weights_are_named(tmp_path):
    path = save(
        """<ir_version: 9, opset_import: ["" : 18]> g (float[n, 4] x) => (float[n, 2] y) { y = MatMul (x, w) }""",
        tmp_path / "m.onnx",
        w=np.ones((4, 2), np.float32),
    )
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.data", size_threshold=0)
    assert describe(path).external_files == ("w.data",)
    whole = (tmp_path / "w.data").read_bytes()
    (tmp_path / "w.data").write_bytes(whole[:-1])
    with pytest.raises(ExportError, match=f"needs {len(whole)} bytes of w.data, which has {len(whole) - 1}"):
        describe(path)
    (tmp_path / "w.data").write_bytes(whole)
    (tmp_path / "w.data").unlink()
    with pytest.raises(ExportError, match=r"w\.data, which is missing"):
        describe(path)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x80\x04pickle"])
def test_what_is_no_model_is_refused(tmp_path, content):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ExportError):
        describe(tmp_path / "m.onnx")


GRAPH = """g (float[n, 4] x) => (float[n, 2] y) { y = MatMul (x, w) }"""


@pytest.mark.parametrize(
    "entries", [{}, {"location": "w.bin", "offset": "-4"}, {"location": "w.bin", "length": "many"}, {"location": ""}]
)
def test_weights_of_which_it_is_not_said_where_they_lie_are_refused(tmp_path, entries):
    path = save(f'<ir_version: 9, opset_import: ["" : 18]> {GRAPH}', tmp_path / "m.onnx", w=np.ones((4, 2), np.float32))
    model = onnx.load(path)
    (tensor,) = model.graph.initializer
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match="does not say where the weights w lie"):
        describe(path)


def test_a_model_of_foreign_operators_alone_has_no_opset(tmp_path):
    text = """<ir_version: 9, opset_import: ["com.microsoft" : 1]>
    g (float[n, 4] x) => (float[n, 4] y) { y = com.microsoft.Gelu (x) }"""
    assert describe(save(text, tmp_path / "m.onnx")).opset == 0
