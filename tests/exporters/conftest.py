"""Two small networks that the exporter tests share."""

import pytest
import torch
from torch import nn

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
