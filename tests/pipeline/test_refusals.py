"""What is no float PyTorch module with a fixed graph: refused in one line, with a hint and the right exit code."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from sklearn.linear_model import LogisticRegression
from torch import nn

import pipeline
from benchmarks import zoo
from foundation.errors import CaptureError, LeanortError, ModelError
from pipeline.cli import main

SIZE = (3, 16, 16)


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    )


class Detector(nn.Module):
    """As detectors do: one dict per sample, as many rows as score high enough."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, x):
        found = []
        for row in self.body(x):
            kept = row[row > 0]
            if len(kept) > 3:
                kept = kept[:3]
            found.append({"boxes": kept.unsqueeze(1), "scores": kept})
        return found


def halved() -> nn.Module:
    return net().half()


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, x):
        y = self.body(x)
        if y.sum() > 0:
            return y
        return -y


class Estimator:
    """An object of another framework: it is called on data, and builds nothing."""

    def __call__(self, inputs):
        return inputs


def scripted() -> nn.Module:
    return torch.jit.script(net())


def partly_scripted() -> nn.Module:
    return nn.Sequential(torch.jit.trace(net().eval(), torch.randn(1, *SIZE)), nn.Identity())


def dynamically_quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Flatten(), nn.Linear(768, 10)), {nn.Linear})


def observed() -> nn.Module:
    model = net().eval()
    model.qconfig = torch.ao.quantization.get_default_qconfig("x86")
    return torch.ao.quantization.prepare(model)


def quantised() -> nn.Module:
    model = observed()
    model(torch.randn(2, *SIZE))
    return torch.ao.quantization.convert(model)


def written_for_quantisation() -> nn.Module:
    """Float still: the stand-ins of torch.ao quantise nothing."""

    class Adding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stub, self.body = torch.ao.quantization.QuantStub(), net()
            self.add = torch.ao.nn.quantized.FloatFunctional()

        def forward(self, x):
            y = self.body(self.stub(x))
            return self.add.add(y, y)

    return Adding()


OBJECTS = {
    "an estimator of scikit-learn": (LogisticRegression(), "A LogisticRegression is not a model"),
    "its class": (LogisticRegression, "gave a LogisticRegression"),
    "a state dict": (net().state_dict(), "OrderedDict of tensors is not a model"),
    "a dict": ({"model": "resnet50"}, "A dict is not a model"),
    "an empty mapping": (OrderedDict(), "A OrderedDict is not a model"),
    "a tensor": (torch.zeros(3), "A Tensor is not a model"),
    "an array": (np.zeros(3), "A ndarray is not a model"),
    "nothing": (None, "A NoneType is not a model"),
    "a list of modules": ([net()], "A list is not a model"),
    "another framework's model": (Estimator(), "wants inputs"),
    "a function on tensors": (nn.functional.silu, "wants input"),
}


@pytest.mark.parametrize("what", OBJECTS)
def test_what_is_not_a_model(what, tmp_path):
    given, said = OBJECTS[what]
    with pytest.raises(ModelError, match=said) as refused:
        pipeline.deploy(given, None, pipeline.Config(name="x", artifacts=tmp_path / "artifacts"))
    assert refused.value.exit_code == 2
    assert refused.value.hint
    assert "\n" not in refused.value.message
    assert not (tmp_path / "artifacts").exists()


MODELS = {
    scripted: (CaptureError, "TorchScript"),
    partly_scripted: (CaptureError, "TorchScript module .module '0'"),
    dynamically_quantised: (CaptureError, "quantised already"),
    quantised: (CaptureError, "quantised already"),
    observed: (CaptureError, "prepared for it"),
    halved: (CaptureError, "half precision"),
    Detector: (ModelError, "one dict per sample"),
    Branching: (CaptureError, "cannot capture"),
}


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_from_python_and_from_the_command_line(build, tmp_path):
    kind, said = MODELS[build]
    out = tmp_path / "artifacts"
    config = pipeline.Config(name="x", artifacts=out, data={"input_size": list(SIZE)})
    with pytest.raises(LeanortError, match=said) as refused:
        pipeline.deploy(build(), None, config)
    assert type(refused.value) is kind
    words = ["deploy", f"{Path(__file__)}:{build.__name__}", "--input-size", "3,16,16", "--out", str(out)]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == (2 if kind is ModelError else 3), done.output
    lines = done.output.splitlines()
    assert len([line for line in lines if line.startswith("error:")]) == 1
    assert lines[-1].strip().startswith("->")
    assert "Traceback" not in done.output
    assert not list(out.rglob("weights.safetensors")), "nothing was trained"


@pytest.mark.parametrize("build", [scripted, quantised, Detector, Branching], ids=lambda build: build.__name__)
def test_in_the_zoo_it_is_a_refusal_with_the_reason(build):
    line = zoo.shrink_one({"model": f"{Path(__file__)}:{build.__name__}", "input": list(SIZE)}, 0.5, 0, onnx=False)
    assert line["status"] == "refused", line
    assert line["reason"]
    if build in (Detector, Branching):
        assert "test_refusals.py" in line["reason"], "the line that cannot be captured is named"


def test_a_float_model_written_for_quantisation_is_not_refused():
    line = zoo.shrink_one(
        {"model": f"{Path(__file__)}:written_for_quantisation", "input": list(SIZE)}, 0.5, 0, onnx=False
    )
    assert line["status"] == "exact", line
