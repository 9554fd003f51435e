"""Dimensions follow the widths: what the linear map says is what the shrunk program has."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.channels import analyse, capture, shrink
from pipeline.latency.sizes import Slot, sizes_of, slot


class Net(nn.Module):
    """A residual stream, a concatenation, and a flattened map."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.inner, self.back = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 3, padding=1)
        self.left, self.right = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 12, 1)
        self.hidden, self.head = nn.Linear(20 * 4 * 4, 32), nn.Linear(32, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.back(self.inner(x).relu())).relu()
        x = torch.cat([self.left(x), self.right(x)], 1).relu()
        return self.head(self.hidden(x.flatten(1)).relu())


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return analyse(capture(Net().eval(), (torch.randn(2, 3, 4, 4),)))


@given(draw=st.randoms(use_true_random=False))
@settings(max_examples=8, deadline=None)
def test_every_dimension_of_the_shrunk_program_is_one_that_the_map_gives(net, draw):
    removed = {
        c.name: np.array([draw.random() < 0.4 and at > 0 for at in range(c.size)], dtype=bool) for c in net.clusters
    }
    program = shrink(net.captured.fold(net.masks(removed)), net, removed).program
    sizes = sizes_of(net)
    kept = sizes.kept({name: int((~gone).sum()) for name, gone in removed.items()})
    known = {round(float(n)) for n in sizes.at(kept[None])[0]}
    fixed = {3, 4, 5, 1}
    for name, value in program.state_dict.items():
        assert set(value.shape) <= known | fixed, name
    assert {round(n) for n in sizes.at(sizes.whole[None])[0]} == {16, 24, 8, 12, 20, 320, 32}


def test_a_cluster_that_is_not_named_stays_whole(net):
    sizes = sizes_of(net)
    assert (sizes.kept({}) == sizes.whole).all()
    assert sizes.kept({"inner": 7})[sizes.clusters.index("inner")] == 7


DIMENSIONS = np.array([[64.0, 24.0], [40.0, 24.0], [41.0, 10.0], [8.0, 3.0]])


def test_a_size_that_is_a_multiple_of_a_dimension_follows_it():
    found = slot([256, 160, 164, 32], DIMENSIONS)
    assert found == Slot(0, 4.0) and found.at(np.array([[5.0, 1.0]])).tolist() == [20.0]


def test_a_size_that_was_rounded_up_to_a_block_follows_it_in_steps():
    found = slot([64, 48, 48, 16], DIMENSIONS)
    assert (found.of, found.step) == (0, 16)
    assert found.at(np.array([[17.0, 0.0], [16.0, 0.0]])).tolist() == [32.0, 16.0]


def test_a_size_that_never_changed_is_fixed_and_one_that_nothing_explains_takes_the_nearest():
    assert slot([7, 7, 7, 7], DIMENSIONS) == Slot(None, 7.0)
    near = slot([65, 39, 42, 8], DIMENSIONS)
    assert near.of == 0 and near.factor == pytest.approx(1.0, abs=0.03)


def test_channels_that_no_blocked_layout_takes_keep_their_number():
    dimensions = np.array([[58.0, 7.0], [45.0, 7.0], [24.0, 6.0], [60.0, 5.0], [222.0, 4.0]])
    found = slot([58, 45, 32, 64, 222], dimensions)
    assert (found.of, found.step, found.unit) == (0, 16, 4)
    assert found.at(np.array([[46.0, 0.0], [36.0, 0.0]])).tolist() == [46.0, 48.0]


def test_a_model_in_which_the_operator_was_taken_for_its_neighbour_does_not_hide_what_the_others_say():
    dimensions = np.array([[64.0, 24.0], [40.0, 24.0], [24.0, 16.0], [56.0, 8.0], [8.0, 8.0]])
    found = slot([64, 48, 16, 64, 16], dimensions)
    assert (found.of, found.step) == (0, 16)
