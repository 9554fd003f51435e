"""Several processes: what two compute is what one computes, up to the order of summation."""

import os
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from foundation.errors import TrainingError
from pipeline import data, models
from pipeline.models.dense import Answering
from pipeline.recipe.train import TrainSettings
from pipeline.selection.schedules import cubic_ratio
from pipeline.selection.weights import prunable, unstructured_l1
from pipeline.tasks import classification, distil
from pipeline.training import loop, masks, sharding
from tests.pipeline.training.two import led, together

TASK = classification.task("classification", "output")
COPYING = distil.task("distil", ("output",))
SHORT = TrainSettings(epochs=2, batch_size=90, lr=0.01, optimizer="sgd", weight_decay=5e-4)


def digits() -> data.Data:
    return data.load("digits", input_size=(1, 8, 8))


class Net(nn.Module):
    """A convolution, a batch norm, a head; one more head that the loss never sees."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1, bias=False)  # its gradient would be noise before a norm
        self.bn = nn.BatchNorm2d(width)
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.fc = nn.Linear(width, 10)
        self.aside = nn.Linear(width, 3)

    def forward(self, x):
        seen = self.norm(self.bn(self.conv(x)).relu().mean((2, 3)))
        return {"output": self.fc(seen), "aside": self.aside(seen)}


def build() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def source():
    return models.load(build, input_size=(1, 8, 8))


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], within: float = 2e-4) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name].float(), b[name].float(), rtol=within, atol=within, msg=lambda m, n=name: f"{n}: {m}"
        )


def smaller() -> nn.Module:
    """What no source builds."""
    torch.manual_seed(0)
    return Net(width=6)


def answered() -> data.Data:
    """Digits whose labels are another model's answers."""
    known = digits()
    parts = {part: (known.split(part).labels + 3) % 10 for part in ("train", "calibration", "test")}
    return replace(known, labelled=False).answered(parts, 10)


def copied() -> data.Data:
    """Digits whose targets are another model's outputs."""
    model = build()
    nn.init.normal_(model.fc.weight)
    return replace(digits(), labelled=False).answered_by(Answering(lambda: model))


def trained(changes, *, taught=False, masked=False, gradual=False, make=build, on=digits, checkpoint=None):
    model = make()
    dataset, settings = on(), SHORT.model_copy(update=changes)
    teacher = build() if taught else None
    if teacher is not None:
        nn.init.normal_(teacher.fc.weight)
    held = unstructured_l1(prunable(model), 0.5) if masked else None

    def more(step: int, total: int) -> masks.Masks:
        """More and more weights, by scores that rounding cannot change."""
        drawn = torch.Generator().manual_seed(0)
        return {
            name: torch.rand(value.shape, generator=drawn) > cubic_ratio(0.5, step, total - 4)
            for name, value in prunable(model).items()
        }

    return loop.train(
        model, dataset, COPYING if on is copied else TASK, settings, teacher=teacher, masks=held,
        on_step=more if gradual else None, checkpoint=checkpoint,
    )  # fmt: skip


