"""Rounds on the way to a target: every one takes more than the one before, and what ships is what was aimed at."""

import itertools

import pytest
import torch
from torch import nn

from foundation.errors import TargetError
from pipeline.channels import analyse
from pipeline.channels.coupling.groups import Analysis
from pipeline.measurements import Measurements
from pipeline.models.find import load
from pipeline.models.graph import graph_of
from pipeline.models.source import ModelSource
from pipeline.progress import Progress
from pipeline.recipe import config
from pipeline.recipe.prune import PruneSection
from pipeline.selection import schedules, targets
from pipeline.selection.choose import Chooser
from pipeline.selection.criteria import Evidence
from pipeline.selection.kinds import policy_of
from pipeline.selection.schedules import Course
from pipeline.stages import s1_prune
from pipeline.training import masks


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, inner, 3, padding=1), nn.Conv2d(inner, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        nn.init.uniform_(self.norm.weight, 0.05, 1.5)

    def forward(self, x):
        return x + self.norm(self.b(self.a(x).relu()))


class Net(nn.Module):
    """Four residual branches of other widths: at some goals one goes that stays at lower ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 10)
        self.blocks = nn.Sequential(*(Block(16, inner) for inner in (32, 16, 64, 24)))

    def forward(self, x):
        return self.head(self.blocks(self.stem(x).relu()).mean((2, 3)))


class World:
    """A net, what is seen of it, and a chooser that leaves `goal` of its operations."""

    def __init__(self, seed: int, goal: float, **settings: object) -> None:
        torch.manual_seed(seed)
        self.source: ModelSource = load(Net(), input_size=(3, 8, 8), seed=seed)
        self.model = self.source.build()
        self.state = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.seen = Evidence(self.state, samples=(torch.randn(16, 3, 8, 8),))
        given = {f"prune.{key}": value for key, value in settings.items()}
        self.cfg: PruneSection = config.load(
            None,
            {
                "model": "net", "prune.target.macs": goal, "prune.criterion": "l2", "prune.refit": False,
                "prune.align": 4, "prune.overrides": {"stem": 0.0}, **given,
            },
        ).prune  # fmt: skip
        self.analysis: Analysis = analyse(graph_of(self.model, self.source), policy_of(self.cfg.groups))
        maskable = masks.maskable(self.model)
        self.goals = targets.costs(self.cfg, self.analysis, self.source, maskable, Measurements(), Progress())
        self.chooser = Chooser(self.cfg, self.analysis, self.model, costs=self.goals)

    def see(self) -> Evidence:
        """The weights with their masks, as a round sees them."""
        now = {name: value.detach() for name, value in masks.originals(self.model).items()}
        return Evidence(now | {n: now[n] * m for n, m in masks.masks_of(self.model).items()}, samples=self.seen.samples)


@pytest.mark.parametrize("seed", [0, 2, 6])
@pytest.mark.parametrize("schedule", ["iterative", "gradual"])
def test_rounds_towards_a_target_only_ever_take_more_and_nothing_else_stays_masked(seed, schedule):
    world = World(seed, 0.3, schedule=schedule, steps=5)
    left = []

    def recover(name, held, on_step):
        for step in range(16 if on_step is not None else 0):
            if (found := on_step(step, 16)) is not None:
                masks.apply(world.model, found)
                left.append(masks.masks_of(world.model))
        return masks.masks_of(world.model)

    def choose(seen, ratio):
        found = world.chooser.choose(seen, ratio)
        if schedule == "iterative":
            left.append(found)
        return found

    course = Course(world.model, world.cfg.ratio, 5, 1, choose, world.see, recover, Progress())
    chosen = schedules.find(schedule)(course)
    assert len(left) >= 5
    on_the_model = masks.masks_of(world.model)
    assert on_the_model.keys() == chosen.keys()
    # Of a cluster in a branch that goes, the first group is left, whichever was left before: nothing reads it.
    inside = {name for branch in world.chooser.weighed.branches for name in branch.inside}
    unread = {name for c in world.analysis.clusters if c.name in inside for name, _ in c.labels}
    assert chosen.keys() - unread
    for name, mask in chosen.items():
        assert torch.equal(on_the_model[name], mask)
        kept = [one[name] for one in left if name in one]
        nested = all(not (later & ~earlier).any() for earlier, later in itertools.pairwise(kept))
        assert nested or name in unread
    assert world.goals[0].of(world.chooser.weighed.removed) <= 0.3


@pytest.mark.parametrize("overrides", [{"*": 0.0}, {"stem": 0.0, "blocks.*": 0.3}])
def test_branches_in_which_a_layer_is_overridden_are_no_way_to_a_target(overrides):
    with pytest.raises(TargetError, match=r"prune\.overrides"):
        World(0, 0.3, overrides=overrides)


@pytest.mark.parametrize("goal", [0.2, 0.25, 0.3])
def test_a_branch_that_goes_is_counted_as_gone(goal):
    world = World(0, goal, floor=0.3)
    chosen = world.chooser.choose(world.seen, world.cfg.ratio)
    weighed = world.chooser.weighed
    assert weighed.branches
    found = s1_prune._removed(world.analysis, chosen, weighed.branches)
    assert {name: gone.tolist() for name, gone in found.items()} == {
        name: gone.tolist() for name, gone in weighed.removed.items()
    }
    (aim,) = s1_prune._aims(world.goals, world.chooser, s1_prune.Aimed(), found)
    assert aim.expected <= goal
