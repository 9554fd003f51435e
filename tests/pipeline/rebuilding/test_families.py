"""The smaller model of whole families of models, in the hands of somebody who knows nothing of how it was made.

Each is deployed without data, saved, and then lives on in a process of its own: exported by torch's own exporter, which
gives what ships; copied, subclassed, trained by a few plain steps, saved and loaded.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import pipeline

ROOT = Path(__file__).resolve().parents[3]
QUICK = {
    "data": {"source": "none"},
    "finetune": {"recover": "none"},
    "baseline": {"seconds": 0.1, "weights": "auto"},
    "gate": {"seconds": 0.2},
    "optimize": {"candidates": ["portable"], "seconds": 0.1},
}
SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "num_labels": 3,
    "vocab_size": 100, "max_position_embeddings": 32,
}  # fmt: skip
BUILT = {
    "ResNet": (
        "torchvision", "from torchvision.models import resnet\n\ndef build():\n"
        "    return resnet.ResNet(resnet.Bottleneck, [1, 2, 1, 1])\n",
    ),
    "VisionTransformer": (
        "timm", "import timm\n\ndef build():\n"
        "    return timm.create_model('deit_tiny_patch16_224', img_size=64, depth=4)\n",
    ),
    "DetectionModel": (
        "ultralytics", "from ultralytics.nn.tasks import DetectionModel\n\ndef build():\n"
        "    return DetectionModel('yolov8n.yaml', nc=2, verbose=False)\n",
    ),
}  # fmt: skip
"""Class -> the library that it is from, and a file of a user's that builds it, so that random weights will do."""

# What somebody does with it: everything here but load_smaller and save_smaller is torch's.
HANDS = """
import copy
import sys

import numpy as np
import onnxruntime
import torch

import pipeline

folder, shipped, inputs, scratch = sys.argv[1:]
torch.set_num_threads(1)
torch.manual_seed(0)
small = pipeline.load_smaller(folder)
given = {name: torch.from_numpy(value) for name, value in np.load(inputs).items()}
args, kwargs = (tuple(given.values()), {}) if "x" in given else ((), given)


def first(module):
    out = module(*args, **kwargs)
    return out if isinstance(out, torch.Tensor) else next(iter(out.values() if isinstance(out, dict) else out))


torch.onnx.export(copy.deepcopy(small), args, scratch + "/mine.onnx", kwargs=kwargs, dynamo=True, verbose=False)
sessions = [onnxruntime.InferenceSession(path) for path in (scratch + "/mine.onnx", shipped)]
mine, theirs = (
    one.run(None, dict(zip([put.name for put in one.get_inputs()], [v.numpy() for v in given.values()])))
    for one in sessions
)
scale = max(1.0, float(np.abs(theirs[0]).max()))
worst = float(np.abs(mine[0] - theirs[0]).max())
assert mine[0].shape == theirs[0].shape and worst <= 1e-4 * scale, (worst, scale)


class Mine(type(small)):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


before = first(small).detach()
twin = copy.deepcopy(small)
twin.__class__ = Mine
assert torch.equal(first(twin), before)

optimizer = torch.optim.SGD(small.parameters(), 1e-3, momentum=0.9)
small.train()
for _ in range(3):
    optimizer.zero_grad()
    loss = first(small).square().mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(small.parameters(), 1.0)
    optimizer.step()
small.eval()
after = first(small).detach()
assert torch.isfinite(after).all() and not torch.equal(after, before)
assert torch.equal(first(twin), before)

torch.save(small.state_dict(), scratch + "/state.pt")
twin.load_state_dict(torch.load(scratch + "/state.pt", weights_only=True))
assert torch.equal(first(twin), after)
pipeline.save_smaller(small, scratch + "/again")
again = pipeline.load_smaller(scratch + "/again")
assert type(again) is type(small) and torch.equal(first(again), after)
print(type(small).__name__, sum(p.numel() for p in small.parameters()), worst, scale)
"""


def bert(folder: Path) -> str:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, architectures=["BertForSequenceClassification"])
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "bert")
    return f"hf:{folder / 'bert'}"


def built(kind: str, folder: Path) -> str:
    library, text = BUILT[kind]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    (folder / "mine.py").write_text(text)
    return f"{folder / 'mine.py'}:build"


def deployed(folder: Path, spec: str, **sections: object) -> pipeline.Release:
    config = pipeline.Config.model_validate({**QUICK, "artifacts": folder / "a", "name": "one", **sections})
    release = pipeline.deploy(spec, None, config, promote=False)
    assert release is not None
    return release


SIZE = {
    "ResNet": (3, 32, 32),
    "VisionTransformer": (3, 64, 64),
    "BertForSequenceClassification": (),
    "UNet": (1, 32, 32),
    "DetectionModel": (3, 64, 64),
}


def spec_of(kind: str, folder: Path) -> str:
    if kind == "UNet":
        return f"{ROOT / 'examples' / 'segmentation.py'}:model"
    return bert(folder) if kind.startswith("Bert") else built(kind, folder)


@pytest.mark.examples
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", SIZE)
def test_the_smaller_model_lives_on_in_a_process_of_its_own(kind: str, tmp_path: Path) -> None:
    size = SIZE[kind]
    data = {"source": "none", **({"input_size": list(size)} if size else {})}
    task = {"output": "output_0", "keep_outputs": False} if kind == "DetectionModel" else {}
    release = deployed(tmp_path, spec_of(kind, tmp_path), data=data, task=task)
    small = pipeline.smaller(release)
    assert type(small).__name__ == kind
    assert small.leanort_structure.original, small.leanort_structure.why
    after = release[pipeline.Shrunk].params_after
    assert sum(p.numel() for p in small.parameters()) <= 1.02 * after
    pipeline.save_smaller(small, tmp_path / "small")
    texts = {"input_ids": np.arange(32).reshape(2, 16), "attention_mask": np.ones((2, 16), np.int64)}
    given = {"x": torch.randn(2, *size).numpy()} if size else texts
    np.savez(tmp_path / "inputs.npz", **given)
    (tmp_path / "hands.py").write_text(HANDS)
    (tmp_path / "scratch").mkdir()
    shipped = release.folder / "5-export" / "model.onnx"
    words = [tmp_path / "hands.py", tmp_path / "small", shipped, tmp_path / "inputs.npz", tmp_path / "scratch"]
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-4] == kind


@pytest.mark.examples
@pytest.mark.timeout(900)
def test_a_transformers_folder_of_which_only_neurons_went_is_read_by_transformers_itself(tmp_path: Path) -> None:
    prune = {"scope": "layer", "groups": {"heads": False}, "overrides": {"net.bert.pooler.dense": 0.0}}
    release = deployed(tmp_path, bert(tmp_path), prune=prune)
    small = pipeline.smaller(release)
    assert small.bert.encoder.layer[0].attention.self.query.weight.shape == (64, 64)  # heads were to stay
    pipeline.save_smaller(small, tmp_path / "small")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "small").eval()
    assert type(theirs) is type(small)
    assert theirs.config.intermediate_size == 64
    ids = torch.arange(32).reshape(2, 16)
    torch.testing.assert_close(theirs(input_ids=ids).logits, small(input_ids=ids).logits)
