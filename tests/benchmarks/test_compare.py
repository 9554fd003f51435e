"""Our side of the comparison runs by every kind of choice: nothing else would tell that it broke."""

import pytest
import torch

from benchmarks.compare import ours
from benchmarks.compare.problems import Problem
from tests.pipeline.tiny import TinyNet


@pytest.mark.parametrize(("choice", "seconds"), [("layer:l2", 1e-6), ("curves:reconstruction", 0.5)])
def test_a_share_is_reached_fitted_and_trained(choice, seconds, monkeypatch):
    monkeypatch.setattr(ours, "CURVE_SAMPLES", 16)
    torch.manual_seed(0)
    problem = Problem("tiny", "noise", 0, torch.randn(300, 3, 16, 16), torch.arange(300) % 10, TinyNet)
    found = list(ours.results(TinyNet().eval(), problem, (0.5,), choice, train_seconds=seconds))
    assert [kind for _, kind, _ in found] == ["closed form", "closed form, trained"]
    for share, _, result in found:
        assert share == 0.5
        assert 0.2 < result.macs <= 0.51
        assert 0 <= result.accuracy <= 100
