"""Being like the dense model: places that only fill a sample up to the length of its batch count for nothing."""

import pytest
import torch

from pipeline.data import find
from pipeline.data.parts import PLACES
from pipeline.tasks import distil
from tests.pipeline.tasks.made import Listed

LENGTHS = (2, 5, 3, 6)
READS = ("states", "pooled")


def outputs(seed: int):
    draw = torch.Generator().manual_seed(seed)
    states, pooled = torch.randn(4, 6, 8, generator=draw), torch.randn(4, 8, generator=draw)
    return {"states": states, "pooled": pooled}


PLACED = torch.arange(6) < torch.tensor(LENGTHS)[:, None]
FOUND, WANTED = outputs(0), {**outputs(1), PLACES: PLACED}


def alone(given, row):
    return {"states": given["states"][row : row + 1, : LENGTHS[row]], "pooled": given["pooled"][row : row + 1]}


@pytest.mark.parametrize("name", ["distil", "embedding"])
def test_a_sample_scores_in_a_batch_as_it_does_alone(name):
    task = distil.task(name, READS)
    wanted = torch.cat([task.score.statistics(alone(FOUND, row), alone(WANTED, row)) for row in range(4)])
    assert torch.allclose(task.score.statistics(FOUND, WANTED), wanted)
    blind = task.score.statistics(FOUND, {name: WANTED[name] for name in READS})
    assert not torch.allclose(blind, wanted, atol=0.01)


def test_what_fills_up_costs_nothing():
    task = distil.task("distil", READS)
    other = {**FOUND, "states": torch.where(PLACED[..., None], FOUND["states"], torch.nan)}
    assert torch.equal(task.losses(other, WANTED, 0.0), task.losses(FOUND, WANTED, 0.0))
    assert torch.isfinite(task.losses(other, WANTED, 0.0)).all()


def test_neighbours_are_those_of_the_mean_over_places_that_count():
    task = distil.task("embedding", READS)
    (_, retrieval) = task.scores
    means = [
        torch.stack([given["states"][row, : LENGTHS[row]].mean(0) for row in range(4)]) for given in (FOUND, WANTED)
    ]
    assert torch.equal(retrieval.statistics(FOUND, WANTED)[:, 0], distil.retrieved(*means))
    changed = {**FOUND, "states": torch.where(PLACED[..., None], WANTED["states"], 50 * FOUND["states"])}
    assert retrieval.statistics(changed, WANTED)[:, 0].all()


@pytest.mark.parametrize(("mask", "told"), [("attention_mask", True), ("padding_mask", False), (None, False)])
def test_a_mask_among_the_inputs_says_which_places_count(mask, told):
    lengths = [2 + n % 4 if mask else 3 for n in range(40)]
    samples = [{"input_ids": n + torch.arange(1, 1 + length)} for n, length in enumerate(lengths)]
    if mask:
        samples = [{**one, mask: torch.ones_like(one["input_ids"])} for one in samples]
    data = find.load(Listed(samples)).answered_by(lambda *inputs: {"states": torch.zeros(*inputs[0].shape, 3)})
    for inputs, target in data.batches("train", 7):
        assert (PLACES in target) == told
        if told:
            assert torch.equal(target[PLACES], inputs[0] > 0)
