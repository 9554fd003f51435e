import importlib

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from exporters import ExportError, to_onnx

# The package exports a function of the module's name, which hides the module.
module = importlib.import_module("exporters.export")


def run(path, *arrays):
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {value.name: array for value, array in zip(session.get_inputs(), arrays, strict=True)}
    return session.run(None, feed)


def export(program, path, image, **options):
    return to_onnx(program, path, **{"example": (image,), "opset": 20, "metadata": {}, **options})


class TwoInTwoOut(nn.Module):
    """Its outputs and inputs exchange names in the tests below; the second output is an input unchanged."""

    def forward(self, a, b):
        return {"sum": a + 2 * b, "same": b}


def test_exported_module_computes_the_same_at_batch_1_3_and_8(tiny_net, image, tmp_path):
    made = export(tiny_net, tmp_path / "m.onnx", image[:1])
    for batch in (1, 3, 8):
        x = torch.randn(batch, 3, 8, 8)
        (output,) = run(made.path, x.numpy())
        np.testing.assert_allclose(output, tiny_net(x).detach().numpy(), rtol=1e-5, atol=1e-5)


def test_the_dynamic_batch_of_an_exported_program_survives_under_the_name_batch(tiny_program, image, tmp_path):
    made = export(tiny_program, tmp_path / "m.onnx", image)
    assert made.summary.inputs[0].shape == ("batch", 3, 8, 8)
    assert made.summary.outputs[0].shape == ("batch", 5)
    (output,) = run(made.path, np.zeros((7, 3, 8, 8), np.float32))
    assert output.shape == (7, 5)
    values = onnx.load(made.path).graph.value_info
    symbols = {dim.dim_param for value in values for dim in value.type.tensor_type.shape.dim if dim.dim_param}
    assert symbols <= {"batch"}


def test_a_fixed_batch_is_fixed(tiny_net, image, tmp_path):
    made = export(tiny_net, tmp_path / "m.onnx", image[:1], dynamic_batch=False)
    assert made.summary.inputs[0].shape == (1, 3, 8, 8)


def test_a_program_whose_batch_is_not_as_asked_is_refused(tiny_net, tiny_program, image, tmp_path):
    fixed = torch.export.export(tiny_net, (image,))
    with pytest.raises(ExportError, match="batch of input input is fixed"):
        export(fixed, tmp_path / "m.onnx", image)
    with pytest.raises(ExportError, match="batch of input input is free"):
        export(tiny_program, tmp_path / "m.onnx", image, dynamic_batch=False)
    assert list(tmp_path.iterdir()) == []


def test_batchnorm_is_folded_into_the_convolution(tiny_program, image, tmp_path):
    operators = export(tiny_program, tmp_path / "m.onnx", image).summary.operators
    assert operators["Conv"] == 2
    assert "BatchNormalization" not in operators


def test_names_opset_and_metadata_are_in_the_file(tiny_program, image, tmp_path):
    made = export(tiny_program, tmp_path / "m.onnx", image, opset=21, metadata={"parent": "abc", "sparsity": "0.5"})
    model = onnx.load(made.path)
    assert [value.name for value in model.graph.input] == ["input"]
    assert [value.name for value in model.graph.output] == ["output"]
    assert {entry.key: entry.value for entry in model.metadata_props} == {"parent": "abc", "sparsity": "0.5"}
    assert model.opset_import[0].version == 21


def test_names_that_the_graph_already_uses_are_taken_over(tmp_path):
    a, b = torch.randn(2, 4), torch.randn(2, 4)
    made = to_onnx(
        TwoInTwoOut().eval(),
        tmp_path / "m.onnx",
        example=(a, b),
        opset=20,
        metadata={},
        input_names=("b", "a"),
        output_names=("add", "mul"),
    )
    assert [spec.name for spec in made.summary.inputs] == ["b", "a"]
    assert [spec.name for spec in made.summary.outputs] == ["add", "mul"]
    total, same = run(made.path, a.numpy(), b.numpy())
    np.testing.assert_allclose(total, (a + 2 * b).numpy(), rtol=1e-6)
    np.testing.assert_array_equal(same, b.numpy())


def test_several_outputs_are_numbered(tmp_path):
    a = torch.randn(2, 4)
    made = to_onnx(
        TwoInTwoOut().eval(), tmp_path / "m.onnx", example=(a, a), opset=20, metadata={}, input_names=("a", "b")
    )
    assert [spec.name for spec in made.summary.outputs] == ["output_0", "output_1"]


def test_a_wrong_number_of_names_is_refused(tiny_program, image, tmp_path):
    with pytest.raises(ExportError, match="has 1 inputs"):
        export(tiny_program, tmp_path / "m.onnx", image, input_names=("a", "b"))
    with pytest.raises(ExportError, match="has 1 outputs"):
        export(tiny_program, tmp_path / "m.onnx", image, output_names=())


def test_large_weights_go_beside_the_model_and_small_ones_come_back_inside(tiny_program, tiny_net, image, tmp_path):
    path = tmp_path / "m.onnx"
    inside = export(tiny_program, path, image)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.onnx"]
    outside = export(tiny_program, path, image, one_file_limit=100)
    assert outside.summary.external_files == ("m.onnx.data",)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert outside.summary.bytes == sum(entry.stat().st_size for entry in tmp_path.iterdir())
    assert outside.summary.parameters == inside.summary.parameters
    (output,) = run(path, image.numpy())
    np.testing.assert_allclose(output, tiny_net(image).detach().numpy(), rtol=1e-5, atol=1e-5)
    export(tiny_program, path, image)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.onnx"]


