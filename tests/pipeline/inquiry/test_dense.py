"""Questions that are asked before a deploy are asked about the weights that it would prune."""

import pytest
import torch

from pipeline import models
from pipeline.artifacts.eager import Baseline
from pipeline.inquiry.dense import dense_model
from pipeline.recipe.source import BaselineSection
from pipeline.runner import Step

STEPS = (Step(stage=Baseline.STAGE, action="run", reason=""),)
BUILD = """import torch
def build():
    net = torch.nn.Linear(4, 2)
    {filled}
    return net
"""


def test_the_weights_in_a_folder_of_transformers_are_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    bert = transformers.BertModel(config)
    bert.save_pretrained(tmp_path / "net")
    source = models.load(f"hf:{tmp_path / 'net'}")
    model, origin = dense_model(BaselineSection(), source, tmp_path, STEPS)
    assert origin == source.spec
    wanted = bert.state_dict()
    assert all(torch.equal(value, wanted[name.removeprefix("net.")]) for name, value in model.state_dict().items())
    assert dense_model(BaselineSection(weights="train"), source, tmp_path, STEPS)[1] == ""


@pytest.mark.parametrize(
    ("filled", "origin"),
    [("net.weight.data = torch.arange(8.0).view(2, 4); net.bias.data[:] = 0", "as given"), ("", "")],
)
def test_own_code_that_fills_its_weights_is_taken_at_its_word(tmp_path, filled, origin):
    (tmp_path / "net.py").write_text(BUILD.format(filled=filled))
    source = models.load(f"{tmp_path / 'net.py'}:build", input_size=(4,))
    assert dense_model(BaselineSection(), source, tmp_path, STEPS)[1] == origin
