"""Where a PyTorch program and what was made from it part, with one fault planted in a known layer."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from exporters import to_onnx
from pipeline.channels import analyse, capture, shrink
from validators import Feed, ValidationError, first_unmatched, onnx_trail, torch_trail

DEPTH = 5
FEED = Feed("real, batch 2", {"input": np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)})


class Layer(nn.Module):
    """In place, as many models are written: the value before is gone once the ReLU has run."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.bn(self.conv(x))) + x


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 1)
        self.layers = nn.Sequential(*(Layer(width) for _ in range(DEPTH)))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.layers(self.stem(x)).mean((2, 3)))


def network():
    torch.manual_seed(0)
    made = Net().eval()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    return made


def trail(captured):
    return torch_trail(captured.program, FEED, inputs=["input"], outputs=["output"], state=captured.state)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The net as a program and as ONNX, its batch norms folded into the convolutions, its names all new."""
    captured = capture(network(), (torch.randn(2, 3, 8, 8),))
    path = tmp_path_factory.mktemp("made") / "m.onnx"
    to_onnx(captured.program, path, example=captured.example, opset=20, metadata={})
    return captured, path


@pytest.fixture
def exported(made, tmp_path):
    """`made`, the file to be changed at will."""
    return made[0], Path(shutil.copy(made[1], tmp_path))


def change(path, layer, by=0.5):
    model = onnx.load(path)
    node = [node for node in model.graph.node if node.op_type == "Conv"][1 + layer]
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    array = numpy_helper.to_array(weight).copy()
    array[3, 2, 1, 1] += by
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    onnx.save(model, path)
    return f"Conv {node.name}"


@pytest.mark.parametrize("layer", range(DEPTH))
def test_a_weight_changed_in_the_onnx_file_names_the_layer_on_both_sides(exported, layer, tmp_path):
    captured, path = exported
    node = change(path, layer)
    found = first_unmatched(trail(captured), onnx_trail(path, FEED), FEED, atol=1e-5, pack=tmp_path / "repro.zip")
    assert (found.reference_node, found.candidate_node) == (f"conv2d (layers.{layer}.conv)", node)
    assert found.agreed is not None
    assert found.feed == FEED.label
    assert "first differs at" in found.words
    assert f"in the reference by conv2d (layers.{layer}.conv)" in found.words
    with zipfile.ZipFile(tmp_path / "repro.zip") as pack:
        assert {"repro.py", "divergence.json", "versions.json", "reference.npz", "candidate.npz"} == set(
            pack.namelist()
        )
        pack.extractall(tmp_path / "repro")
    assert json.loads((tmp_path / "repro" / "versions.json").read_text())["torch"] == torch.__version__
    done = subprocess.run([sys.executable, "repro.py"], cwd=tmp_path / "repro", capture_output=True, text=True)
    assert found.tensor in done.stdout


def test_equal_models_have_no_first_difference_and_write_nothing(exported, tmp_path):
    captured, path = exported
    made = first_unmatched(trail(captured), onnx_trail(path, FEED), FEED, atol=1e-5, pack=tmp_path / "repro.zip")
    assert made is None
    assert not (tmp_path / "repro.zip").exists()


@pytest.mark.parametrize("layer", range(DEPTH))
def test_a_weight_changed_after_channels_were_cut_names_the_layer(layer):
    captured = capture(network(), (torch.randn(2, 3, 8, 8),))
    analysis = analyse(captured)
    removed = {cluster.name: np.arange(cluster.size) < cluster.size // 2 for cluster in analysis.clusters}
    folded = captured.fold(analysis.masks(removed))
    small = shrink(folded, analysis, removed)
    before = trail(folded)
    cut = torch_trail(small.program, FEED, inputs=["input"], outputs=["output"])
    assert len(next(iter(cut.steps.values())).value[0]) < len(next(iter(before.steps.values())).value[0])
    assert first_unmatched(before, cut, FEED, atol=1e-5, cut=True) is None
    with torch.no_grad():
        small.program.state_dict[f"layers.{layer}.conv.weight"][1, 1, 1, 1] += 0.5
    cut = torch_trail(small.program, FEED, inputs=["input"], outputs=["output"])
    found = first_unmatched(before, cut, FEED, atol=1e-5, cut=True)
    assert found.reference_node == found.candidate_node == f"conv2d (layers.{layer}.conv)"


def test_a_nan_is_a_difference_and_one_on_both_sides_is_none(exported):
    captured, path = exported
    lost = Feed("lost", {"input": np.full((2, 3, 8, 8), np.nan, np.float32)})
    before = torch_trail(captured.program, lost, inputs=["input"], outputs=["output"], state=captured.state)
    assert first_unmatched(before, onnx_trail(path, lost), lost, atol=1e-5) is None
    change(path, 2, by=np.nan)
    found = first_unmatched(trail(captured), onnx_trail(path, FEED), FEED, atol=1e-5)
    assert found.reference_node == "conv2d (layers.2.conv)"
    assert found.candidate.nan > 0
    assert found.max_abs is None


def test_what_cannot_be_run_is_one_line(exported, tmp_path):
    captured, path = exported
    wrong = Feed("wrong", {"input": np.ones((2, 4, 8, 8), np.float32)})
    with pytest.raises(ValidationError, match="node by node"):
        torch_trail(captured.program, wrong, inputs=["input"], outputs=["output"], state=captured.state)
    with pytest.raises(ValidationError, match="node by node"):
        onnx_trail(path, wrong)
