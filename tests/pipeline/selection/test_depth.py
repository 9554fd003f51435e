"""Whole residual branches as a choice: which there are, what masks make them add nothing, and when one goes."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from foundation.errors import ConfigError
from pipeline.channels import analyse, capture, liveness, shrink
from pipeline.channels.dead.branches import without_zero_branches
from pipeline.channels.dead.removable import removable
from pipeline.channels.program.macs import count_macs
from pipeline.measurements import Measurements
from pipeline.progress import Progress
from pipeline.recipe.prune import PruneSection
from pipeline.recovery import closed_form
from pipeline.selection import branches, choose, curves, targets, widths
from pipeline.selection.allocation import Budget
from pipeline.selection.cost import Counted
from pipeline.selection.criteria import Evidence
from pipeline.selection.curves import convex
from pipeline.selection.widths import Depth, choose_depth
from pipeline.training import masks


class Block(nn.Module):
    def __init__(self, width=8, inner=16):
        super().__init__()
        self.a, self.b = nn.Conv2d(width, inner, 3, padding=1), nn.Conv2d(inner, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        y = self.norm(self.b(self.a(x).relu()))
        y += x
        return y.relu_()


class Attention(nn.Module):
    """A block of a transformer: attention and neurons, each on a residual stream."""

    def __init__(self, width=16):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x):
        y = self.norms[0](x)
        q, k, v = (f(y).unflatten(-1, (4, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        return x + self.down(self.up(self.norms[1](x)).relu())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(Block(), Block(), Block())
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x).relu()).mean((2, 3)))


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.layers, self.head = nn.Linear(6, 16), nn.Sequential(Attention(), Attention()), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.layers(self.stem(x)).mean(1))


class Tied(Net):
    """The last layer of one branch is another one's, too."""

    def __init__(self):
        super().__init__()
        self.blocks[2].b = self.blocks[1].b


def analysed(build, shape):
    torch.manual_seed(0)
    model = build().eval()
    return model, analyse(capture(model, (torch.randn(shape),)))


@pytest.mark.parametrize(
    ("build", "shape", "names"),
    [
        (Net, (2, 3, 8, 8), ["blocks.0", "blocks.1", "blocks.2"]),
        (Text, (2, 7, 6), ["layers.0.out", "layers.0.down", "layers.1.out", "layers.1.down"]),
        (Tied, (2, 3, 8, 8), ["blocks.0"]),
    ],
)
def test_every_branch_that_may_go_is_found_and_its_masks_make_it_go(build, shape, names):
    model, analysis = analysed(build, shape)
    found = removable(analysis, masks.maskable(model))
    assert [branch.name for branch in found] == names
    for branch in found:
        folded = analysis.captured.fold(branch.masks(analysis.captured.state))
        left, gone = without_zero_branches(folded, analysis.policy)
        assert [one.node for one in gone] == [branch.node]
        again = analyse(left)
        assert not {c.name for c in again.clusters} & set(branch.inside)
        small = shrink(left, again, liveness(again, left.state).dead)
        x = torch.randn(shape)
        assert torch.allclose(folded(x), small(x), atol=1e-6)


@pytest.mark.parametrize(("build", "shape"), [(Net, (2, 3, 8, 8)), (Text, (2, 7, 6))])
def test_a_branch_that_goes_is_counted_with_nothing_left_of_it(build, shape):
    """Not as if one of its heads or channels stayed: of attention with four heads that would be a quarter."""
    model, analysis = analysed(build, shape)
    for branch in removable(analysis, masks.maskable(model)):
        removed = {c.name: np.full(c.size, c.name in branch.inside) for c in analysis.clusters}
        left, _ = without_zero_branches(analysis.captured.fold(branch.masks(analysis.captured.state)), analysis.policy)
        assert analysis.estimate(removed, branches=True).macs == count_macs(left.program)


@pytest.mark.parametrize(("build", "shape"), [(Net, (2, 3, 8, 8)), (Text, (2, 7, 6))])
def test_where_no_branch_goes_one_group_of_each_cluster_stays_and_is_counted(build, shape):
    _, analysis = analysed(build, shape)
    removed = {c.name: np.ones(c.size, dtype=bool) for c in analysis.clusters}
    small = shrink(analysis.captured.fold(analysis.masks(removed)), analysis, removed)
    size = analysis.estimate(removed)
    assert size.macs == count_macs(small.program)
    assert size.params == sum(p.numel() for p in small.program.parameters())


def test_what_cannot_be_masked_does_not_go():
    model, analysis = analysed(Net, (2, 3, 8, 8))
    maskable = frozenset(name for name in masks.maskable(model) if not name.startswith("blocks.1.norm"))
    assert [branch.name for branch in removable(analysis, maskable)] == ["blocks.0", "blocks.2"]


