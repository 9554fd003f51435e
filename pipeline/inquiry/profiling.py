"""What widths cost in milliseconds: the latency table of a model, what it expects, and how well it predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foundation.errors import ConfigError
from pipeline import measurements, runner
from pipeline.channels.coupling.analyse import analyse
from pipeline.channels.coupling.groups import Analysis, Cluster
from pipeline.channels.dead.removable import Branch
from pipeline.latency.prediction import Fit
from pipeline.latency.probes import Setting
from pipeline.measurements import Measurements
from pipeline.models.graph import graph_of
from pipeline.models.source import ModelSource
from pipeline.progress import Progress
from pipeline.recipe.config import Config, as_aimed
from pipeline.recipe.prune import PruneSection
from pipeline.release.reuse import folder_of
from pipeline.selection import targets
from pipeline.selection.allocation import allocate
from pipeline.selection.choose import budget_of, choosable, choosable_branches
from pipeline.selection.cost import Timed
from pipeline.selection.kinds import policy_of
from pipeline.training import masks

RATIOS = (0.1, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Expected:
    """What is left when every layer loses `ratio` of its groups: shares of the dense model's."""

    ratio: float
    macs: float
    latency: float


@dataclass(frozen=True)
class LayerCost:
    """What a cluster of `groups` saves, of the dense model's time, when half of it goes and everything else stays."""

    cluster: str
    groups: int
    saved: float


@dataclass(frozen=True)
class Table:
    """A latency table: at which setting, on which `machine`, how long the dense model takes, and what it expects.

    `error`: a standard deviation, relative, of what it says of models that were left out of it; `checked`: these, as
    (predicted, measured).
    """

    setting: Setting
    machine: dict[str, str]
    dense_ms: float
    models: int
    error: float
    checked: tuple[tuple[float, float], ...]
    expected: tuple[Expected, ...]
    layers: tuple[LayerCost, ...]

    @property
    def title(self) -> str:
        """The setting in words."""
        threads = "1 thread" if self.setting.threads == 1 else f"{self.setting.threads} threads"
        form = "int8" if self.setting.int8 else "float32"
        return f"{threads}, batch {self.setting.batch}, {form}"

    def to_json(self) -> dict[str, Any]:
        """Plain values for machines."""
        return asdict(self)


@dataclass(frozen=True)
class Subject:
    """What is measured: a model's structure, and what the recipe lets go of it."""

    section: PruneSection
    source: ModelSource
    analysis: Analysis
    clusters: Sequence[Cluster]
    branches: Sequence[Branch]
    kept: Measurements

    @property
    def settings(self) -> list[Setting]:
        """Every setting that the recipe names."""
        return targets.settings(self.section)


def subject(config: Config) -> Subject:
    """The structure behind a recipe, and what may go of it where a latency is asked for; its weights play no part.
    Raises UserError where model or recipe is bad.
    """
    runner.check(config)
    if config.prune.method != "structured":
        raise ConfigError(
            f"A latency table is of layers' widths, and prune.method is {config.prune.method!r}.",
            "Leave the method out, or set it to structured.",
        )
    config = as_aimed(config)
    source, _, _ = runner.sources(config.model, None, config)
    section = config.prune.model_copy(update={"target": config.as_judged(config.prune.target)})
    model = source.build()
    maskable = masks.maskable(model)
    analysis = analyse(graph_of(model, source), policy_of(section.groups))
    folder = folder_of(config)
    return Subject(
        section,
        source,
        analysis,
        choosable(analysis, maskable),
        choosable_branches(analysis, maskable),
        Measurements(folder / measurements.FOLDER),
    )


def tables(given: Subject, progress: Progress) -> list[Table]:
    """The table at every setting: measured now, kept from before, or read from the recipe's device file."""
    made = []
    for setting in given.settings:
        found = targets.profiled(
            given.section,
            given.analysis,
            given.source,
            setting,
            given.clusters,
            given.branches,
            given.kept,
            progress,
        )
        fit = found.fit(given.analysis)
        made.append(
            Table(
                setting=setting,
                machine=dict(found.machine),
                dense_ms=found.dense_ms,
                models=len(found.samples),
                error=fit.error,
                checked=fit.checked,
                expected=tuple(_expected(given, fit, ratio) for ratio in RATIOS),
                layers=_layers(given, fit),
            )
        )
    return made


def _expected(given: Subject, fit: Fit, ratio: float) -> Expected:
    scores = {c.name: np.arange(c.size, dtype=float) for c in given.clusters}
    removed = allocate(given.clusters, scores, budget_of(given.section, ratio))
    cost = Timed(fit, 1.0, 1.0, 1, 1)
    return Expected(
        ratio, given.analysis.estimate(removed, branches=True).macs / max(1, given.analysis.macs), cost.of(removed)
    )


def _layers(given: Subject, fit: Fit) -> tuple[LayerCost, ...]:
    """Every cluster, the one that saves most first."""
    cost = Timed(fit, 1.0, 1.0, 1, 1)
    whole = {c.name: np.zeros(c.size, np.bool_) for c in given.clusters}
    left = cost.along(whole, [(c, (c.size, max(1, c.size // 2))) for c in given.clusters])
    rows = (
        LayerCost(cluster.name, cluster.size, dense - half)
        for cluster, (dense, half) in zip(given.clusters, left, strict=True)
    )
    return tuple(sorted(rows, key=lambda row: -row.saved))


def picture(table: Table, title: str, path: Path) -> None:
    """Draw predicted against measured into `path` (.svg or .png). Raises ConfigError where it cannot be written."""
    from pipeline.drawing.latency import plot

    try:
        plot(table.checked, (), None, title, path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}).", "Give --picture another place.") from error
