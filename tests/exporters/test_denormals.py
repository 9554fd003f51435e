import numpy as np
import onnx
import pytest

from exporters import ExportError, count_denormals, flush_denormals


@pytest.fixture
def model(tmp_path):
    made = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 18]>
        g (float[n, 2] x) => (float[n, 2] y) { a = Mul (x, w)  y = Add (a, b) }"""
    )
    w = np.array([1e-40, 1.0], np.float32)
    b = np.array([0.0, -3e-39], np.float32)
    made.graph.initializer.extend([onnx.numpy_helper.from_array(w, "w"), onnx.numpy_helper.from_array(b, "b")])
    onnx.save(made, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def weights(path):
    return {t.name: onnx.numpy_helper.to_array(t).tolist() for t in onnx.load(path).graph.initializer}


def test_denormals_are_counted_per_tensor_and_zeros_are_none(model):
    found = count_denormals(model)
    assert found.tensors == {"w": 1, "b": 1}
    assert (found.count, found.elements) == (2, 4)


def test_flushing_sets_them_to_zero_and_nothing_else(model, tmp_path):
    assert flush_denormals(model, tmp_path / "f.onnx").count == 2
    assert weights(tmp_path / "f.onnx") == {"w": [0.0, 1.0], "b": [0.0, 0.0]}
    assert not count_denormals(tmp_path / "f.onnx").count


def test_flushing_can_be_limited_to_some_tensors(model, tmp_path):
    assert flush_denormals(model, tmp_path / "f.onnx", only=frozenset({"w"})).count == 1
    assert count_denormals(tmp_path / "f.onnx").tensors == {"b": 1}
    with pytest.raises(ExportError, match="no denormals in z"):
        flush_denormals(model, tmp_path / "g.onnx", only=frozenset({"z"}))
    assert not (tmp_path / "g.onnx").exists()
