"""Data by name through the whole chain, and the bundle that comes out of it, asked without torch."""

import json
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from foundation.errors import ConfigError
from pipeline import runner
from pipeline.cli import main
from pipeline.recipe.config import Config
from tests.pipeline.data.test_texts import folder

NET = """import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = torch.nn.Linear(4, 64), torch.nn.Linear(64, 64), torch.nn.Linear(64, 1)
    def forward(self, features):
        return self.c(torch.relu(self.b(torch.relu(self.a(features)))))
"""
WITHOUT_TORCH = """import runpy, sys
for name in ("torch", "onnx", "scipy", "pipeline", "exporters"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.examples
@pytest.mark.slow
def test_a_table_goes_the_whole_way_and_its_bundle_takes_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    rows = [(draw.normal() * 5 + 20, draw.integers(0, 3)) for _ in range(300)]
    lines = [f"{size:.4f},{'rgb'[colour]},{0.3 * size + colour:.4f}" for size, colour in rows]
    (tmp_path / "prices.csv").write_text("\n".join(["size,colour,price", *lines]) + "\n")
    (tmp_path / "net.py").write_text(NET)
    settings = [  # what a tiny net costs is no matter here
        "baseline.train={epochs=80,lr=0.01,batch_size=16}",
        "finetune.epochs=4",
        "prune.ratio=0.5",
        "gate.seconds=0.3",
        "optimize.seconds=0.3",
        "baseline.seconds=0.2",
        "gate.max_latency_ratio=9",
        "gate.max_size_ratio=9",
    ]
    words = ["deploy", "net.py:Net", "--data", "csv:prices.csv", "--quiet", "--name", "net"]
    done = CliRunner().invoke(main, [*words, *(word for one in settings for word in ("--set", one))])
    assert done.exit_code == 0, done.output
    bundle = tmp_path / "artifacts" / "net" / "v0001" / "bundle"
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["inputs"][0]["name"] == "features"
    assert manifest["inputs"][0]["holds"] == "array"
    assert list(manifest["answers"].values()) == ["values"]
    assert "columns.json" in manifest["files"]
    (tmp_path / "ask.jsonl").write_text('{"row": {"size": 20, "colour": "b"}}\n{"row": {"size": 25, "colour": "r"}}\n')
    command = [sys.executable, "-B", "-c", WITHOUT_TORCH, str(bundle / "serve.py"), "ask.jsonl"]
    served = subprocess.run(command, capture_output=True, text=True)
    assert served.returncode == 0, served.stderr
    assert [json.loads(line)["values"][0] for line in served.stdout.splitlines()] == pytest.approx([8, 7.5], abs=0.4)


def test_texts_take_the_tokenizer_of_the_models_folder_or_of_the_recipe(tmp_path, monkeypatch):
    """As the runner gives it to the data, without a model being built."""
    given = []

    class Enough(Exception):  # noqa: N818
        pass

    def load(source, **options):
        given.append(options["reading"])
        raise Enough

    monkeypatch.setattr("pipeline.data.find.load", load)
    model = folder(tmp_path / "model")
    for config in (Config(), Config(data={"tokenizer": tmp_path / "other.json", "max_tokens": 9})):
        with pytest.raises(Enough):
            runner.sources(f"hf:{model}", "jsonl:d.jsonl", config)
    for name in ("hf:bert", "resnet50", "file.py:build"):
        with pytest.raises(Enough):
            runner.sources(name, "jsonl:d.jsonl", Config())
    assert [one.tokenizer for one in given] == [model, tmp_path / "other.json", None, None, None]
    assert given[1].max_tokens == 9


@pytest.mark.parametrize(
    "wrong", ["data.max_tokens=2", "data.seconds=0", "data.sample_rate=1", "data.seconds=nan", "data.max_tokens=0"]
)
def test_keys_out_of_range_are_refused(wrong, tmp_path):
    done = CliRunner().invoke(main, ["plan", "resnet50", "--set", wrong])
    assert done.exit_code == ConfigError.exit_code
