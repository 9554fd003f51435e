import numpy as np
import onnx
import onnxruntime as ort
import pytest

from exporters import ExportError, describe, isa, optimize, to_onnx, to_ort_format


def run(path, x):
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"input": x})[0]


@pytest.mark.parametrize("level", ["basic", "extended", "all"])
def test_an_optimised_file_computes_the_same(exported, tiny_net, image, tmp_path, level):
    made = optimize(exported, tmp_path / "o.onnx", level=level, threads=1)
    np.testing.assert_allclose(run(made.path, image.numpy()), tiny_net(image).detach().numpy(), rtol=1e-5, atol=1e-5)
    assert run(made.path, np.zeros((5, 3, 8, 8), np.float32)).shape == (5, 5)


def test_metadata_survives_and_the_level_is_added(exported, tmp_path):
    made = optimize(exported, tmp_path / "o.onnx", level="extended", threads=1)
    assert made.summary.metadata == {
        "parent": "abc",
        "onnxruntime.level": "extended",
        "onnxruntime.version": ort.__version__,
    }
    assert made.portable


def test_a_host_tuned_file_is_not_portable_and_tagged_with_the_isa(exported, tmp_path):
    made = optimize(exported, tmp_path / "o.onnx", level="all", threads=1)
    assert not made.portable
    assert made.isa == isa()
    assert made.summary.metadata["onnxruntime.isa"] == isa()


def test_the_histograms_show_what_was_fused(exported, tmp_path):
    made = optimize(exported, tmp_path / "o.onnx", level="extended", threads=1)
    assert made.operators_before["Relu"] == 2
    assert made.operators_after["com.microsoft:FusedConv"] >= 1
    assert made.operators_after.get("Relu", 0) < 2
    assert made.operators_after == describe(made.path).operators


def test_a_basic_file_is_plain_onnx(exported, tmp_path):
    made = optimize(exported, tmp_path / "o.onnx", level="basic", threads=1)
    model = onnx.load(made.path)
    assert [entry.domain for entry in model.opset_import] == [""]
    onnx.checker.check_model(model, full_check=True)


def test_the_same_model_gives_the_same_bytes(exported, tmp_path):
    first = optimize(exported, tmp_path / "a.onnx", level="extended", threads=1).path.read_bytes()
    assert optimize(exported, tmp_path / "b.onnx", level="extended", threads=1).path.read_bytes() == first


def test_external_weights_stay_external(tiny_program, image, tiny_net, tmp_path):
    source = tmp_path / "m.onnx"
    to_onnx(tiny_program, source, example=(image,), opset=20, metadata={}, one_file_limit=100)
    made = optimize(source, tmp_path / "out" / "o.onnx", level="extended", threads=1)
    assert made.summary.external_files == ("o.onnx.data",)
    assert sorted(entry.name for entry in made.path.parent.iterdir()) == ["o.onnx", "o.onnx.data"]
    np.testing.assert_allclose(run(made.path, image.numpy()), tiny_net(image).detach().numpy(), rtol=1e-5, atol=1e-5)


def test_nothing_is_printed(exported, tmp_path, capfd):
    optimize(exported, tmp_path / "o.onnx", level="all", threads=1)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.parametrize("lacking", ["opset", "operator"])
def test_a_model_that_onnxruntime_cannot_load_is_one_line_and_leaves_nothing(exported, tmp_path, capfd, lacking):
    model = onnx.load(exported)
    if lacking == "opset":
        model.opset_import[0].version = 999
    else:
        next(node for node in model.graph.node if node.op_type == "Conv").op_type = "Convolve"
    future = tmp_path / "future.onnx"
    onnx.save(model, future)
    with pytest.raises(ExportError, match=r"cannot load future\.onnx") as caught:
        optimize(future, tmp_path / "o.onnx", level="basic", threads=1)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [future]
    assert capfd.readouterr().err == ""


def test_a_file_that_is_no_model_is_one_line(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    with pytest.raises(ExportError, match="ONNX"):
        optimize(tmp_path / "m.onnx", tmp_path / "o.onnx", level="basic", threads=1)
    with pytest.raises(ExportError, match="cannot be read"):
        optimize(tmp_path / "missing.onnx", tmp_path / "o.onnx", level="basic", threads=1)


@pytest.mark.parametrize(("level", "portable"), [("extended", True), ("all", False)])
def test_a_file_in_onnxruntimes_own_format_computes_the_same(
    exported, tiny_net, image, tmp_path, level, portable, capfd
):
    made = to_ort_format(exported, tmp_path / "m.ort", level=level, threads=1)
    assert made.portable is portable
    assert made.path.read_bytes()[4:8] == b"ORTM"
    assert made.bytes == made.path.stat().st_size
    np.testing.assert_allclose(run(made.path, image.numpy()), tiny_net(image).detach().numpy(), rtol=1e-5, atol=1e-5)
    session = ort.InferenceSession(made.path, providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map == {"parent": "abc"}
    assert capfd.readouterr().err == ""


def test_another_suffix_is_refused(exported, tmp_path):
    with pytest.raises(ExportError, match=r"does not end in \.ort"):
        to_ort_format(exported, tmp_path / "m.onnx", level="basic", threads=1)
