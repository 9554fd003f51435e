"""Jobs that are no images with a class each, the whole way: what ships, by which names, and what the verdict says."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from tests.pipeline.chain import said

JOBS = """
import torch
from torch import nn

class LastStep(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(1, 32, batch_first=True), nn.Linear(32, 4)
    def forward(self, series):
        return self.head(self.rnn(series)[0][:, -1])

def waves():
    starts = torch.arange(400) * 0.37 % 6.3
    waves = [torch.sin(torch.arange(20) * 0.4 + start) for start in starts]
    return [{"series": wave[:16, None], "target": wave[16:]} for wave in waves]

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(40, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    def forward(self, input_ids, attention_mask):
        out = self.encoder(self.table(input_ids), src_key_padding_mask=attention_mask == 0)
        weight = attention_mask[..., None].float()
        return {"embedding": (out * weight).sum(1) / weight.sum(1)}

def texts():
    draw = torch.Generator().manual_seed(0)
    lengths = [6 + n % 9 for n in range(120)]
    return [{"input_ids": torch.randint(0, 40, (n,), generator=draw).tolist(), "attention_mask": [1] * n}
            for n in lengths]

def net():
    return nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
"""

SENTENCES = """
import numpy as np, torch, transformers
torch.manual_seed(0)
config = transformers.BartConfig(
    vocab_size=40, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=32, num_labels=3, dropout=0.0,
)
transformers.BartForSequenceClassification(config).save_pretrained("bart")
draw = np.random.default_rng(0)
ids = draw.integers(4, 40, (400, 10))
ids[:, 0], ids[:, -1] = config.bos_token_id, config.eos_token_id
np.savez("sentences.npz", input_ids=ids, attention_mask=np.ones_like(ids), y=ids[:, 1] % 3)
"""

PRUNING = """
from torch.nn.utils import prune
model = net()
prune.ln_structured(model[0], "weight", 0.5, 2, 0)
torch.save(model.state_dict(), "pruned.pt")
"""

QUICK = ["--name", "job", "--set", 'optimize={candidates=["portable"], seconds=0.1}', "--set", "gate.seconds=0.2",
         "--set", "baseline.seconds=0.1", "--set", "gate.max_latency_ratio=1000.0", "--set", "gate.max_size_ratio=10.0",
         "--set", "gate.max_score_lost=60.0"]  # fmt: skip


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("jobs") / "jobs.py"
    path.write_text(JOBS)
    return path


def shipped(version: Path) -> onnxruntime.InferenceSession:
    made = json.loads((version / "6-optimize" / "artifact.json").read_text())
    return onnxruntime.InferenceSession(version / "6-optimize" / made["ships"])


@pytest.mark.examples
def test_a_forecaster_is_trained_on_numbers_and_its_lstm_becomes_smaller(jobs, tmp_path):
    words = ["--set", "baseline.train={epochs=12, lr=0.01}", "--set", "finetune.epochs=2"]
    said(tmp_path, "deploy", f"{jobs}:LastStep", "--data", f"{jobs}:waves", *QUICK, *words)
    version = tmp_path / "job" / "v0001"
    verdict = json.loads((version / "verdict.json").read_text())
    assert (verdict["format"], verdict["task"], verdict["outcome"]) == (2, "regression", "pass")
    assert [one["name"] for one in verdict["scores"]] == ["R2", "RMSE"]
    assert verdict["scores"][0]["dense"] > 0.5
    assert [one.name for one in shipped(version).get_inputs()] == ["series"]
    figures = json.loads((version / "4-shrink" / "artifact.json").read_text())
    assert figures["params_after"] < 0.4 * figures["params_before"]


@pytest.mark.examples
def test_a_text_encoder_without_labels_keeps_its_weights_and_takes_any_length(jobs, tmp_path):
    text = said(tmp_path, "deploy", f"{jobs}:Tokens", "--data", f"{jobs}:texts", *QUICK,
                "--set", "finetune.recover=closed-form", "--set", "gate.min_cosine=0.5")  # fmt: skip
    assert "those that" in text
    version = tmp_path / "job" / "v0001"
    verdict = json.loads((version / "verdict.json").read_text())
    assert (verdict["task"], verdict["outcome"]) == ("distil", "pass")
    assert any("no labels" in note for note in verdict["notes"])
    session = shipped(version)
    assert {one.name: one.shape for one in session.get_inputs()} == {
        "input_ids": ["batch", "length"], "attention_mask": ["batch", "length"]
    }  # fmt: skip
    for length in (3, 29):
        feed = {"input_ids": np.ones((2, length), np.int64), "attention_mask": np.ones((2, length), np.int64)}
        (found,) = session.run(["embedding"], feed)
        assert found.shape == (2, 16)


@pytest.mark.examples
def test_a_checkpoint_that_was_pruned_elsewhere_is_shrunk_without_data(jobs, tmp_path):
    script = tmp_path / "prune.py"
    script.write_text(f"{JOBS}\n{PRUNING}")
    subprocess.run([sys.executable, script], cwd=tmp_path, check=True)
    words = ["--model", f"{jobs}:net", "--input-size", "1,12,12", *QUICK]
    said(tmp_path, "shrink", str(tmp_path / "pruned.pt"), *words)
    version = tmp_path / "job" / "v0001"
    verdict = json.loads((version / "verdict.json").read_text())
    assert verdict["outcome"] == "pass"
    assert any("no data was given" in note for note in verdict["notes"])
    assert any("were zero already" in note for note in verdict["notes"])
    figures = json.loads((version / "4-shrink" / "artifact.json").read_text())
    assert figures["params_after"] < figures["params_before"]
    whole = tmp_path / "whole.pt"
    script.write_text(JOBS + f"\ntorch.save(net().state_dict(), {str(whole)!r})\n")
    subprocess.run([sys.executable, script], cwd=tmp_path, check=True)
    assert "holds no zeros" in said(tmp_path, "shrink", str(whole), *words, code=2)


@pytest.mark.examples
def test_a_classifier_that_looks_for_the_end_of_a_sentence_is_fed_sentences_that_have_one(tmp_path):
    subprocess.run([sys.executable, "-c", SENTENCES], cwd=tmp_path, check=True)
    words = ["--set", "baseline.train={epochs=25, lr=0.003}", "--set", "finetune.recover=closed-form"]
    said(tmp_path, "deploy", f"hf:{tmp_path / 'bart'}", "--data", f"npz:{tmp_path / 'sentences.npz'}", *QUICK, *words,
         "--set", "baseline.weights=train")  # fmt: skip
    version = tmp_path / "job" / "v0001"
    verdict = json.loads((version / "verdict.json").read_text())
    assert verdict["outcome"] == "pass", verdict["reasons"]
    figures = json.loads((version / "4-shrink" / "artifact.json").read_text())
    assert figures["params_after"] < 0.8 * figures["params_before"]
