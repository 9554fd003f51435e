"""Small models, as ONNX text and as PyTorch modules, and a runner made of a function."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from validators import InputSpec


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class FunctionRunner:
    """Any function of arrays as a runner with one float input of three features."""

    threads = 1

    def __init__(self, function, name="function", outputs=("output",)):
        self.function = function
        self.name = name
        self.outputs = outputs
        self.inputs = (InputSpec(name="input", shape=("batch", 3), dtype="float32"),)
        self.calls = 0

    def infer(self, feed):
        self.calls += 1
        result = self.function(feed["input"])
        return result if isinstance(result, dict) else {self.outputs[0]: result}


@pytest.fixture
def function_runner():
    return FunctionRunner


@pytest.fixture(scope="session")
def weight():
    return np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)


@pytest.fixture
def linear_onnx(weight, tmp_path):
    """input (batch, 3) -> output (batch, 4) = input @ weight, with its weight beside it when asked."""

    def build(name="linear.onnx", weight=weight, external=False):
        model = onnx.parser.parse_model(
            """<ir_version: 9, opset_import: ["" : 18]>
            g (float[batch, 3] input) => (float[batch, 4] output) { output = MatMul (input, w) }"""
        )
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
        path = tmp_path / name
        onnx.save(model, path, save_as_external_data=external, location=f"{name}.data", size_threshold=0)
        return path

    return build


@pytest.fixture
def linear_torch(weight):
    module = nn.Linear(3, 4, bias=False).eval()
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(weight.T.copy()))
    return module
