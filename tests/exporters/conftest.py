"""A small network that the exporter tests share, and what the tests of the forms ask of a program."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim, export

from exporters import to_onnx


class TinyNet(nn.Module):
    """Two Conv-BatchNorm-ReLU blocks, a residual and a classifier: (N, 3, 8, 8) -> (N, 5)."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = (self.bn2(self.conv2(x)) + x).relu()
        return self.head(x.mean((2, 3)))


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def build_tiny_net():
    torch.manual_seed(0)
    net = TinyNet()
    with torch.no_grad():
        for bn in (net.bn1, net.bn2):  # statistics unlike the defaults, so that a wrong folding shows
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 2)
            bn.weight.normal_()
            bn.bias.normal_()
    return net.eval()


@pytest.fixture
def tiny_net():
    return build_tiny_net()


@pytest.fixture(scope="session")
def image():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def tiny_program(image):
    return torch.export.export(build_tiny_net(), (image,), dynamic_shapes=({0: torch.export.Dim("n")},))


@pytest.fixture(scope="session")
def exported(tiny_program, image, tmp_path_factory):
    """The small network as an ONNX file, with one entry of metadata."""
    path = tmp_path_factory.mktemp("exported") / "m.onnx"
    to_onnx(tiny_program, path, example=(image,), opset=20, metadata={"parent": "abc"})
    return path


def program(net, *inputs):
    torch.manual_seed(0)
    return export(net.eval(), inputs, dynamic_shapes=tuple({0: Dim.DYNAMIC} for _ in inputs))


@pytest.fixture(scope="session")
def program_of():
    """A net's program, its batch free."""
    return program


def check(program, path, *batches, opset=18):
    """onnxruntime gives the same for other batches, each a list of inputs; the program is exported once."""
    assert batches
    names = [str(name) for name in program.graph_signature.user_inputs]
    to_onnx(program, path, example=(), opset=opset, metadata={}, input_names=names)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for inputs in batches:
        want = program.module()(*inputs).detach().numpy()
        got = session.run(None, dict(zip(names, [x.numpy() for x in inputs], strict=True)))[0]
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.fixture(scope="session", name="check")
def _check():
    return check
