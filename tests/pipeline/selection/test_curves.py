"""Curves are measured as told, and widths follow them: greedily as well as exactly, aligned, above the floor."""

import itertools
from contextlib import contextmanager
from dataclasses import replace
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
from pipeline.progress import Progress
from pipeline.recipe.prune import PruneSection
from pipeline.selection import curves, widths
from pipeline.selection.activations import observe_readers
from pipeline.selection.allocation import Budget, allocate, lowest, widths_allowed
from pipeline.selection.criteria import RIDGE, Evidence, find
from pipeline.selection.curves import Curve, convex
from pipeline.selection.refit import Refits, flops
from pipeline.selection.widths import Steps, cheapest, exactly

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


@settings(max_examples=60, deadline=None)
@given(steps=ladders(alike=False), share=st.floats(0.05, 1.0))
def test_exactly_saves_enough_loses_the_least_and_takes_steps_in_their_order(steps, share):
    wanted = share * sum(sum(s.saved) for s in steps)
    taken = exactly(steps, wanted)
    assert total(steps, taken, "saved") >= wanted * (1 - 1e-9)
    assert total(steps, taken, "lost") == pytest.approx(exact(steps, wanted), abs=1e-6)
    greedy = cheapest(steps, wanted)
    assert total(steps, taken, "lost") <= total(steps, greedy, "lost") + 1e-6


@settings(max_examples=60, deadline=None)
@given(steps=ladders(alike=True), share=st.floats(0.05, 1.0))
def test_both_agree_where_blocks_save_alike(steps, share):
    wanted = share * sum(sum(s.saved) for s in steps)
    found = [total(steps, how(steps, wanted), "lost") for how in (cheapest, exactly)]
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_the_exact_choice_is_better_where_one_dear_block_saves_what_two_cheap_ones_do_not():
    steps = [Steps((3.0, 3.0), (1.0, 5.0)), Steps((4.0,), (1.5,))]
    assert cheapest(steps, 4.0) == [1, 1]
    assert exactly(steps, 4.0) == [0, 1]
    assert exactly(steps, 0.0) == [0, 0]
    assert exactly(steps, 99.0) == [2, 1]


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


def test_between_its_points_and_beyond_a_curve_is_the_power_that_meets_two_of_them():
    curve = convex([2, 4, 8], [1.0, 4.0, 32.0])  # of 2 up to the second point, then of 3
    assert [curve.at(n) for n in (0, 1, 2, 3, 4, 6, 8, 10)] == pytest.approx(
        [0.0, 0.25, 1.0, 2.25, 4.0, 13.5, 32.0, 62.5]
    )
    assert [convex([4], [3.0]).at(n) for n in (0, 2, 4, 8)] == pytest.approx([0.0, 1.5, 3.0, 6.0])
    assert Curve((0,), (0.0,)).at(3) == 0.0


@given(values=st.lists(st.floats(0, 1000), min_size=2, max_size=6))
def test_the_groups_that_go_first_cost_the_least(values):
    at = [10 * (k + 1) for k in range(len(values))]
    curve = convex(at, values)
    found = [curve.at(n) for n in range(at[-1] + 1)]
    assert (np.diff(found) >= -1e-9).all()
    ends = list(zip(curve.removed, curve.divergence, strict=True))
    for (a, low), (b, high) in itertools.pairwise(ends):
        steps = np.diff(found[a : b + 1])
        assert (np.diff(steps) >= -1e-6 * max(1.0, high)).all()
        assert all(found[n] <= low + (high - low) * (n - a) / (b - a) + 1e-6 for n in range(a, b + 1))


# ── widths that may be ───────────────────────────────────────────────────────────────────────────────────────────────


