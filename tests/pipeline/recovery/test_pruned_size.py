"""Training the smaller model and writing back is training the masked one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pipeline import data
from pipeline.channels import Captured, Policy, analyse
from pipeline.models import find
from pipeline.models.graph import graph_of
from pipeline.models.source import ModelSource
from pipeline.recipe.train import TrainSettings
from pipeline.recovery.pruned_size import at_pruned_size
from pipeline.tasks import classification
from pipeline.training import loop
from pipeline.training import masks as masking
from tests.pipeline.tiny import TinyNet

SETTINGS = TrainSettings(epochs=2, lr=0.02, optimizer="sgd", weight_decay=0.01, augment=False)


def plain(source: ModelSource) -> tuple[nn.Module, Captured]:
    model = source.build()
    return model, graph_of(model, source)


def masked(source: ModelSource, single: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with the first half of each cluster masked, and single weights besides."""
    model = source.build()
    torch.manual_seed(1)
    captured = graph_of(model, source)
    analysis = analyse(captured, Policy())
    removed = {c.name: torch.arange(c.size).numpy() < c.size // 2 for c in analysis.clusters}
    masks = {name: torch.from_numpy(mask) for name, mask in analysis.masks(removed).items()}
    if single:
        masks["head.weight"] = masks["head.weight"] & (torch.rand(masks["head.weight"].shape) > 0.3)
    masking.apply(model, masks)
    return model, masks


def trained_both_ways(net: nn.Module, single: bool = False) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    source = find.load(net, input_size=(3, 16, 16), seed=0)
    task = classification.task("classification", "output")
    digits = data.load("digits", input_size=(3, 16, 16)).some("train", 192).some("calibration", 64)
    large, masks = masked(source, single)
    written = copy.deepcopy(large)
    small, words = at_pruned_size(large, *plain(source), masks, Policy())
    assert small is not None, words
    assert bool(small.masks) == single
    assert sum(p.numel() for p in small.model.parameters()) < 0.6 * sum(p.numel() for p in large.parameters())
    loop.train(large, digits, task, SETTINGS, masks=masks)
    result = loop.train(small.model, digits, task, SETTINGS, masks=small.masks)
    small.write_back(written, result.state)
    return large, written, masks


@pytest.mark.parametrize("single", [False, True])
def test_the_same_weights_but_for_rounding(single: bool) -> None:
    net = TinyNet()
    before = copy.deepcopy(net).state_dict()
    large, written, masks = trained_both_ways(net, single)
    images = torch.randn(8, 3, 16, 16)
    torch.testing.assert_close(written.eval()(images), large.eval()(images), rtol=1e-3, atol=1e-3)
    one, other = masking.originals(large), masking.originals(written)
    moved = 0
    for name, mask in masks.items():
        assert torch.equal(other[name][~mask], before[name][~mask]), f"what lies under the mask of {name} has changed"
        torch.testing.assert_close(other[name][mask], one[name][mask], rtol=1e-2, atol=1e-3)
        moved += not torch.equal(other[name][mask], before[name][mask])
    assert moved == len(masks)


class Auxiliary(nn.Module):
    """In training it has a second head, which no exported graph knows."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.second = nn.Conv2d(3, 8, 3), nn.Linear(8, 10), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x).relu().mean((2, 3))
        return self.head(y) + self.second(y) if self.training else self.head(y)


class Dropping(nn.Module):
    """Leaves a whole branch out at random, in training only: a program of eval mode knows nothing of that."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.dropped = nn.Conv2d(3, 8, 3), nn.Linear(8, 10), 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x).relu().mean((2, 3))
        if self.training and torch.rand(()) < 0.5:
            self.dropped += 1
            return 0.0 * self.head(y)
        return self.head(y)


def test_a_class_that_fails_in_training_is_trained_under_its_masks() -> None:
    source = find.load(Auxiliary(), input_size=(3, 16, 16), seed=0)
    model, masks = masked(source)
    small, words = at_pruned_size(model, *plain(source), masks, Policy())
    assert small is None
    assert "training mode" in words


def test_what_a_class_does_in_training_alone_is_done() -> None:
    source = find.load(Dropping(), input_size=(3, 16, 16), seed=0)
    model, masks = masked(source)
    small, words = at_pruned_size(model, *plain(source), masks, Policy())
    assert small is not None, words
    before = small.model.dropped
    for _ in range(20):
        small.model.train()(torch.randn(2, 3, 16, 16))
    assert small.model.dropped > before


def test_single_weights_alone_give_nothing_smaller() -> None:
    source = find.load(TinyNet(), input_size=(3, 16, 16), seed=0)
    model = source.build()
    masks = {"head.weight": torch.rand(10, 16) > 0.5}
    masking.apply(model, masks)
    assert at_pruned_size(model, *plain(source), masks, Policy()) == (None, "no whole channel is masked")


def test_what_is_zero_without_a_mask_stays_and_learns() -> None:
    source = find.load(TinyNet(), input_size=(3, 16, 16), seed=0)
    model, masks = masked(source)
    with torch.no_grad():
        masking.parameters(model)["head.weight"].zero_()
    small, words = at_pruned_size(model, *plain(source), masks, Policy())
    assert small is not None, words
    expected, _ = at_pruned_size(masked(source)[0], *plain(source), masks, Policy())
    assert expected is not None
    assert {n: v.shape for n, v in small.model.state_dict().items()} == {
        n: v.shape for n, v in expected.model.state_dict().items()
    }