def test_the_same_program_gives_the_same_bytes(tiny_program, image, tmp_path):
    first = export(tiny_program, tmp_path / "a.onnx", image, metadata={"k": "v", "a": "b"}).path.read_bytes()
    assert export(tiny_program, tmp_path / "b.onnx", image, metadata={"a": "b", "k": "v"}).path.read_bytes() == first


def test_translations_are_asked_for_once_and_torch_is_left_as_it_was(tiny_program, image, tmp_path, monkeypatch):
    apis = importlib.import_module("torch.onnx._internal.exporter._registration").onnxscript_apis
    real, asked = apis.get_torchlib_ops, []
    counted = lambda: (asked.append(1), real())[1]  # noqa: E731
    monkeypatch.setattr(apis, "get_torchlib_ops", counted)
    for name in ("a.onnx", "b.onnx"):
        export(tiny_program, tmp_path / name, image)
        assert apis.get_torchlib_ops is counted
    assert len(asked) == 1
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_the_file_does_not_tell_where_the_model_was_written(tiny_net, image, tmp_path):
    content = export(tiny_net, tmp_path / "m.onnx", image).path.read_bytes()
    assert b".py" not in content
    assert b"stack_trace" not in content


def test_nothing_is_printed_and_nothing_is_logged(tmp_path, capfd, recwarn, caplog):
    # Opset 17 is below what the exporter writes natively, which it says in a log line and in a warning.
    made = export(nn.Linear(4, 2).eval(), tmp_path / "m.onnx", torch.randn(2, 4), opset=17)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert not recwarn.list
    assert not [record for record in caplog.records if record.levelname in {"WARNING", "ERROR"}]
    assert any("17" in line for line in made.warnings)


def test_an_opset_that_cannot_be_written_is_refused(tiny_net, image, tmp_path, capfd):
    with pytest.raises(ExportError, match=r"opset 7 .*18 or above"):
        export(tiny_net, tmp_path / "m.onnx", image, opset=7)
    assert capfd.readouterr().err == ""


def test_an_operator_without_translation_is_named(image, tmp_path, capfd):
    class Eigen(nn.Module):
        def forward(self, x):
            return torch.linalg.eig(x)[0].real

    with pytest.raises(ExportError, match="linalg_eig"):
        export(Eigen().eval(), tmp_path / "m.onnx", image)
    assert list(tmp_path.iterdir()) == []
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_model_that_cannot_be_captured_is_one_line_and_silent(image, tmp_path, capfd):
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match=r"torch\.export cannot capture the model: .*data-dependent") as caught:
        export(Branch().eval(), tmp_path / "m.onnx", image)
    assert "\n" not in str(caught.value)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_model_in_training_mode_is_refused(tiny_net, image, tmp_path):
    with pytest.raises(ExportError, match=r"model\.eval\(\)"):
        export(tiny_net.train(), tmp_path / "m.onnx", image)


def test_a_failed_check_leaves_the_old_file_as_it_was(tiny_program, image, tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")

    def refuse(*args, **options):
        raise onnx.checker.ValidationError("no good")

    monkeypatch.setattr(module.onnx.checker, "check_model", refuse)
    with pytest.raises(ExportError, match="no good"):
        export(tiny_program, path, image)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_bytes() == b"old"


def test_a_graph_that_contradicts_itself_does_not_pass_the_check(tiny_program, image, tmp_path, monkeypatch):
    translate = module._translate

    def broken(program, opset):
        model = translate(program, opset)
        gemm = next(node for node in model.graph if node.op_type == "Gemm")
        gemm.attributes.pop("transB")  # the weight is (5, 8); untransposed it does not fit the input
        return model

    monkeypatch.setattr(module, "_translate", broken)
    with pytest.raises(ExportError, match=r"onnx\.checker refuses"):
        export(tiny_program, tmp_path / "m.onnx", image)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(tiny_program, image, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnx_ir.save", full)
    with pytest.raises(ExportError, match="cannot be written: No space left on device"):
        export(tiny_program, tmp_path / "m.onnx", image)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_one_line(tiny_program, image, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ExportError, match="cannot be written"):
        export(tiny_program, tmp_path / "taken" / "m.onnx", image)


def test_the_report_goes_to_json_and_back(tiny_program, image, tmp_path):
    made = export(tiny_program, tmp_path / "m.onnx", image)
    assert type(made).model_validate_json(made.model_dump_json()) == made


class Unknown(nn.Module):
    """An operator that no exporter knows, or one that it does not know for these numbers."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x: torch.linalg.svd(x)[1], r"no translation of aten\.\w*svd"),
        (lambda x: torch.exp(torch.fft.rfft(x)).abs(), r"no translation of aten\.exp of complex numbers"),
    ],
)
def test_an_operator_without_a_translation_is_named_and_no_opset_promised(call, named, tmp_path):
    x = torch.randn(2, 4, 4)
    with pytest.raises(ExportError, match=named) as refused:
        to_onnx(Unknown(call).eval(), tmp_path / "m.onnx", example=(x,), opset=20, metadata={})
    assert "opset" not in str(refused.value)


def test_bfloat16_is_refused_by_its_name(tmp_path):
    model = nn.Conv2d(3, 4, 1).bfloat16().eval()
    with pytest.raises(ExportError, match=r"'weight' is in bfloat16.*float\(\)"):
        to_onnx(model, tmp_path / "m.onnx", example=(torch.randn(2, 3, 4, 4).bfloat16(),), opset=20, metadata={})
