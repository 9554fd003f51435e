import numpy as np
import onnx
import onnxruntime as ort
import pytest

from exporters import ExportError, guilty_optimizers, optimize, session_config
from exporters.guilty import OPTIMIZERS


def broken_by_fusing(path):
    """((x · 1e-20) * w) · 1e20 / 1e20 with w near 1e20: right as it is, infinite once the Mul is in the Conv."""
    made = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 18]>
        g (float[n, 2, 4, 4] input) => (float[n, 3, 4, 4] output)
        {
            small = Mul (input, tiny)
            conv = Conv (small, w)
            scaled = Mul (conv, huge)
            output = Div (scaled, again)
        }"""
    )
    rng = np.random.default_rng(0)
    values = {
        "tiny": np.float32(1e-20),
        "w": (1e20 * rng.uniform(0.5, 1.5, (3, 2, 1, 1))).astype(np.float32),
        "huge": np.full((1, 3, 1, 1), 1e20, np.float32),
        "again": np.float32(1e20),
    }
    made.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in values.items())
    onnx.save(made, path)
    x = rng.standard_normal((2, 2, 4, 4)).astype(np.float32)
    return path, x, np.einsum("oi,nihw->nohw", values["w"][:, :, 0, 0] / np.float32(1e20), x)


def run(path, x, disabled=()):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    for key, value in session_config(disabled).items():
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, {"input": x})[0]


@pytest.fixture
def broken(tmp_path):
    return broken_by_fusing(tmp_path / "broken.onnx")


def test_the_optimiser_that_breaks_a_model_is_named(broken):
    path, x, wanted = broken
    assert not np.isfinite(run(path, x)).all()  # onnxruntime does break it
    asked = []

    def holds(disabled):
        asked.append(disabled)
        return bool(np.allclose(run(path, x, disabled), wanted, atol=1e-4))

    assert guilty_optimizers(holds) == ("ConvMulFusion",)
    assert asked[0] == OPTIMIZERS


@pytest.mark.parametrize("level", ["basic", "extended", "all"])
def test_a_file_made_without_it_is_right(broken, tmp_path, level):
    path, x, wanted = broken
    bad = optimize(path, tmp_path / "bad.onnx", level=level, threads=1)
    assert not np.isfinite(run(bad.path, x)).all()
    good = optimize(path, tmp_path / "good.onnx", level=level, threads=1, disabled=("ConvMulFusion",))
    np.testing.assert_allclose(run(good.path, x, ("ConvMulFusion",)), wanted, atol=1e-4)


def test_two_that_are_guilty_together_are_found_and_none_is_blamed_for_a_model_that_is_broken_anyway():
    assert guilty_optimizers(lambda off: {"b", "d"} <= set(off), "abcde") == ("b", "d")
    assert guilty_optimizers(lambda off: "c" in off, "abcde") == ("c",)
    assert guilty_optimizers(lambda off: False, "abcde") is None


def test_an_unreadable_model_is_one_line(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(ExportError, match="ONNX"):
        optimize(tmp_path / "m.onnx", tmp_path / "o.onnx", level="basic", threads=1, disabled=("ConvMulFusion",))
