"""What a deploy would do, without doing it: stages to run or reuse, channel groups, and the size to expect."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pipeline import masks, models, runner
from pipeline.channels import Analysis, Size, analyse, capture
from pipeline.config import Config
from pipeline.runner import Step
from pipeline.selection import Removed
from pipeline.stages import s1_prune


@dataclass(frozen=True)
class Plan:
    """Stages, channel groups of the model as built, and what the recipe's ratio would leave."""

    steps: list[Step]
    analysis: Analysis
    removed: Removed
    expected: Size

    def to_json(self) -> dict[str, Any]:
        """Plain values for machines."""
        return {
            "stages": [asdict(step) for step in self.steps],
            "params": self.analysis.params,
            "macs": self.analysis.macs,
            "removable_share": self.analysis.removable_share,
            "expected_params": self.expected.params,
            "expected_macs": self.expected.macs,
            "clusters": [
                {
                    "name": c.name,
                    "kind": c.kind,
                    "width": c.size,
                    "kept": c.size - int(self.removed[c.name].sum()),
                    "unit": c.unit,
                    "ties": sorted({f"{name}[{dim}]" for name, dim in c.labels}),
                }
                for c in self.analysis.clusters
            ],
            "blocked": [
                {"op": b.op, "node": b.node, "reason": b.reason, "params": b.params} for b in self.analysis.blocked
            ],
        }


def plan(config: Config) -> Plan:
    """Analyse the model as it is built (weights decide which channels go, not how many). Nothing is written."""
    source, _ = runner.sources(config.model, None, config)
    model = source.build()
    analysis = analyse(capture(model, models.example(source)), s1_prune.policy_of(config.prune.groups))
    removed = s1_prune.choose_groups(
        analysis, model.state_dict(), config.prune, config.prune.ratio, masks.maskable(model)
    )
    steps = runner.plan(config.model, None, config)
    return Plan(steps, analysis, removed, analysis.estimate(removed))
