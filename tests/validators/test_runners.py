import shutil

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from validators import OrtRunner, TorchRunner, ValidationError
from validators.runners import InputSpec, same_inputs


def test_both_runners_give_named_outputs(linear_onnx, linear_torch, weight):
    x = np.eye(3, dtype=np.float32)[1:]  # picks two rows of the weight, which no rounding can change
    for runner in (
        OrtRunner(linear_onnx(), threads=1),
        OrtRunner(linear_onnx(), threads=2, optimize=False),
        TorchRunner(linear_torch, example=(torch.zeros(1, 3),), threads=1),
    ):
        outputs = runner.infer({"input": x})
        assert list(outputs) == ["output"]
        np.testing.assert_array_equal(outputs["output"], weight[1:])


def test_onnx_inputs_are_described_with_their_dynamic_dimensions_and_numpy_types(tmp_path):
    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 18]>
        g (int64[batch, length] ids, float16[batch, 2] x, bool[1] mask, double[?] free) => (int64[batch, length] y)
        { y = Identity (ids) }"""
    )
    onnx.save(model, tmp_path / "m.onnx")
    specs = OrtRunner(tmp_path / "m.onnx", threads=1).inputs
    assert [(spec.name, spec.shape, spec.dtype) for spec in specs] == [
        ("ids", ("batch", "length"), "int64"),
        ("x", ("batch", 2), "float16"),
        ("mask", (1,), "bool"),
        ("free", ("dim_0",), "float64"),
    ]


def test_an_exported_program_runs_at_batch_1_although_its_example_had_2(linear_torch, weight):
    example = (torch.zeros(2, 3),)
    program = torch.export.export(linear_torch, example, dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    runner = TorchRunner(program, example=example, threads=1)
    assert runner.inputs[0].shape == ("batch", 3)
    assert runner.inputs[0].dtype == "float32"
    for batch in (1, 3, 8):
        assert runner.infer({"input": np.ones((batch, 3), np.float32)})["output"].shape == (batch, 4)


def test_nested_outputs_are_flattened_and_counted():
    class Nested(nn.Module):
        def forward(self, x):
            return {"a": x, "b": (x + 1, [x + 2])}

    x = np.zeros((1, 3), np.float32)
    example = (torch.zeros(1, 3),)
    runner = TorchRunner(Nested().eval(), example=example, threads=1, output_names=("p", "q", "r"))
    assert [float(value.max()) for value in runner.infer({"input": x}).values()] == [0, 1, 2]
    with pytest.raises(ValidationError, match="has 3 outputs"):
        TorchRunner(Nested().eval(), example=example, threads=1).infer({"input": x})


def test_the_process_keeps_its_own_number_of_threads():
    seen = []

    class Look(nn.Module):
        def forward(self, x):
            seen.append(torch.get_num_threads())
            return x

    runner = TorchRunner(Look().eval(), example=(torch.zeros(1, 3),), threads=2)
    runner.infer({"input": np.zeros((1, 3), np.float32)})
    assert seen == [2]
    assert torch.get_num_threads() == 1
    assert runner.threads == 2


def test_a_read_only_array_is_fed_without_a_warning(linear_torch, recwarn):
    x = np.zeros((1, 3), np.float32)
    x.setflags(write=False)
    TorchRunner(linear_torch, example=(torch.zeros(1, 3),), threads=1).infer({"input": x})
    assert [str(one.message) for one in recwarn] == []


def test_what_does_not_fit_is_one_line(linear_onnx, linear_torch, tmp_path, capfd):
    runners = OrtRunner(linear_onnx(), threads=1), TorchRunner(linear_torch, example=(torch.zeros(1, 3),), threads=1)
    for runner in runners:
        with pytest.raises(ValidationError, match="takes input; the feed holds x"):
            runner.infer({"x": np.zeros((1, 3), np.float32)})
        with pytest.raises(ValidationError, match="cannot run") as caught:
            runner.infer({"input": np.zeros((1, 5), np.float32)})
        assert "\n" not in str(caught.value)
        assert "5" in str(caught.value)  # what it got, which onnxruntime says on its second line
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(ValidationError, match=r"cannot load .*bad\.onnx"):
        OrtRunner(tmp_path / "bad.onnx", threads=1)
    with pytest.raises(ValidationError, match="training mode"):
        TorchRunner(linear_torch.train(), example=(torch.zeros(1, 3),), threads=1)
    with pytest.raises(ValidationError, match="2 example tensors for 1 input names"):
        TorchRunner(linear_torch.eval(), example=(torch.zeros(1), torch.zeros(1)), threads=1)


def test_a_runner_is_opened_anew_as_it_is(linear_onnx, tmp_path):
    """Of its own class and with its own settings, in another session of the same file."""

    class Doubled(OrtRunner):
        factor = 1

        def infer(self, feed):
            return {name: self.factor * value for name, value in super().infer(feed).items()}

    runner = Doubled(shutil.copy(linear_onnx(), tmp_path / "copy.onnx"), threads=1, name="twice", optimize=False)
    runner.factor = 2
    again = runner.reopened()
    assert type(again) is Doubled and (again.name, again.threads, again.inputs) == ("twice", 1, runner.inputs)
    assert again._session is not runner._session
    feed = {"input": np.ones((1, 3), np.float32)}
    np.testing.assert_array_equal(again.infer(feed)["output"], runner.infer(feed)["output"])
    runner.path.unlink()
    with pytest.raises(ValidationError, match="cannot load"):
        again.reopened()


def test_two_models_take_the_same_inputs_where_a_feed_of_one_fits_the_other():
    def spec(*shape, name="x", dtype="float32"):
        return (InputSpec(name=name, shape=shape, dtype=dtype),)

    assert same_inputs(spec("batch", 3, 8), spec("n", 3, "length"))
    for other in (spec("n", 3, 9), spec("n", 3), spec("n", 3, 8, name="y"), spec("n", 3, 8, dtype="int64"), ()):
        assert not same_inputs(spec("n", 3, 8), other)
        assert not same_inputs(other, spec("n", 3, 8))
