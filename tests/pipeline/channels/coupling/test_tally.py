"""Sizes that are looked up are those that a walk over the graph counts, whatever was asked before."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foundation.errors import UserError
from pipeline.channels import analyse, capture
from pipeline.channels.coupling.tally import Tally


class Net(nn.Module):
    """A stream with two branches, one grouped, a concatenation, a linear end."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.a, self.b = nn.Conv2d(12, 16, 1), nn.Conv2d(16, 12, 3, padding=1, bias=False)
        self.c, self.d = nn.Conv2d(12, 8, 1), nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.norm, self.beside = nn.BatchNorm2d(12), nn.Conv2d(3, 6, 1)
        self.end = nn.Linear(18, 5)

    def forward(self, x):
        y = self.first(x).relu()
        y = y + self.b(self.a(y).relu())
        y = self.norm(y + self.d(self.c(y).relu())).relu()
        return self.end(torch.cat([y, self.beside(x).relu()], 1).mean((2, 3)))


class Part(nn.Module):
    """A part of a layer is read by itself, and must not be empty where the rest is not."""

    def __init__(self):
        super().__init__()
        self.first, self.end = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        y = self.first(x).relu()
        return self.end(y) + y[:, :2].sum(1, keepdim=True)


@pytest.fixture(scope="module", name="analysed")
def _analysed():
    made = {}
    for net in (Net, Part):
        torch.manual_seed(0)
        made[net] = analyse(capture(net().eval(), (torch.randn(2, 3, 6, 6),)))
    return made


def test_only_where_parts_stand_alone_are_they_looked_up(analysed):
    assert analysed[Net]._tally.exact
    assert not analysed[Part]._tally.exact


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_is_looked_up_is_what_a_walk_counts(analysed, data):
    analysis = analysed[data.draw(st.sampled_from([Net, Part]))]

    def choice(clusters):
        return {
            c.name: np.array(data.draw(st.lists(st.booleans(), min_size=c.size, max_size=c.size)), bool)
            for c in clusters
        }

    removed = choice([c for c in analysis.clusters if data.draw(st.booleans())])
    changes = [choice([data.draw(st.sampled_from(analysis.clusters))]) for _ in range(3)]
    for branches in (False, True):
        found = analysis.estimates(removed, changes, branches=branches)
        assert found == [analysis._estimate({**removed, **change}, branches) for change in changes]
        assert analysis.estimate(removed, branches=branches) == analysis._estimate(removed, branches)


def test_a_layer_beside_many_is_counted_without_them(monkeypatch):
    layers = [nn.Conv2d(3 if i == 0 else 8, 8, 1) for i in range(40)]
    analysis = analyse(capture(nn.Sequential(*layers).eval(), (torch.randn(2, 3, 4, 4),)))
    whole = {c.name: np.zeros(c.size, bool) for c in analysis.clusters}
    analysis.estimate(whole)
    counts, count = [], Tally._count
    monkeypatch.setattr(Tally, "_count", lambda *given: counts.append(1) or count(*given))
    changes = [{c.name: np.arange(8) < 3} for c in analysis.clusters]
    analysis.estimates(whole, changes)
    assert 0 < len(counts) <= 5 * len(analysis.clusters)  # two layers, their weights and a bias
    counts.clear()
    analysis.estimates(whole, changes)
    assert not counts


@pytest.mark.parametrize("net", [Net, Part])
def test_a_choice_that_does_not_fit_is_refused(analysed, net):
    analysis = analysed[net]
    with pytest.raises(UserError, match="no cluster 'else'"):
        analysis.estimate({"else": np.zeros(3, bool)})
    with pytest.raises(UserError, match="the choice names"):
        analysis.estimate({analysis.clusters[0].name: np.zeros(99, bool)})