@given(
    size=st.integers(1, 200), unit=st.sampled_from([1, 4, 64]), align=st.sampled_from([1, 8, 16]), floor=st.floats(0, 1)
)
def test_allowed_widths_are_aligned_and_above_the_floor(size, unit, align, floor):
    allowed = widths_allowed(SimpleNamespace(name="a", size=size, unit=unit), Budget(0.5, align=align, floor=floor))
    assert allowed[0] == size and allowed == sorted(set(allowed), reverse=True)
    step = align // np.gcd(align, unit)
    for n in allowed[1:]:
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
    measured = curves.measure(analysis, analysis.clusters, scores, (samples,), captured.state).curves
    return analysis, scores, (samples,), measured


def test_a_curve_is_the_hull_of_what_a_plain_run_gives(net):
    analysis, scores, (samples,), measured = net
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
    analysis, scores, (samples,), measured = net
    before, state = samples.clone(), {n: v.clone() for n, v in analysis.captured.state.items()}
    again = curves.measure(analysis, analysis.clusters, scores, (samples,), analysis.captured.state).curves
    assert again == measured
    assert torch.equal(samples, before)
    assert all(torch.equal(v, state[n]) for n, v in analysis.captured.state.items())


def kept(removed):
    return {name: int((~gone).sum()) for name, gone in removed.items()}


def test_the_useless_layer_goes_first(net):
    analysis, scores, _, measured = net
    budget = Budget(0.1, align=4, floor=0.125)
    left = kept(widths.choose(analysis, analysis.clusters, scores, measured, budget))
    assert left["branches.useless.0"] < 32
    assert all(left[c.name] == c.size for c in analysis.clusters if c.name != "branches.useless.0")


def promised(measured, removed):
    return sum(measured[name].at(int(gone.sum())) for name, gone in removed.items())


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("align", [1, 4, 8])
def test_the_exact_choice_is_aligned_above_the_floor_within_the_operations_and_never_worse(net, ratio, align):
    analysis, scores, _, measured = net
    budget = Budget(ratio, align=align, floor=0.2, overrides={"branches.useful.*": 0.25})
    by_layer = allocate(analysis.clusters, scores, budget)
    greedy, best = (
        widths.choose(analysis, analysis.clusters, scores, measured, budget, exact=exact) for exact in (False, True)
    )
    assert analysis.estimate(best).macs <= analysis.estimate(by_layer).macs
    assert promised(measured, best) <= promised(measured, greedy) + 1e-12
    assert best["branches.useful.0"].tolist() == by_layer["branches.useful.0"].tolist()
    for c in analysis.clusters:
        n = kept(best)[c.name]
        assert n in widths_allowed(c, budget) or c.name == "branches.useful.0"
        assert best[c.name].tolist() == lowest(scores[c.name], c.size - n).tolist()


def test_the_exact_choice_finds_what_trying_all_of_them_finds(net):
    analysis, scores, _, _ = net
    # Curves on which greed goes wrong: the cheapest block per operation saves too little, so that a dear one follows.
    ends = {"stem": 9.0, "branches.useful.0": 1.0, "branches.useless.0": 1.2, "branches.weak.0": 2.0}
    made = {c.name: convex([c.size // 2, c.size], [ends[c.name] / 3, ends[c.name]]) for c in analysis.clusters}
    for ratio in (0.15, 0.3, 0.45):
        budget = Budget(ratio, align=8)
        goal = analysis.estimate(allocate(analysis.clusters, scores, budget)).macs
        allowed = [widths_allowed(c, budget) for c in analysis.clusters]
        all_ = [
            {c.name: lowest(scores[c.name], c.size - n) for c, n in zip(analysis.clusters, chosen, strict=True)}
            for chosen in itertools.product(*allowed)
        ]
        least = min(promised(made, one) for one in all_ if analysis.estimate(one).macs <= goal)
        found = widths.choose(analysis, analysis.clusters, scores, made, budget, exact=True)
        assert promised(made, found) == pytest.approx(least)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.8])
@pytest.mark.parametrize("align", [1, 4, 8])
def test_as_many_operations_go_as_layer_by_layer(net, ratio, align):
    analysis, scores, _, measured = net
    budget = Budget(ratio, align=align, floor=0.1)
    by_layer = analysis.estimate(allocate(analysis.clusters, scores, budget)).macs
    chosen = widths.choose(analysis, analysis.clusters, scores, measured, budget)
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


@pytest.mark.parametrize("exact", [False, True])
def test_the_goal_is_reached_in_a_deep_network_too_where_every_block_saves_less_than_it_seemed(exact):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 32), *(nn.Linear(32, 32) for _ in range(12)), nn.Linear(32, 5))
    analysis = analyse(capture(model.eval(), (torch.randn(2, 3, 2, 2),)))
    draw = np.random.default_rng(0)
    for align, ratio in itertools.product((1, 4, 8), (0.3, 0.5, 0.7, 0.8)):
        scores = {c.name: draw.random(c.size) for c in analysis.clusters}
        made = {c.name: convex([8, 16, 24, 29], np.cumsum(draw.random(4))) for c in analysis.clusters}
        budget = Budget(ratio, align=align, floor=0.1)
        goal = analysis.estimate(allocate(analysis.clusters, scores, budget)).macs
        chosen = widths.choose(analysis, analysis.clusters, scores, made, budget, exact=exact)
        assert analysis.estimate(chosen).macs <= goal, (align, ratio)


