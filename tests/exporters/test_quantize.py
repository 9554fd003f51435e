import importlib
import logging

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from exporters import ExportError, calibrate, quantize

# The package exports a function of the module's name, which hides the module.
module = importlib.import_module("exporters.quantize")


@pytest.fixture
def batches():
    rng = np.random.default_rng(0)
    return [{"input": rng.standard_normal((4, 3, 8, 8)).astype(np.float32)} for _ in range(3)]


def run(path, x):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, {"input": x})[0]


def integer_weights(path):
    tensors = onnx.load(path).graph.initializer
    return [onnx.numpy_helper.to_array(t) for t in tensors if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]


@pytest.mark.parametrize("calibration", ["minmax", "entropy", "percentile"])
def test_a_quantised_model_is_close_to_the_float_one(exported, batches, tmp_path, calibration):
    made = quantize(exported, tmp_path / "q.onnx", batches=batches, calibration=calibration)
    x = batches[0]["input"]
    wanted, found = run(exported, x), run(made.path, x)
    assert 0 < np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()
    assert made.batches == 3
    assert len(integer_weights(made.path)) == 3


def test_quantising_leaves_the_ranges_as_they_were_found(exported, batches, tmp_path):
    """onnxruntime's quantiser gives the input of a Relu the range of its output, in the table that it was given."""
    ranges = calibrate(exported, batches=batches)
    before = {name: data.range_value for name, data in ranges.tensors.items()}
    made = quantize(exported, tmp_path / "q.onnx", batches=ranges)
    assert {name: data.range_value for name, data in ranges.tensors.items()} == before
    direct = quantize(exported, tmp_path / "direct.onnx", batches=batches)
    assert made.path.read_bytes() == direct.path.read_bytes()
    assert (made.batches, made.calibration) == (direct.batches, direct.calibration) == (3, "minmax")


def test_reduced_range_keeps_the_weights_to_seven_bits(exported, batches, tmp_path):
    reduced = quantize(exported, tmp_path / "r.onnx", batches=batches, reduce_range=True)
    full = quantize(exported, tmp_path / "f.onnx", batches=batches, reduce_range=False)
    assert max(np.abs(w.astype(int)).max() for w in integer_weights(reduced.path)) == 64
    assert max(np.abs(w.astype(int)).max() for w in integer_weights(full.path)) == 127
    assert (reduced.reduce_range, full.reduce_range) == (True, False)


def test_weights_are_scaled_per_channel(exported, batches, tmp_path):
    made = quantize(exported, tmp_path / "q.onnx", batches=batches)
    for weight in integer_weights(made.path):
        if weight.ndim == 4:
            per_channel = np.abs(weight.astype(int)).reshape(len(weight), -1).max(1)
            assert len(set(per_channel.tolist())) == 1


def test_metadata_survives(exported, batches, tmp_path):
    made = quantize(exported, tmp_path / "q.onnx", batches=batches)
    assert made.summary.metadata == {"parent": "abc", "quantization": "int8 qdq, minmax"}


def test_excluded_nodes_and_other_operators_stay_float(exported, batches, tmp_path):
    nodes = onnx.load(exported).graph.node
    first = next(node.name for node in nodes if node.op_type == "Conv")
    assert len(integer_weights(quantize(exported, tmp_path / "a.onnx", batches=batches, exclude=[first]).path)) == 2
    assert len(integer_weights(quantize(exported, tmp_path / "b.onnx", batches=batches, operators=["Gemm"]).path)) == 1


def input_scale(path):
    model = onnx.load(path)
    name = next(
        node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear" and "input" in node.input
    )
    return float(onnx.numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name)))


def test_percentile_calibration_leaves_an_outlier_out_and_minmax_does_not(exported, tmp_path):
    x = np.random.default_rng(0).standard_normal((2048, 3, 8, 8)).astype(np.float32)  # 393,216 values
    x[7, 0, 0, 0] = 1000
    minmax, percentile = (
        quantize(exported, tmp_path / f"{name}.onnx", batches=[{"input": x}], calibration=name)
        for name in ("minmax", "percentile")
    )
    assert input_scale(minmax.path) == pytest.approx(1005 / 255, rel=0.01)
    assert input_scale(percentile.path) < 0.1


def test_entropy_calibration_finds_a_range_of_its_own(exported, tmp_path):
    """Between the two: an outlier does not stretch it over everything, and the bulk is not cut off."""
    x = np.random.default_rng(0).standard_normal((2048, 3, 8, 8)).astype(np.float32)
    x[7, 0, 0, 0] = 40
    minmax, entropy = (
        quantize(exported, tmp_path / f"{name}.onnx", batches=[{"input": x}], calibration=name)
        for name in ("minmax", "entropy")
    )
    assert input_scale(minmax.path) == pytest.approx(45 / 255, rel=0.03)
    assert 2 * 2.5 / 255 < input_scale(entropy.path) < 2 * 8 / 255


@pytest.mark.parametrize("calibration", ["minmax", "entropy", "percentile"])
def test_what_leaves_the_model_is_not_rounded(exported, batches, tmp_path, calibration):
    """Rounded logits tie where the float ones are close; the answers take more values than 8 bits hold."""
    made = quantize(exported, tmp_path / "q.onnx", batches=batches, calibration=calibration)
    x = np.random.default_rng(1).standard_normal((512, 3, 8, 8)).astype(np.float32)
    found = run(made.path, x)
    assert found.shape == (512, run(exported, x).shape[1])
    assert len(np.unique(found)) > 256
    model = onnx.load(made.path)
    assert [value.name for value in model.graph.output] == [value.name for value in onnx.load(exported).graph.output]
    onnx.checker.check_model(model)