def two(changes, options):
    task = COPYING if options.get("on") is copied else TASK
    return led(source(), digits(), task, lambda: trained(changes, **options))


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({"optimizer": "adamw", "lr": 1e-3, "batch_size": 91}, {"masked": True}),
        pytest.param({"distill_weight": 0.5, "accumulate": 3}, {"taught": True}, marks=pytest.mark.examples),
        pytest.param({}, {"gradual": True}, marks=pytest.mark.examples),
        pytest.param({"epochs": 1}, {"make": smaller, "masked": True}, marks=pytest.mark.examples),
        pytest.param({"epochs": 1}, {"on": answered}, marks=pytest.mark.examples),
    ],
    ids=["plain", "masked, odd batch", "taught, accumulated", "gradual masks", "smaller", "answered"],
)
def test_two_processes_compute_what_one_does(tmp_path, changes, options):
    torch.set_num_threads(1)
    alone = trained(changes, **options)
    first, second = together(tmp_path, two, changes, options)
    assert second is None
    assert first is not None, (tmp_path / "stderr0").read_text()
    close(first.state, alone.state)
    assert first.masks.keys() == alone.masks.keys()
    for a, b in zip(first.history, alone.history, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
        assert a.calibration_loss == pytest.approx(b.calibration_loss, rel=1e-3)
        assert abs(a.train_score - b.train_score) < 0.005


@pytest.mark.examples
def test_targets_that_a_dense_model_gives_are_the_same_model_s_on_both(tmp_path):
    """Its loss is measured against the targets of a process's own rows, so that it is alike, not equal."""
    torch.set_num_threads(1)
    alone = trained({}, on=copied)
    first, _ = together(tmp_path, two, {}, {"on": copied})
    assert first is not None, (tmp_path / "stderr0").read_text()
    for a, b in zip(first.history, alone.history, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=0.05)
        assert a.calibration_score == pytest.approx(b.calibration_score, abs=0.02)
    close(first.state, alone.state, within=0.05)


# ── in pieces ────────────────────────────────────────────────────────────────────────────────────────────────────────


def in_pieces(changes, options, until=0):
    """Trained so on each of two processes; `until`: both fail in the epoch after it."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    sharding.LEAST = 1
    made = []
    cut = sharding.in_pieces
    sharding.in_pieces = lambda *args: (made.append(cut(*args)), made[-1])[1]
    epoch = loop._Run.epoch

    def broken(run, number, *args):
        if until and number > until:
            raise TrainingError("It is enough.")
        return epoch(run, number, *args)

    loop._Run.epoch = broken
    found = two(changes, options)
    assert all(isinstance(value, DTensor) for value in made[0].parameters())
    if options.get("make") is blocks:
        names = {name for name, part in made[0].named_modules() if isinstance(part, FSDPModule)}
        assert names == {"", "first.0", "first.1", "blocks.1.0", "never.0"}  # two of the blocks share a weight
    return found


class Blocks(nn.Module):
    """Blocks in containers, one whose weight is tied to another's, one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))
        self.blocks[2][0].weight = self.blocks[0][0].weight
        self.never = nn.ModuleList([nn.Linear(8, 8)])
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        x = self.first(x).mean((2, 3))
        for block in self.blocks:
            x = x + block(x)
        return {"output": self.fc(x)}


def blocks() -> nn.Module:
    torch.manual_seed(0)
    return Blocks()


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"grad_clip": 0.5}, {}),
        pytest.param({"optimizer": "adamw", "lr": 1e-3, "accumulate": 3}, {"taught": True}, marks=pytest.mark.examples),
        pytest.param({"channels_last": True}, {"make": blocks}, marks=pytest.mark.examples),
    ],
    ids=["sgd, clipped", "adamw, taught, accumulated", "blocks"],
)
def test_weights_in_pieces_learn_what_whole_ones_do(tmp_path, changes, options):
    torch.set_num_threads(1)
    alone = trained(changes, **options)
    first, second = together(tmp_path, in_pieces, changes, options)
    assert second is None and (tmp_path / "result1.pt").exists(), (tmp_path / "stderr1").read_text()
    assert first is not None, (tmp_path / "stderr0").read_text()
    close(first.state, alone.state)
    assert all(type(value) is torch.Tensor for value in first.state.values())
    for a, b in zip(first.history, alone.history, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
        assert a.calibration_score == pytest.approx(b.calibration_score, abs=0.005)


@pytest.mark.examples
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_in_pieces_goes_on_from_whole_weights(tmp_path, optimizer):
    torch.set_num_threads(1)
    changes = {"optimizer": optimizer, "lr": 1e-3, "epochs": 3}
    options = {"checkpoint": tmp_path / "training.pt"}
    undisturbed, _ = together(tmp_path / "whole", in_pieces, changes, {})
    assert together(tmp_path / "first", in_pieces, changes, options, 1) == [None, None]
    held = torch.load(tmp_path / "training.pt", weights_only=True)
    assert held["weights"]["fc.weight"].shape == (10, 8)
    second, _ = together(tmp_path / "second", in_pieces, changes, options)
    assert second is not None, (tmp_path / "second" / "stderr0").read_text()
    assert second.resumed_from == 1
    assert all(torch.equal(value, undisturbed.state[name]) for name, value in second.state.items())


def test_masks_want_every_weight_whole(tmp_path):
    first, _ = together(tmp_path, in_pieces, {}, {"masked": True})
    assert first is None
    assert "masks need every weight whole on each process" in (tmp_path / "stderr0").read_text()
