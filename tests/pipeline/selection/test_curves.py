"""Curves are measured as told, and widths follow them: greedily as well as exactly, aligned, above the floor."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

from pipeline.channels.coupling.analyse import analyse
from pipeline.channels.program.capture import capture
from pipeline.recipe.prune import PruneSection
from pipeline.selection import curves
from pipeline.selection.allocation import Budget, allocate, lowest, widths_allowed
from pipeline.selection.criteria import Evidence, find
from pipeline.selection.curves import Curve, Steps, cheapest, convex

# ── greedy and exact ─────────────────────────────────────────────────────────────────────────────────────────────────


def exact(steps, wanted):
    """The least loss among all choices that save `wanted`, each cluster's steps in their order."""
    saved = np.concatenate([s.saved for s in steps])
    lost = np.concatenate([s.lost for s in steps])
    rows, at = [saved], 0
    lower, upper = [wanted - 1e-9], [np.inf]
    for own in steps:
        for k in range(len(own.saved) - 1):  # the next step only after this one
            row = np.zeros(len(saved))
            row[at + k], row[at + k + 1] = 1, -1
            rows.append(row)
            lower.append(0)
            upper.append(np.inf)
        at += len(own.saved)
    found = milp(
        lost, constraints=LinearConstraint(np.array(rows), lower, upper), integrality=np.ones(len(saved)),
        bounds=Bounds(0, 1),
    )  # fmt: skip
    return found.fun


@st.composite
def ladders(draw, alike):
    made = []
    for _ in range(draw(st.integers(1, 4))):
        count = draw(st.integers(1, 5))
        each = 1.0 if alike else draw(st.integers(1, 9))
        lost = sorted(draw(st.lists(st.integers(0, 100), min_size=count, max_size=count)))
        made.append(Steps(saved=(float(each),) * count, lost=tuple(map(float, lost))))
    return made


def total(steps, taken, what):
    return sum(sum(getattr(own, what)[:n]) for own, n in zip(steps, taken, strict=True))


@settings(max_examples=60, deadline=None)
@given(steps=ladders(alike=True), share=st.floats(0.05, 1.0))
def test_greedy_is_exact_where_blocks_save_alike(steps, share):
    wanted = share * sum(sum(s.saved) for s in steps)
    taken = cheapest(steps, wanted)
    assert total(steps, taken, "saved") >= wanted - 1e-9
    assert total(steps, taken, "lost") == pytest.approx(exact(steps, np.ceil(wanted - 1e-9)))


@settings(max_examples=60, deadline=None)
@given(steps=ladders(alike=False), share=st.floats(0.05, 1.0))
def test_greedy_is_exact_for_what_it_saves(steps, share):
    taken = cheapest(steps, share * sum(sum(s.saved) for s in steps))
    assert total(steps, taken, "lost") == pytest.approx(exact(steps, total(steps, taken, "saved")))


def test_more_than_there_is_takes_all():
    assert cheapest([Steps((1.0, 1.0), (0.0, 1.0)), Steps((), ())], 9.0) == [2, 0]
    assert cheapest([Steps((1.0,), (1.0,))], 0.0) == [0]


# ── the hull ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(values=st.lists(st.floats(0, 1000), min_size=1, max_size=6))
def test_a_curve_is_convex_rises_and_lies_below_the_points(values):
    at = [3 * (k + 1) for k in range(len(values))]
    curve = convex(at, values)
    assert curve.removed[0] == 0 and curve.divergence[0] == 0.0 and curve.removed[-1] == at[-1]
    slopes = np.diff(curve.divergence) / np.diff(curve.removed)
    assert (np.diff(slopes) >= -1e-9).all() and (slopes >= -1e-9).all()
    assert all(curve.at(a) <= v + 1e-6 for a, v in zip(at, values, strict=True))


def test_a_curve_goes_on_as_it_ended():
    curve = convex([2, 4], [1.0, 3.0])
    assert [curve.at(n) for n in (0, 1, 2, 3, 4, 5)] == [0.0, 0.5, 1.0, 2.0, 3.0, 4.0]
    assert Curve((0,), (0.0,)).at(3) == 0.0


# ── widths that may be ───────────────────────────────────────────────────────────────────────────────────────────────


@given(
    size=st.integers(1, 200), unit=st.sampled_from([1, 4, 64]), align=st.sampled_from([1, 8, 16]), floor=st.floats(0, 1)
)
def test_allowed_widths_are_aligned_and_above_the_floor(size, unit, align, floor):
    widths = widths_allowed(SimpleNamespace(name="a", size=size, unit=unit), Budget(0.5, align=align, floor=floor))
    assert widths[0] == size and widths == sorted(set(widths), reverse=True)
    step = align // np.gcd(align, unit)
    for n in widths[1:]:
        assert n >= max(1, floor * size - 1e-9)
        assert n % step == 0 or size <= step


