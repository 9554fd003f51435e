"""What a deploy would do, without doing it: stages to run or reuse, channel groups, and the size to expect."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from pipeline import measurements, runner
from pipeline.channels.coupling.analyse import analyse
from pipeline.channels.coupling.groups import Analysis, Blocked, Cluster, Size
from pipeline.channels.coupling.layers import Layer, layers
from pipeline.drawing.widths import widths_svg
from pipeline.inquiry.dense import dense_model
from pipeline.measurements import Measurements
from pipeline.models.graph import graph_of
from pipeline.progress import Progress
from pipeline.recipe.config import Config
from pipeline.release.reuse import folder_of
from pipeline.runner import Step
from pipeline.selection import targets
from pipeline.selection.allocation import Removed
from pipeline.selection.choose import (
    Weighed,
    branches_offered,
    choose_groups,
    measured,
    observed,
    outputs_apart,
)
from pipeline.selection.cost import Timed
from pipeline.selection.kinds import policy_of
from pipeline.selection.observe import observe
from pipeline.training import masks

RATIOS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Expectation:
    """What a ratio would leave, or, where it is None, the recipe's target. `megabytes`: the parameters' bytes / 10⁶; a
    file adds a few kilobytes of graph. `divergence`: of the outputs from the dense ones, nats, by the curves of all
    clusters added up; None without curves. `latency`: of the dense model's, by the table; None without one.
    """

    ratio: float | None
    params: int
    macs: int
    megabytes: float
    divergence: float | None = None
    latency: float | None = None


@dataclass(frozen=True)
class Plan:
    """Stages, channel groups, and what the recipe's ratio would leave.

    `expectations`: the recipe's target or ratio first, then a few others for comparison. `megabytes`: of the dense
    parameters. `weights`: where those come from that the widths follow, in words; "" for initial ones.
    """

    steps: list[Step]
    analysis: Analysis
    weighed: Weighed
    expected: Size
    expectations: tuple[Expectation, ...]
    megabytes: float
    weights: str = ""

    @property
    def curve_words(self) -> list[str]:
        """How the widths came about, in sentences; none where no curves were measured."""
        measured = self.weighed.measured
        if measured is None:
            return []
        refit = ", readers fitted anew" if measured.refit else ", before any recovery"
        said = [
            f"Divergence: from the dense outputs, by the curves of all layers added up{refit}; "
            f"measured on {measured.samples} samples in {measured.seconds:.1f} s, weights: {self.weights or 'initial'}."
        ]
        if not self.weights:
            said.append(
                "Curves of initial weights say little: give --weights, or run a deploy with --until baseline first."
            )
        return said

    @property
    def removed(self) -> Removed:
        """Cluster -> True for each group that would go."""
        return self.weighed.removed

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer's width before and after, in dataflow order."""
        return layers(self.analysis, self.removed)

    def svg(self, title: str) -> str:
        """The network as a drawing, widths before and after."""
        first = self.expectations[0]
        where = "for the target" if first.ratio is None else f"at ratio {first.ratio:g}"
        params = f"parameters {self.analysis.params:,} → {first.params:,}"
        return widths_svg(self.layers, title, f"{where}: {params}, MACs {self.analysis.macs:,} → {first.macs:,}")

    def to_json(self) -> dict[str, Any]:
        """Plain values for machines."""
        return {
            "stages": [asdict(step) for step in self.steps],
            "params": self.analysis.params,
            "macs": self.analysis.macs,
            "megabytes": self.megabytes,
            "removable_share": self.analysis.removable_share,
            "removable_macs_share": self.analysis.removable_macs_share,
            "expected_params": self.expected.params,
            "expected_macs": self.expected.macs,
            "expected": [asdict(e) for e in self.expectations],
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
            "layers": [asdict(layer) for layer in self.layers],
            "weights": self.weights,
            "prices": [asdict(price) for price in self.weighed.prices],
            "branches": [branch.name for branch in self.weighed.branches],
            "blocked": [asdict(block) for block in self.analysis.blocked],
        }