def test_what_a_branch_costs_is_how_far_the_outputs_move_without_it():
    model, analysis = analysed(Net, (2, 3, 8, 8))
    sets = {b.name: b.masks(analysis.captured.state) for b in removable(analysis, masks.maskable(model))}
    x = torch.randn(16, 3, 8, 8)
    lost = curves.masked(analysis, sets, (x,), analysis.captured.state)
    for at in range(3):
        kept, model.blocks[at].forward = model.blocks[at].forward, lambda x: x.relu()
        other = model(x)
        model.blocks[at].forward = kept
        want = curves.class_shares((model(x),))((other,))
        assert lost[f"blocks.{at}"] == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(("loss", "gone"), [(0.01, ("blocks.1",)), (50.0, ())])
def test_a_branch_goes_where_that_loses_less_than_width_elsewhere(loss, gone):
    _, analysis = analysed(Net, (2, 3, 8, 8))
    scores = {c.name: np.arange(c.size, dtype=float) for c in analysis.clusters}
    made = {c.name: convex([c.size // 2, c.size], [1.0, 4.0]) for c in analysis.clusters}
    inside = {f"blocks.{at}": [f"blocks.{at}.a"] for at in range(3)}
    branches = {name: (clusters, loss if name == "blocks.1" else 90.0) for name, clusters in inside.items()}
    cost = Counted(analysis, "macs", 0.6, 1.0)
    removed, chosen, *_ = choose_depth(
        analysis,
        analysis.clusters,
        scores,
        made,
        Budget(0.5, align=4, floor=0.1, overrides={"stem": 0.0}),
        [cost],
        branches,
    )
    assert chosen == gone
    assert cost.of(removed) <= 0.6
    assert removed["blocks.1.a"].all() == bool(gone)
    if gone:  # the others keep more than they would without
        alone, *_ = choose_depth(
            analysis, analysis.clusters, scores, made, Budget(0.5, align=4, floor=0.1, overrides={"stem": 0.0}), [cost]
        )
        assert sum(int(g.sum()) for n, g in removed.items() if n != "blocks.1.a") < sum(
            int(g.sum()) for n, g in alone.items() if n != "blocks.1.a"
        )


def test_a_goal_that_width_alone_does_not_reach_is_reached_with_depth():
    _, analysis = analysed(Net, (2, 3, 8, 8))
    scores = {c.name: np.arange(c.size, dtype=float) for c in analysis.clusters}
    made = {c.name: convex([c.size // 2, c.size], [1.0, 4.0]) for c in analysis.clusters}
    branches = {f"blocks.{at}": ([f"blocks.{at}.a"], 30.0) for at in range(3)}
    cost = Counted(analysis, "macs", 0.4, 1.0)
    budget = Budget(0.5, align=4, floor=0.5, overrides={"stem": 0.0})
    without, *_ = choose_depth(analysis, analysis.clusters, scores, made, budget, [cost])
    removed, chosen, *_ = choose_depth(analysis, analysis.clusters, scores, made, budget, [cost], branches)
    assert cost.of(without) > 0.4 >= cost.of(removed) and chosen


def test_a_target_that_only_depth_reaches_is_not_refused_before_it_is_tried():
    model, analysis = analysed(Net, (2, 3, 8, 8))
    cost, maskable = Counted(analysis, "macs", 0.3, 1.0), masks.maskable(model)
    shape = {"align": 1, "floor": 0.8, "target": {"macs": 0.3}}
    targets.check(PruneSection(**shape, scope="curves"), analysis, analysis.clusters, [cost], maskable)
    for other in ({"scope": "layer"}, {"scope": "curves", "depth": False}):
        with pytest.raises(ConfigError, match="cannot be reached"):
            targets.check(PruneSection(**shape, **other), analysis, analysis.clusters, [cost], maskable)


def test_the_least_that_can_be_had_is_that_without_the_branches():
    model, analysis = analysed(Net, (2, 3, 8, 8))
    maskable, said = masks.maskable(model), {}
    for depth in (True, False):
        cfg = PruneSection(align=1, floor=0.8, target={"macs": 1e-3}, scope="curves", depth=depth)
        with pytest.raises(ConfigError) as caught:
            targets.check(cfg, analysis, analysis.clusters, [Counted(analysis, "macs", 1e-3, 1.0)], maskable)
        said[depth] = float(re.search(r"the least is (0\.\d+)", caught.value.message)[1])
    inside = {c.name for c in analysis.clusters if c.name.endswith(".a")}
    kept = {c.name: np.arange(c.size) >= math.ceil(0.8 * c.size) for c in analysis.clusters}
    gone = {name: np.ones_like(flags) if name in inside else flags for name, flags in kept.items()}
    for depth, removed in ((True, gone), (False, kept)):
        assert said[depth] == pytest.approx(Counted(analysis, "macs", 1e-3, 1.0).of(removed), rel=0.01)


def test_branches_go_one_after_another_where_no_widths_and_no_single_branch_are_enough():
    _, analysis = analysed(Net, (2, 3, 8, 8))
    clusters = analysis.clusters
    scores = {c.name: np.arange(c.size, dtype=float) for c in clusters}
    made = {c.name: convex([c.size // 2, c.size], [1.0, 4.0]) for c in clusters}
    losses = {"blocks.0": 30.0, "blocks.1": 70.0, "blocks.2": 50.0}
    branches = {name: ([f"{name}.a"], loss) for name, loss in losses.items()}
    budget = Budget(0.5, align=4, floor=0.5, overrides={"stem": 0.0})
    whole = {c.name: np.zeros(c.size, dtype=bool) for c in clusters}

    def left(gone):
        """With these branches gone and half of every other width."""
        half = {name: np.arange(len(flags)) < len(flags) // 2 for name, flags in whole.items() if name.endswith(".a")}
        return Counted(analysis, "macs", 1.0, 1.0).of(
            whole | half | {f"{name}.a": np.ones_like(whole[f"{name}.a"]) for name in gone}
        )

    goal = (left(["blocks.0", "blocks.2"]) + left(["blocks.0"])) / 2
    assert goal < left(["blocks.0"])  # one is not enough
    removed, chosen, *_ = choose_depth(
        analysis, clusters, scores, made, budget, [Counted(analysis, "macs", goal, 1.0)], branches
    )
    assert set(chosen) == {"blocks.0", "blocks.2"}  # the two that lose the least
    assert Counted(analysis, "macs", goal, 1.0).of(removed) <= goal


def test_branches_go_together_where_one_alone_saves_less_than_a_block_elsewhere():
    """Of all sets of branches about the best is found at each goal, also where a single one makes nothing better."""
    _, analysis = analysed(Net, (2, 3, 8, 8))
    clusters = analysis.clusters
    scores = {c.name: np.arange(c.size, dtype=float) for c in clusters}
    steep = {"stem": [0.6, 4.0], "blocks.0.a": [0.01, 0.05], "blocks.1.a": [0.01, 0.05], "blocks.2.a": [0.01, 0.05]}
    made = {c.name: convex([c.size // 2, c.size], steep[c.name]) for c in clusters}
    branches = {f"blocks.{at}": ([f"blocks.{at}.a"], loss) for at, loss in enumerate((0.12, 0.1, 0.14))}
    budget = Budget(0.5, align=4, floor=0.1)

    def lost(cost, gone):
        found = widths._Widths(
            analysis, clusters, scores, made, budget, [cost], {name: branches[name] for name in gone}
        )
        level = widths._greedy(found)
        return np.inf if found.missed(found.left(level)) else found.lost(level)

    helped = []
    for goal in np.linspace(0.1, 0.7, 25):
        cost = Counted(analysis, "macs", float(goal), 1.0)
        removed, chosen, *_ = choose_depth(analysis, clusters, scores, made, budget, [cost], branches)
        every = [gone for n in range(4) for gone in itertools.combinations(branches, n)]
        best = min(lost(cost, gone) for gone in every)
        assert cost.of(removed) <= goal
        assert lost(cost, chosen) <= best * 1.05
        single = min(lost(cost, gone) for gone in every if len(gone) < 2)
        helped.append(lost(cost, ()) <= single and best < single * 0.9)
    assert any(helped)


def seen_of(analysis, judges=32, others=64):
    x = torch.randn(judges + others, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return Evidence(dict(analysis.captured.state), samples=(x[:judges],), others=(x[judges:],))


def test_what_a_branch_costs_is_measured_after_the_rest_was_fitted():
    """To samples that do not judge it; what the fit reaches is what a recovery of the same masks reaches."""
    model, analysis = analysed(Net, (2, 3, 8, 8))
    seen, found = seen_of(analysis), removable(analysis, masks.maskable(model))
    plain, fitted = (branches.lost(analysis, found, seen, None, Progress(), refit=refit) for refit in (False, True))
    captured = analysis.captured
    for one in found:
        gone = one.masks(captured.state)
        made = closed_form.recover(captured, {name: torch.from_numpy(mask) for name, mask in gone.items()}, seen.others)
        cut = captured.with_state(made.state).fold(gone)
        want = curves.class_shares((model(*seen.samples),))((cut(*seen.samples),))
        assert fitted[one.node] == pytest.approx(min(plain[one.node], want), rel=1e-3)
    assert sum(fitted.values()) < 0.7 * sum(plain.values())


def test_branches_that_there_is_no_time_to_fit_count_as_the_others_do(monkeypatch):
    model, analysis = analysed(Net, (2, 3, 8, 8))
    seen, found = seen_of(analysis), removable(analysis, masks.maskable(model))

    def lost(seconds, seen=seen):
        monkeypatch.setattr(branches, "SECONDS", seconds)
        return branches.lost(analysis, found, seen, None, Progress(), refit=True)

    plain = branches.lost(analysis, found, seen, None, Progress(), refit=False)
    first = min(plain, key=plain.get)
    parts = {name: value / plain[name] for name, value in lost(0.0).items()}
    assert parts[first] == pytest.approx(lost(60.0)[first] / plain[first])
    assert list(parts.values()) == pytest.approx([parts[first]] * 3) and parts[first] < 1
    assert lost(60.0, seen_of(analysis, others=4)) == plain  # too few samples for a fit


def test_a_whole_choice_is_tried_after_a_fit_and_kept_by_what_goes(tmp_path):
    model, analysis = analysed(Net, (2, 3, 8, 8))
    maskable, seen, kept = masks.maskable(model), seen_of(analysis), Measurements(tmp_path)
    offered = choose.branches_worth(analysis, seen, maskable, None, kept=kept)
    assert set(offered.alone) == set(removable(analysis, maskable))
    gone = {name: mask for one in offered.alone for name, mask in one.masks(analysis.captured.state).items()}
    made = closed_form.recover(
        analysis.captured, {name: torch.from_numpy(mask) for name, mask in gone.items()}, seen.others
    )
    cut = analysis.captured.with_state(made.state).fold(gone)
    want = curves.class_shares((model(*seen.samples),))((cut(*seen.samples),))
    assert offered.tried(gone) == pytest.approx(want, rel=1e-3)
    files = len(list(tmp_path.glob("branches-*")))
    assert offered.tried(dict(reversed(gone.items()))) == offered.tried(gone)
    assert len(list(tmp_path.glob("branches-*"))) == files == 2
    fewer = {name: np.ones_like(mask) for name, mask in gone.items()}
    assert offered.tried(fewer) == pytest.approx(0, abs=1e-6)


def found(branches, missed=0.0):
    return Depth({}, tuple(branches), missed)


def test_of_dearer_and_dearer_branches_the_choice_that_loses_least_as_a_whole_is_taken(monkeypatch):
    """Whatever was promised; what misses its goal is none, and what there is no time for is not taken."""
    led = {1.0: found("abc"), 2.0: found("ab"), 4.0: found("a"), 1e9: found("")}
    loses = {("a", "b", "c"): 0.5, ("a", "b"): 0.4, ("a",): 0.2, (): 0.3}
    asked = []

    def tried(depth):
        asked.append(depth.branches)
        return loses[depth.branches]

    assert choose._deep(led.__getitem__, tried) == (led[4.0], 4.0)
    assert asked == [(), ("a",), ("a", "b"), ("a", "b", "c")]
    for times, gone in ((2.0, ("a", "b")), (1.0, ("a", "b", "c"))):
        loses[gone] = 0.1 / len(gone)
        assert choose._deep(led.__getitem__, tried) == (led[times], times)
    needed = dict.fromkeys((2.0, 4.0, 1e9), found("a", missed=0.1)) | {1.0: found("abc")}
    assert choose._deep(needed.__getitem__, lambda depth: 1 / 0) == (needed[1.0], 1.0)
    assert choose._deep({1.0: found("")}.__getitem__, lambda depth: 1 / 0)[0].branches == ()
    monkeypatch.setattr(choose, "SECONDS", 0.0)
    assert choose._deep(led.__getitem__, tried) == (led[1e9], 1e9)


def test_a_goal_next_to_the_one_before_takes_over_how_dear_branches_were_best(monkeypatch):
    """An aim asks for nearly the same again and again: branches do not come and go, and nothing is tried anew."""
    model, analysis = analysed(Net, (2, 3, 8, 8))
    tried = []

    def worth(analysis, seen, maskable, *args, **options):
        alone = dict.fromkeys(removable(analysis, maskable), 1e-6)
        return choose.Offered(alone, lambda given: tried.append(given) or len(tried))

    monkeypatch.setattr(choose, "branches_worth", worth)
    cfg = PruneSection(target={"macs": 0.4}, scope="curves", criterion="l2", refit=False, align=1)
    chooser = choose.Chooser(cfg, analysis, model)

    def asked(goal):
        chooser.costs = (Counted(analysis, "macs", goal, 1.0),)
        chooser.choose(seen_of(analysis), cfg.ratio)
        return len(tried)

    first = asked(0.4)
    assert first > 1 and chooser.weighed.dearer != 1.0  # the first to be tried loses least here
    assert asked(0.39) == asked(0.41) == first
    more = asked(0.3)
    assert more > first and asked(0.4) == more