def test_overrides_hold(net):
    analysis, scores, _, measured = net
    budget = Budget(0.5, align=4, overrides={"branches.useless.*": 0.0, "branches.useful.*": 0.75})
    left = kept(widths.choose(analysis, analysis.clusters, scores, measured, budget))
    assert left["branches.useless.0"] == 32 and left["branches.useful.0"] == 8


# ── with readers fitted anew ─────────────────────────────────────────────────────────────────────────────────────────


class Doubled(nn.Module):
    """Every second channel of `a` and `b` is half of the one before it, so that its reader can do without it."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.b, self.after, self.c = nn.Conv2d(16, 12, 3, bias=False), nn.BatchNorm2d(12), nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 5)
        with torch.no_grad():
            for layer in (self.a, self.b):
                layer.weight[1::2] = layer.weight[::2] / 2
            self.a.bias[1::2] = self.a.bias[::2] / 2
            self.after.running_mean.uniform_(-0.2, 0.2)

    def forward(self, x):
        x = self.after(self.b(self.a(x).relu())).relu()
        return 8.0 * self.head(self.c(x).mean((2, 3)))


@pytest.fixture(scope="module")
def doubled():
    torch.manual_seed(2)
    samples = torch.randn(40, 3, 8, 8)
    captured = capture(Doubled().eval(), (samples[:2],))
    analysis = analyse(captured)
    return analysis, samples, observe_readers(captured, analysis.clusters, (samples,), grams=True)


def test_a_refit_is_the_least_squares_solution_and_keeps_the_means(doubled):
    analysis, samples, readers = doubled
    state = analysis.captured.state
    gone = np.arange(16) % 4 == 1
    made = Refits(analysis.cluster("a"), np.where(gone, np.arange(16.0), 99.0), state, readers).without(gone.sum())
    assert set(made) == {"b.weight", "after.running_mean"}  # it has no bias: the norm behind it takes the mean
    with torch.no_grad():
        x = nn.functional.conv2d(samples, state["a.weight"], state["a.bias"]).relu()
        rows = nn.functional.unfold(x, 3).transpose(1, 2).reshape(-1, 16 * 9).double()
    mean = rows.mean(0)
    centred = (rows - mean) / len(rows) ** 0.5
    old, new = (v.flatten(1).double() for v in (state["b.weight"], made["b.weight"]))
    out = torch.from_numpy(gone).repeat_interleave(9)
    ridge = (RIDGE * float(centred.square().sum(0).mean())) ** 0.5 * torch.eye(144, dtype=torch.float64)
    system = torch.cat([centred, ridge])
    change = torch.linalg.lstsq(system[:, ~out], system[:, out] @ old[:, out].T, driver="gelsd").solution
    assert torch.allclose(new[:, ~out], old[:, ~out] + change.T, atol=1e-4)
    lacks = (old @ mean) - (new.masked_fill(out, 0.0) @ mean)
    assert torch.allclose(made["after.running_mean"].double(), state["after.running_mean"] - lacks, atol=1e-5)


def test_a_refit_is_the_same_whatever_went_before(doubled):
    analysis, _, readers = doubled
    state, cluster, scores = analysis.captured.state, analysis.cluster("a"), np.arange(16.0)[::-1] % 7
    together = Refits(cluster, scores, state, readers)
    for count in (15, 1, 6):
        alone = Refits(cluster, scores, state, readers).without(count)
        for name, value in together.without(count).items():
            assert torch.equal(value, alone[name])
    few, many = (flops(cluster, counts, state, readers) for counts in ([8], [8, 4]))
    assert 144**3 / 3 < few < many
    assert flops(cluster, [8], state, {}) == 0


def test_a_gram_matrix_that_rounding_left_without_a_factor_is_loaded_until_it_has_one(doubled):
    analysis, _, readers = doubled
    (read,) = readers["b.weight"]
    rounded = read.gram.clone()
    rounded[:, 3, 5] = rounded[:, 5, 3] = 40 * rounded.diagonal(dim1=1, dim2=2).mean()  # no two columns are so alike
    broken = {"b.weight": (replace(read, gram=rounded),)}
    made = Refits(analysis.cluster("a"), np.arange(16.0), analysis.captured.state, broken).without(8)
    assert all(bool(value.isfinite().all()) for value in made.values())
    (gram,) = broken["b.weight"][0].second()
    ridges = RIDGE * float(gram.diagonal().mean()) * 10.0 ** torch.arange(9, dtype=torch.float64)
    ridge = next(one for one in ridges if one > -torch.linalg.eigvalsh(gram).min())
    assert ridge > ridges[0]
    old, new = (v.flatten(1).double() for v in (analysis.captured.state["b.weight"], made["b.weight"]))
    out = torch.arange(16).repeat_interleave(9) < 8
    stay = gram[~out][:, ~out] + ridge * torch.eye(72, dtype=torch.float64)
    assert torch.allclose((new - old)[:, ~out] @ stay, old[:, out] @ gram[out][:, ~out], rtol=1e-4, atol=1e-4)


def test_what_a_reader_can_do_without_costs_next_to_nothing_once_it_is_fitted_anew(doubled):
    analysis, samples, readers = doubled
    clusters = [analysis.cluster("a")]
    scores = {"a": find("l2").score(clusters[0], Evidence(dict(analysis.captured.state)))}
    scores["a"][1::2] -= 100.0  # the halves go first
    plain, refit = (
        curves.measure(analysis, clusters, scores, (samples,), analysis.captured.state, readers=r).curves["a"]
        for r in (None, readers)
    )
    assert refit.at(8) < 0.05 * plain.at(8)
    assert refit.at(14) > 10 * refit.at(8)


def test_readers_without_a_gram_matrix_stay_as_they_are(doubled):
    analysis, samples, _ = doubled
    bare = observe_readers(analysis.captured, analysis.clusters, (samples,), grams=False)
    assert Refits(analysis.cluster("a"), np.arange(16.0), analysis.captured.state, bare).without(4) == {}


# ── within a time ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_budget_in_seconds_takes_points_first_and_samples_then(net, monkeypatch):
    analysis, scores, (samples,), measured = net
    clock = iter(range(10**9))
    monkeypatch.setattr(curves.time, "perf_counter", lambda: float(next(clock)))  # every look is a second later

    def within(seconds):
        return curves.measure(analysis, analysis.clusters, scores, (samples,), analysis.captured.state, seconds=seconds)

    found = [within(1.1**power) for power in range(66, -1, -3)]
    few = 1 / 4, 1 / 2, 9 / 10
    plans = list(dict.fromkeys((one.shares, one.samples) for one in found))
    five = 1 / 8, 1 / 4, 1 / 2, 3 / 4, 9 / 10
    assert plans == [(curves.SHARES, 24), (five, 24), (few, 24), (few, 12), ((1 / 2,), 12), ((1 / 2,), 3)]
    assert found[0].curves == measured
    assert found[-1].curves["stem"].removed == (0, 8)


@pytest.mark.parametrize(("in_a_second", "shares"), [(1e30, curves.SHARES), (1.0, (1 / 2,))])
def test_a_budget_counts_what_the_refits_take(doubled, monkeypatch, in_a_second, shares):
    analysis, samples, readers = doubled
    clusters = [analysis.cluster("a")]
    scores = {"a": find("l2").score(clusters[0], Evidence(dict(analysis.captured.state)))}
    monkeypatch.setattr(curves, "_flops_in_a_second", lambda: in_a_second)
    found = curves.measure(
        analysis, clusters, scores, (samples,), analysis.captured.state, readers=readers, seconds=3600.0
    )
    assert found.shares == shares


def test_it_says_how_far_it_is(net):
    analysis, scores, (samples,), _ = net
    told = []

    class Told(Progress):
        @contextmanager
        def bar(self, label, total):
            assert (label, total) == ("curves", 32)
            yield lambda done, note="": told.append((done, note))

    curves.measure(analysis, analysis.clusters, scores, (samples,), analysis.captured.state, progress=Told())
    assert [done for done, _ in told] == list(range(1, 33))
    assert {name for _, name in told} == {c.name for c in analysis.clusters}


def test_a_price_is_what_a_block_loses_per_million_operations_beside_the_others(net):
    analysis, scores, _, measured = net
    budget = Budget(0.5, align=4)
    removed = widths.choose(analysis, analysis.clusters, scores, measured, budget)
    found = {p.cluster: p for p in widths.prices(analysis, analysis.clusters, measured, budget, removed)}
    for cluster in analysis.clusters:
        n, one = int(removed[cluster.name].sum()), found[cluster.name]
        curve = measured[cluster.name]
        assert (one.gone, one.divergence) == (n, curve.at(n))
        for to, price in ((n - 4, one.last), (n + 4, one.next)):
            if not 0 <= to < cluster.size:
                assert price is None
                continue
            other = {**removed, cluster.name: lowest(scores[cluster.name], to)}
            saved = abs(analysis.estimate(other).macs - analysis.estimate(removed).macs) / 1e6
            assert price == pytest.approx(abs(curve.at(to) - curve.at(n)) / saved)
    # None that stays is cheaper than one that went, by more than a block's own size.
    assert min(p.next for p in found.values() if p.next) > 0


def test_a_batch_that_is_fixed_is_measured_in_batches_of_it():
    torch.manual_seed(0)
    model = Net().eval()
    captured = capture(model, (torch.randn(4, 3, 8, 8),), dynamic_batch=False)
    analysis = analyse(captured)
    scores = {c.name: find("l2").score(c, Evidence(dict(captured.state))) for c in analysis.clusters}
    for count in (1, 2, 11):
        found = curves.measure(
            analysis, analysis.clusters, scores, (torch.randn(count, 3, 8, 8),), captured.state
        ).curves
        assert set(found) == {c.name for c in analysis.clusters}


def test_outputs_that_are_not_finite_count_as_the_worst():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)).eval()
    captured = capture(model, (torch.randn(2, 4),))
    analysis = analyse(captured)
    scores = {c.name: find("l2").score(c, Evidence(dict(captured.state))) for c in analysis.clusters}
    found = curves.measure(analysis, analysis.clusters, scores, (torch.full((4, 4), 3e38),), captured.state).curves
    assert all(np.isfinite(c.divergence).all() for c in found.values())


def test_curves_are_for_whole_groups():
    with pytest.raises(ValueError, match="structured"):
        PruneSection(scope="curves", method="unstructured")
    assert PruneSection(scope="curves").samples == 64
