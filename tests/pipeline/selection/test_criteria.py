"""Scores of groups: what each criterion counts, and that the table is what recipes are checked against."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from foundation.errors import ConfigError
from pipeline import data
from pipeline.channels.coupling.analyse import analyse
from pipeline.channels.program.capture import capture
from pipeline.recipe.config import load
from pipeline.selection import criteria
from pipeline.selection.criteria import CRITERIA, Evidence
from pipeline.selection.observe import observe
from pipeline.tasks import classification

TASK = classification.task("classification", "output")


def cluster(size, labels):
    return SimpleNamespace(name="a", size=size, unit=1, labels=labels)


def test_norms_sum_over_rows_bias_and_readers_of_the_group():
    state = {
        "a.weight": torch.tensor([[3.0, 0.0], [0.0, 1.0]]),
        "a.bias": torch.tensor([4.0, 0.0]),
        "b.weight": torch.tensor([[12.0, -2.0]]),
    }
    labels = {("a.weight", 0): np.array([0, 1]), ("a.bias", 0): np.array([0, 1]), ("b.weight", 1): np.array([0, 1])}
    both = cluster(2, labels)
    assert CRITERIA["l2"].score(both, Evidence(state)) == pytest.approx([13.0, 5**0.5])
    assert CRITERIA["l1"].score(both, Evidence(state)) == pytest.approx([19.0, 3.0])


def test_norms_ignore_indices_of_other_clusters():
    state = {"cat.weight": torch.tensor([[1.0, 2.0, 100.0]])}
    mine = cluster(2, {("cat.weight", 1): np.array([1, 0, -1])})
    assert CRITERIA["l1"].score(mine, Evidence(state)) == pytest.approx([2.0, 1.0])


def test_a_criterion_that_is_not_in_the_table_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="no criterion 'l3'") as caught:
        criteria.find("l3")
    assert "l1" in caught.value.hint


def test_recipes_that_say_norm_go_on_working():
    assert load(None, {"prune.norm": "l1"}).prune.criterion == "l1"
    with pytest.raises(ConfigError, match="prune.norm"):
        load(None, {"prune.norm": "l1", "prune.criterion": "l2"})


def test_taylor_counts_what_the_loss_would_change_by_and_signs_cancel_inside_a_group():
    state = {"a.weight": torch.tensor([[3.0, -1.0], [2.0, 2.0]]), "a.bias": torch.tensor([1.0, 5.0])}
    gradients = {"a.weight": torch.tensor([[1.0, 1.0], [0.5, -0.5]])}  # the bias takes no part in the loss
    both = cluster(2, {("a.weight", 0): np.array([0, 1]), ("a.bias", 0): np.array([0, 1])})
    assert CRITERIA["taylor"].score(both, Evidence(state, gradients)) == pytest.approx([2.0, 0.0])


def test_gradients_are_gathered_only_where_a_criterion_asks_and_leave_the_model_as_it_was():
    digits = data.load("digits", input_size=(1, 8, 8))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).train()
    analysis = analyse(capture(model, (torch.randn(2, 1, 8, 8),)))
    assert observe(model, digits, TASK, CRITERIA["l2"].observes, analysis).gradients == {}
    seen = observe(model, digits, TASK, CRITERIA["taylor"].observes, analysis)
    (images,), labels = next(digits.batches("calibration", len(digits.calibration)))
    nn.functional.cross_entropy(model(images), labels).backward()
    assert torch.allclose(seen.gradients["1.weight"], model[1].weight.grad, atol=1e-6)
    assert model.training
    assert not torch.equal(seen.weights["1.weight"], torch.zeros(10, 64))


def test_a_rank_is_worked_out_once_for_what_was_seen(monkeypatch):
    asked = []
    row = replace(CRITERIA["l1"], score=lambda cluster, seen: asked.append(cluster) or np.ones(2))
    monkeypatch.setattr(criteria, "CRITERIA", {"l1": row})
    label = {("w", 0): np.array([0, 1])}
    one, other = (SimpleNamespace(name="a", size=2, labels=label, readers=()) for _ in range(2))
    seen = Evidence({"w": torch.ones(2, 3)})
    first = criteria.rank("l1", one, seen)
    assert criteria.rank("l1", one, seen) is first and asked == [one]
    criteria.rank("l1", other, seen)  # of the same name, and another
    criteria.rank("l1", one, replace(seen, weights={"w": torch.zeros(2, 3)}))
    assert len(asked) == 3
