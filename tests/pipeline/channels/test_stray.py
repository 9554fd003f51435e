"""Channels that are dead by chance stay where a count that kernels like would be lost with them."""

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.channels import analyse, capture, liveness, shrink
from pipeline.channels.dead.liveness import Liveness
from pipeline.channels.dead.stray import evened
from pipeline.latency.probes import Setting, cut


def net(*stray, width=32):
    """Two convolutions; channels of the first that are zero though they are read, as training leaves them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 8, 1)).eval()
    with torch.no_grad():
        for channel in stray:
            model[0].weight[channel] = 0
            model[0].bias[channel] = 0
    return analyse(capture(model, (torch.randn(2, 3, 6, 6),)))


def masked(analysis, count):
    """The program with so many channels masked on both sides, the last ones."""
    (cluster,) = analysis.clusters
    return analysis.captured.fold(analysis.masks({cluster.name: np.arange(cluster.size) >= cluster.size - count}))


def left(analysis, folded, align):
    live = evened(analysis, folded.state, liveness(analysis, folded.state), align)
    small = shrink(folded, analysis, live.dead, refused=live.refusals)
    x = torch.randn(4, 3, 6, 6)
    assert torch.allclose(folded(x), small(x), atol=1e-6)
    return small.program.state_dict["0.weight"].shape[0], small.ledger.refusals


@pytest.mark.parametrize(
    ("stray", "gone", "align", "stays"),
    [
        ((), 0, 16, 32),
        ((), 5, 16, 27),  # chosen so, and not by chance
        ((), 16, 16, 16),
        ((4,), 0, 16, 32),
        ((4, 9, 11), 16, 16, 16),  # 13 would be left
        (tuple(range(20)), 0, 16, 16),
        (tuple(range(10)), 6, 16, 16),
        ((4,), 1, 16, 30),  # none that is dead by chance can make up for what was chosen
        ((4,), 0, 1, 31),
    ],
)
def test_as_many_stay_as_a_multiple_takes_and_no_more(stray, gone, align, stays):
    analysis = net(*stray)
    count, refusals = left(analysis, masked(analysis, gone), align)
    assert count == stays
    kept_back = stays - (32 - len(stray) - gone)
    assert sum(len(one.groups) for one in refusals) == kept_back
    assert all(set(one.groups) <= set(stray) and f"{stays} are faster" in one.reason for one in refusals)


def test_a_narrow_layer_keeps_a_multiple_of_a_quarter():
    analysis = net(1, 2, 3, width=12)
    assert left(analysis, masked(analysis, 0), 16)[0] == 12
    analysis = net(1, 2, 3, 4, 5, width=12)
    assert left(analysis, masked(analysis, 0), 16)[0] == 8


def test_a_trial_times_the_model_that_ships():
    analysis = net(4)
    program = cut(analysis, {}, {}, Setting(1, 1, False, 23, 16))
    assert program.state_dict["0.weight"].shape[0] == 32


def test_a_layer_that_is_dead_as_a_whole_is_not_dead_by_chance():
    analysis = net()
    (cluster,) = analysis.clusters
    found = Liveness({cluster.name: np.ones(cluster.size, bool)}, ())
    assert evened(analysis, analysis.captured.state, found, 1 << 6) == found  # narrower than that: any count would do
