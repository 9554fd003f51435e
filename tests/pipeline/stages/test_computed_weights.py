"""Models whose weights are computed (weight norm, masks), lazy or frozen, from the baseline to shrinking."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from pipeline import data, models
from pipeline.artifacts.eager import Baseline
from pipeline.artifacts.program import Shrunk
from pipeline.measurements import Measurements
from pipeline.progress import Progress
from pipeline.recipe.prune import PruneSection
from pipeline.recipe.removal import FoldSection, ShrinkSection
from pipeline.recipe.source import BaselineSection
from pipeline.recipe.train import FinetuneSection, TrainSettings
from pipeline.stages import s0_baseline, s1_prune, s2_finetune, s3_fold, s4_shrink
from pipeline.tasks import classification
from pipeline.training import loop

TASK = classification.task("classification", "output")

TRAIN = TrainSettings(epochs=1, lr=1e-3)


def base() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 10),
    )


def over(hook, *layers: int) -> nn.Module:
    model = base()
    for layer in layers:
        hook(model[layer])
    return model


def lazy() -> nn.Module:
    model = base()
    model[0], model[3], model[7] = nn.LazyConv2d(8, 3, stride=2), nn.LazyConv2d(6, 3), nn.LazyLinear(10)
    return model


def partly_frozen() -> nn.Module:
    model = base()
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    return model


MODELS = {
    "old weight norm": lambda: over(nn.utils.weight_norm, 0, 3, 7),
    "new weight norm": lambda: over(parametrizations.weight_norm, 0, 3, 7),
    "old spectral norm": lambda: over(nn.utils.spectral_norm, 0, 3),
    "new spectral norm": lambda: over(parametrizations.spectral_norm, 0, 3),
    "pruning mask": lambda: over(lambda layer: prune.l1_unstructured(layer, "weight", 0.3), 0, 3),
    "orthogonal": lambda: over(parametrizations.orthogonal, 7),
    "lazy": lazy,
    "partly frozen": partly_frozen,
    "all frozen": lambda: base().requires_grad_(False),
    "all frozen, weight norm": lambda: over(parametrizations.weight_norm, 0).requires_grad_(False),
}


class Listening(Progress):
    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def say(self, text: str) -> None:
        self.heard.append(text)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", input_size=(3, 16, 16))


def shrink(source, digits, dense: Baseline, criterion: str, folders: list[Path]) -> Shrunk:
    """Prune half of every width, recover, fold and shrink."""
    progress = Progress()
    chosen = PruneSection(ratio=0.5, align=1, criterion=criterion)
    pruned = s1_prune.run(chosen, folders[0], source, digits, dense, TASK, Measurements(), progress).save()
    cfg = FinetuneSection(train=TRAIN)
    tuned = s2_finetune.run(cfg, folders[1], source, digits, dense, pruned, TASK, progress).save()
    folded = s3_fold.run(FoldSection(), folders[2], source, digits, pruned, tuned).save()
    return s4_shrink.run(ShrinkSection(), folders[3], source, digits, pruned, folded, progress).save()


@pytest.mark.examples
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("criterion", ["l2", "taylor"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_it_is_trained_pruned_recovered_and_shrunk(kind, criterion, digits, tmp_path, monkeypatch):
    folders = [tmp_path / str(number) for number in range(5)]
    for folder in folders:
        folder.mkdir()
    trained: list[set[str]] = []
    real = loop.train

    def watched(model, *given, **named):
        trained.append(set(model.state_dict()))
        return real(model, *given, **named)

    monkeypatch.setattr(loop, "train", watched)
    source = models.load(MODELS[kind], input_size=(3, 16, 16))
    progress = Listening()
    dense = s0_baseline.run(
        BaselineSection(train=TRAIN, seconds=0.1), folders[0], source, digits, TASK, progress
    ).save()
    computed = kind not in ("lazy", "partly frozen", "all frozen")
    said = [line for line in progress.heard if "folded into plain weights" in line]
    assert len(said) == int(computed)
    assert ("folded into plain weights" in dense.weights_origin) == computed
    assert any("is frozen" in line for line in progress.heard) == kind.startswith("all frozen")
    assert set(dense.weights()) == set(base().state_dict())
    assert (trained[0] == set(base().state_dict())) != computed  # in the form that was given
    shrunk = shrink(source, digits, dense, criterion, folders[1:])
    assert {(w.before, w.after) for w in shrunk.widths} == {(8, 4), (6, 3)}
    if kind == "partly frozen":
        initial = source.build()
        assert torch.equal(dense.weights()["0.weight"], initial[0].weight)


def test_a_pruning_masks_zeros_are_held_while_the_baseline_is_trained(digits, tmp_path):
    source = models.load(MODELS["pruning mask"], input_size=(3, 16, 16))
    dense = s0_baseline.run(BaselineSection(train=TRAIN, seconds=0.1), tmp_path, source, digits, TASK, Progress())
    zeros = source.build()[3].weight == 0
    assert zeros.sum() == round(0.3 * zeros.numel())
    assert not dense.weights()["3.weight"][zeros].any()
    assert dense.weights()["3.weight"][~zeros].all()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i = nn.Linear(48, 8)
        self.l = nn.LSTM(8, 8, batch_first=True)
        self.o = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.transpose(1, 2).flatten(2)
        return self.o(self.l(self.i(rows).relu())[0][:, -1])


@pytest.mark.examples
@pytest.mark.parametrize("hook", [None, parametrizations.weight_norm])
def test_recurrent_layers_are_shrunk_too(hook, digits, tmp_path):
    def make() -> nn.Module:
        model = Recurrent()
        if hook is not None:
            hook(model.l, "weight_hh_l0")
        return model

    folders = [tmp_path / str(number) for number in range(5)]
    for folder in folders:
        folder.mkdir()
    source = models.load(make, input_size=(3, 16, 16))
    dense = s0_baseline.run(
        BaselineSection(train=TRAIN, seconds=0.1), folders[0], source, digits, TASK, Progress()
    ).save()
    shrunk = shrink(source, digits, dense, "l2", folders[1:])
    assert {(w.cluster, w.before, w.after) for w in shrunk.widths} == {("i", 8, 4), ("l", 8, 4)}