# ── on networks ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Net(nn.Module):
    """Three branches to one sum; the one called `useless` adds nothing. Written in place where it can be."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.branches = nn.ModuleDict(
            {n: nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(32, 16, 1))
             for n in ("useful", "useless", "weak")}
        )  # fmt: skip
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu_(self.stem(x))
        for branch in self.branches.values():
            x = x.add(branch(x))
        return 4.0 * self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        model.branches["useless"][2].weight.zero_()
        model.branches["weak"][2].weight.mul_(0.1)
    samples = torch.randn(24, 3, 8, 8)
    captured = capture(model, (samples[:2],))
    analysis = analyse(captured)
    seen = Evidence(dict(captured.state), samples=samples)
    scores = {c.name: find("l1").score(c, seen) for c in analysis.clusters}
    measured = curves.measure(analysis, analysis.clusters, scores, samples, captured.state)
    return analysis, scores, samples, measured


def test_a_curve_is_the_hull_of_what_a_plain_run_gives(net):
    analysis, scores, samples, measured = net
    dense = analysis.captured(samples).double().log_softmax(1)
    for cluster in analysis.clusters:
        at = [round(cluster.size * s) for s in curves.SHARES]
        found = []
        for n in at:
            masked = analysis.captured.fold(analysis.masks({cluster.name: lowest(scores[cluster.name], n)}))
            other = masked(samples).double().log_softmax(1)
            found.append(float((dense.exp() * (dense - other)).sum(1).mean()))
        want = convex(at, found)
        assert measured[cluster.name].removed == want.removed
        assert measured[cluster.name].divergence == pytest.approx(want.divergence, rel=1e-6, abs=1e-12)


def test_it_is_deterministic_and_writes_to_nothing(net):
    analysis, scores, samples, measured = net
    before, state = samples.clone(), {n: v.clone() for n, v in analysis.captured.state.items()}
    again = curves.measure(analysis, analysis.clusters, scores, samples, analysis.captured.state)
    assert again == measured
    assert torch.equal(samples, before)
    assert all(torch.equal(v, state[n]) for n, v in analysis.captured.state.items())


def kept(removed):
    return {name: int((~gone).sum()) for name, gone in removed.items()}


def test_the_useless_layer_goes_first(net):
    analysis, scores, _, measured = net
    budget = Budget(0.1, align=4, floor=0.125)
    left = kept(curves.choose(analysis, analysis.clusters, scores, measured, budget))
    assert left["branches.useless.0"] < 32
    assert all(left[c.name] == c.size for c in analysis.clusters if c.name != "branches.useless.0")


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.8])
@pytest.mark.parametrize("align", [1, 4, 8])
def test_as_many_operations_go_as_layer_by_layer(net, ratio, align):
    analysis, scores, _, measured = net
    budget = Budget(ratio, align=align, floor=0.1)
    by_layer = analysis.estimate(allocate(analysis.clusters, scores, budget)).macs
    chosen = curves.choose(analysis, analysis.clusters, scores, measured, budget)
    assert analysis.estimate(chosen).macs <= by_layer
    for c in analysis.clusters:
        n = kept(chosen)[c.name]
        wider = [w for w in widths_allowed(c, budget) if w > n]
        if wider:  # nothing more would fit
            more = {**chosen, c.name: lowest(scores[c.name], c.size - wider[-1])}
            assert analysis.estimate(more).macs > by_layer
        assert n == c.size or (n % align == 0 and n >= 0.1 * c.size)
        assert chosen[c.name].tolist() == lowest(scores[c.name], c.size - n).tolist()
    if ratio == 0.5:
        assert kept(chosen)["branches.useless.0"] <= kept(chosen)["branches.weak.0"]
        assert kept(chosen)["branches.weak.0"] < kept(chosen)["branches.useful.0"]


def test_overrides_hold(net):
    analysis, scores, _, measured = net
    budget = Budget(0.5, align=4, overrides={"branches.useless.*": 0.0, "branches.useful.*": 0.75})
    left = kept(curves.choose(analysis, analysis.clusters, scores, measured, budget))
    assert left["branches.useless.0"] == 32 and left["branches.useful.0"] == 8


def test_a_batch_that_is_fixed_is_measured_in_batches_of_it():
    torch.manual_seed(0)
    model = Net().eval()
    captured = capture(model, (torch.randn(4, 3, 8, 8),), dynamic_batch=False)
    analysis = analyse(captured)
    scores = {c.name: find("l2").score(c, Evidence(dict(captured.state))) for c in analysis.clusters}
    for count in (1, 2, 11):
        found = curves.measure(analysis, analysis.clusters, scores, torch.randn(count, 3, 8, 8), captured.state)
        assert set(found) == {c.name for c in analysis.clusters}


def test_outputs_that_are_not_finite_count_as_the_worst():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)).eval()
    captured = capture(model, (torch.randn(2, 4),))
    analysis = analyse(captured)
    scores = {c.name: find("l2").score(c, Evidence(dict(captured.state))) for c in analysis.clusters}
    found = curves.measure(analysis, analysis.clusters, scores, torch.full((4, 4), 3e38), captured.state)
    assert all(np.isfinite(c.divergence).all() for c in found.values())


def test_curves_are_for_whole_groups():
    with pytest.raises(ValueError, match="structured"):
        PruneSection(scope="curves", method="unstructured")
    assert PruneSection(scope="curves").samples == 64