def plan(config: Config, progress: Progress | None = None) -> Plan:
    """Analyse the model, and say what a deploy would do with it. Nothing is written but, for a target, what is
    measured for it, which is kept for the deploy. Raises ConfigError for a target that cannot be met.

    As it is built where the recipe cuts layer by layer, since weights decide then which channels go, not how many; else
    on the weights that a deploy would prune, as far as they are known.
    """
    runner.check(config)
    source, data, task = runner.sources(config.model, None, config)
    folder = folder_of(config)
    steps = runner.steps(config, folder, source, data, task)
    model, origin = source.build(), ""
    section = config.prune
    if section.scope == "layer" and not section.target.amounts:
        # How many go does not hang on the scores then, and nothing else is shown: the cheapest criterion will do.
        section = section.model_copy(update={"criterion": "l2"})
    elif section.method == "structured":
        model, origin = dense_model(config.baseline, source, folder, steps)
    analysis = analyse(graph_of(model, source), policy_of(section.groups))
    seen = observe(model, data, task, observed(section), analysis, section.samples, seed=section.seed)
    maskable = masks.maskable(model)
    kept = Measurements(folder / measurements.FOLDER) if section.target.amounts else Measurements()
    goals = targets.costs(section, analysis, source, maskable, kept, progress or Progress())
    apart = outputs_apart(task, source)
    worth = measured(analysis, seen, section, maskable, apart, progress, kept)
    branches = branches_offered(section, analysis, seen, goals, worth, maskable, apart, progress, kept)
    elements = sum(p.numel() for p in model.parameters())
    width = sum(p.numel() * p.element_size() for p in model.parameters()) / max(1, elements)  # bytes of one parameter

    def at(ratio: float | None) -> tuple[Weighed, Size]:
        """What the ratio leaves, or, for None, the target."""
        at_ratio = section if ratio is None else section.model_copy(update={"ratio": ratio})
        costs = goals if ratio is None else ()
        weighed = choose_groups(analysis, seen, at_ratio, at_ratio.ratio, maskable, worth, costs, branches)
        return weighed, analysis.estimate(weighed.removed, branches=True)

    asked = None if goals else section.ratio
    made = [(ratio, *at(ratio)) for ratio in dict.fromkeys((asked, *RATIOS))]
    timed = next((goal for goal in goals if isinstance(goal, Timed)), None)
    weighed, expected = made[0][1:]
    return Plan(
        steps=steps,
        analysis=analysis,
        weighed=weighed,
        expected=expected,
        expectations=tuple(
            Expectation(
                ratio,
                size.params,
                size.macs,
                size.params * width / 1e6,
                _promised(one),
                timed.of(one.removed) if timed is not None else None,
            )
            for ratio, one, size in made
        ),
        megabytes=analysis.params * width / 1e6,
        weights=origin,
    )


def _promised(weighed: Weighed) -> float | None:
    return sum(price.divergence for price in weighed.prices) if weighed.measured is not None else None


# -- for people ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """Clusters that differ in their place only: `name` with the places in braces, how many, and one of them.

    `ties`: modules whose parameters go along, written the same way; `kept`: groups that stay in each.
    """

    name: str
    count: int
    cluster: Cluster
    kept: int
    ties: str


def outline(made: Plan) -> dict[str, list[Line]]:
    """Top module -> lines, in the model's order: what repeats from block to block is said once."""
    alike: dict[tuple[Any, ...], list[Cluster]] = {}
    for cluster in made.analysis.clusters:
        kept = cluster.size - int(made.removed[cluster.name].sum())
        alike.setdefault((_pattern(cluster.name), cluster.kind, cluster.size, kept, cluster.unit), []).append(cluster)
    found: dict[str, list[Line]] = {}
    for (_, _, _, kept, _), clusters in alike.items():
        by_name = {c.name: c for c in clusters}
        for name, members in together(list(by_name)):
            tied = {_owner(n) for m in members for n, _ in by_name[m].labels} - {m.partition("@")[0] for m in members}
            top, dot, _ = name.partition(".")
            line = Line(name, len(members), by_name[members[0]], kept, _joined(tied))
            found.setdefault(top if dot else "", []).append(line)
    return found


def kept_whole(blocked: Sequence[Blocked]) -> list[tuple[str, str, int, int]]:
    """(operator and reason, one of the nodes, number of nodes, parameters), the most parameters first."""
    merged: dict[str, list[Blocked]] = {}
    for block in blocked:
        merged.setdefault(f"{block.op}: {block.reason}", []).append(block)
    rows = [(what, found[0].node, len(found), sum(b.params for b in found)) for what, found in merged.items()]
    return sorted(rows, key=lambda row: -row[3])


def together(names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Names of one pattern in as few lines as say exactly these: a.0.b, a.1.b, a.2.b -> a.{0-2}.b, each with its names.

    Where the numbers do not make a full grid (block 1 has 6 layers, block 2 has 12) there is one line per first number.
    """
    split = {name: re.split(r"(\d+)", name) for name in names}
    columns = [sorted(set(column), key=lambda part: (len(part), part)) for column in zip(*split.values(), strict=True)]
    if math.prod(len(column) for column in columns) == len(names):
        spelt = (c[0] if len(c) == 1 else "{" + _ranges([int(n) for n in c]) + "}" for c in columns)
        return [("".join(spelt), list(names))]
    first = next(at for at, column in enumerate(columns) if len(column) > 1)
    return [
        line for part in columns[first] for line in together([name for name in names if split[name][first] == part])
    ]


def _ranges(numbers: Sequence[int]) -> str:
    runs = [[n for _, n in run] for _, run in groupby(enumerate(sorted(numbers)), key=lambda item: item[1] - item[0])]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _joined(names: Iterable[str], shown: int = 4) -> str:
    """Names, those of one pattern together, at most `shown` of them."""
    patterns: dict[str, list[str]] = {}
    for name in sorted(names):
        patterns.setdefault(_pattern(name), []).append(name)
    parts = [line for found in patterns.values() for line, _ in together(found)]
    return ", ".join(parts[:shown]) + (f" and {len(parts) - shown} more" if len(parts) > shown else "")


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _owner(name: str) -> str:
    return name.rpartition(".")[0] or name