@pytest.mark.parametrize(("operator", "opset"), [("Relu", 21), ("Swish", 24)])
def test_older_runtimes_can_load_it_unless_an_operator_is_newer(tmp_path, batches, operator, opset):
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 24]>
        g (float[n, 3, 8, 8] input) => (float[n, 8, 8, 8] output) {{
            first = Conv <pads = [1, 1, 1, 1]> (input, w)
            output = {operator} (first)
        }}"""
    )
    weight = np.random.default_rng(0).standard_normal((8, 3, 3, 3)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(model, tmp_path / "m.onnx")
    made = quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", batches=batches)
    assert made.summary.opset == opset
    assert [value.name for value in onnx.load(made.path).graph.output] == ["output"]
    x = batches[0]["input"]
    wanted = run(tmp_path / "m.onnx", x)
    assert np.abs(run(made.path, x) - wanted).max() < 0.1 * np.abs(wanted).max()


def test_an_output_that_goes_on_into_the_model_keeps_its_integers(tmp_path, batches):
    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 18]>
        g (float[n, 3, 8, 8] input) => (float[n, 8, 8, 8] early, float[n, 8, 8, 8] late) {
            early = Conv <pads = [1, 1, 1, 1]> (input, first)
            late = Conv <pads = [1, 1, 1, 1]> (early, second)
        }"""
    )
    rng = np.random.default_rng(0)
    for name, channels in (("first", 3), ("second", 8)):
        weight = rng.standard_normal((8, channels, 3, 3)).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    onnx.save(model, tmp_path / "two.onnx")
    made = quantize(tmp_path / "two.onnx", tmp_path / "q.onnx", batches=batches)
    makers = {name: node.op_type for node in onnx.load(made.path).graph.node for name in node.output}
    assert (makers["early"], makers["late"]) == ("DequantizeLinear", "Conv")
    assert len(integer_weights(made.path)) == 2


def test_a_bias_of_several_nodes_gets_a_copy_under_no_name_that_is_taken(tmp_path, batches):
    """onnxruntime numbers it after other weights alone, `b0` here, which is what the first node computes."""
    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 18]>
        g (float[n, 3, 8, 8] input) => (float[n, 8, 8, 8] output) {
            b0 = Conv <pads = [1, 1, 1, 1]> (input, first, b)
            b_copy_1 = Conv <pads = [1, 1, 1, 1]> (b0, second, b)
            output = Conv <pads = [1, 1, 1, 1]> (b_copy_1, second, b)
        }"""
    )
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
    rng = np.random.default_rng(0)
    for name, shape in (("first", (8, 3, 3, 3)), ("second", (8, 8, 3, 3)), ("b", (8,))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape).astype("f4"), name))
    onnx.save(model, tmp_path / "two.onnx")
    made = quantize(tmp_path / "two.onnx", tmp_path / "q.onnx", batches=batches)
    x = batches[0]["input"]
    wanted = run(tmp_path / "two.onnx", x)
    assert np.abs(run(made.path, x) - wanted).max() < 0.1 * np.abs(wanted).max()


def test_what_the_tool_has_to_say_is_returned(exported, batches, tmp_path, capfd, monkeypatch):
    tool = module.create_calibrator

    def talk(*arguments, **options):
        logging.warning("mind the gap")
        return tool(*arguments, **options)

    monkeypatch.setattr(module, "create_calibrator", talk)
    assert "mind the gap" in quantize(exported, tmp_path / "q.onnx", batches=batches).warnings
    assert capfd.readouterr().err == ""


def test_an_opset_without_scales_per_channel_is_refused(exported, batches, tmp_path):
    model = onnx.load(exported)
    model.opset_import[0].version = 12
    onnx.save(model, tmp_path / "old.onnx")
    with pytest.raises(ExportError, match="has opset 12; int8 per channel needs 13"):
        quantize(tmp_path / "old.onnx", tmp_path / "q.onnx", batches=batches)


def test_nothing_is_printed_and_logging_is_left_alone(exported, batches, tmp_path, capfd):
    before = logging.root.handlers[:]
    quantize(exported, tmp_path / "q.onnx", batches=batches)
    assert logging.root.handlers == before
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": []}, "no calibration batches"),
        ({"batches": [{"input": np.full((1, 3, 8, 8), np.nan, np.float32)}]}, "batch 0 holds NaN"),
        ({"batches": [{"input": np.zeros((1, 4, 8, 8), np.float32)}]}, r"shape \(1, 4, 8, 8\) for input, which takes"),
        ({"exclude": ["nobody"]}, "no node nobody"),
        ({"operators": ["LSTM"]}, "Nothing in m.onnx can be quantised"),
    ],
)
def test_what_cannot_be_quantised_is_one_line_and_leaves_nothing(exported, batches, tmp_path, options, message):
    with pytest.raises(ExportError, match=message) as caught:
        quantize(exported, tmp_path / "q.onnx", **{"batches": batches, **options})
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
