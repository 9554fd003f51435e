"""The comparison's own arithmetic: parts that share no sample, MACs, intervals, and what a failed peer looks like."""

import json

import pytest
import torch
from scipy import stats
from torch import nn

from benchmarks.compare import peers, problems, tables


@pytest.fixture
def problem() -> problems.Problem:
    x = torch.arange(200.0).reshape(200, 1)
    return problems.Problem("m", "d", 3, x, torch.arange(200) % 10, lambda: nn.Linear(1, 10))


def test_the_parts_share_no_sample_and_depend_on_the_seed(problem):
    parts = [set(problem.part(name)[0].flatten().tolist()) for name in ("train", "calibration", "test")]
    assert [len(part) for part in parts] == [120, 20, 60]
    assert len(set.union(*parts)) == 200
    other = problems.Problem("m", "d", 4, problem.x, problem.y, problem.build)
    assert set(other.part("test")[0].flatten().tolist()) != parts[2]
    x, y = problem.part("test")
    assert torch.equal(x.flatten().long() % 10, y)


def test_macs_are_those_of_one_sample():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 5))
    assert problems.macs(model, torch.zeros(4, 3, 4, 4)) == 16 * 8 * 27 + 8 * 16 * 5


def test_a_peer_gets_the_widest_model_within_the_macs(problem):
    def make(model: nn.Module, ratio: float) -> nn.Module:
        return nn.Sequential(
            nn.Linear(1, max(1, round(100 * (1 - ratio)))), nn.Linear(max(1, round(100 * (1 - ratio))), 10)
        )

    dense = make(nn.Identity(), 0.0)
    made = peers.bisected(dense, make, 0.3, problem)
    assert made.model[0].out_features == 30
    assert made.macs == pytest.approx(0.3)
    again = peers.at_ratio(dense, make, made.ratio, problem)
    assert (again.macs, again.model[0].out_features) == (made.macs, 30)


def test_the_interval_is_students(tmp_path):
    values = [96.0, 97.0, 97.5, 98.0, 95.5]
    mean, half = tables.interval(values)
    low, high = stats.t.interval(0.95, 4, loc=mean, scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_the_table_tells_means_failures_and_what_was_not_run(tmp_path):
    rows = [{"model": "m", "data": "d", "seed": s, "method": "dense", "wanted": 1.0, "accuracy": 98.0} for s in (0, 1)]
    for seed, got in ((0, 97.0), (1, 96.0)):
        rows.append({"model": "m", "data": "d", "seed": seed, "method": "leanort, a", "wanted": 0.5, "accuracy": got})
    rows.append({"model": "m", "data": "d", "seed": 0, "method": "other", "wanted": 0.5, "failed": "ValueError: no"})
    rows.append({"model": "m", "data": "d", "seed": 0, "method": "third", "wanted": 0.3, "accuracy": 50.0})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = tables.markdown(path)
    assert "dense 98.0 ± 0.0 %, 2 seeds" in text
    assert "| leanort, a | 96.5 ± 6.4 | – |" in text
    assert "| other | fails | – |" in text
    assert "| third | – | 50.0, one seed |" in text
    tables.draw(path, tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").read_text().startswith("<?xml")
