"""What a latency table is of, seen from the command that measures one alone and from a deploy that takes it."""

from pathlib import Path

import torch
from torch import nn

from pipeline.channels import analyse
from pipeline.inquiry import profiling
from pipeline.latency import probes, profile
from pipeline.models.graph import graph_of
from pipeline.recipe import config
from pipeline.selection import targets
from pipeline.selection.choose import choosable, choosable_branches
from pipeline.selection.kinds import policy_of
from pipeline.training import masks


class Stream(nn.Module):
    """A residual stream between norms, as transformers have it: it may go where curves decide, and else stays whole."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(48, 32), nn.Linear(32, 10)
        self.norm, self.a, self.b = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.last = nn.LayerNorm(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x.flatten(1))
        return self.head(self.last(x + self.b(self.a(self.norm(x)).relu())))


def test_a_table_or_kit_that_is_made_without_a_target_is_what_a_deploy_with_one_asks_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = {"model": f"{Path(__file__)}:Stream", "data.input_size": [3, 4, 4]}
    alone = profiling.subject(config.load(None, recipe))
    aimed = config.load(None, {**recipe, "prune.target.latency": 0.5}).prune
    model = alone.source.build()
    analysis = analyse(graph_of(model, alone.source), policy_of(aimed.groups))
    clusters = choosable(analysis, masks.maskable(model))
    branches = choosable_branches(analysis, masks.maskable(model))
    assert any(c.size == 32 for c in clusters), "the stream may go"
    (setting,) = targets.settings(aimed)
    assert alone.settings == [setting]
    made = profile.description(alone.analysis, alone.source, setting, alone.clusters, alone.branches)
    assert made == profile.description(analysis, alone.source, setting, clusters, branches)
    assert len(made["kept"]) == probes.PROBES + 2
