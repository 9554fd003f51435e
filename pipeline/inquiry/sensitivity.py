"""How much the outputs move when a layer loses its least groups: every layer's curve, the worst first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foundation.errors import ConfigError
from pipeline import runner
from pipeline.channels.coupling.analyse import analyse
from pipeline.channels.coupling.groups import Analysis
from pipeline.inquiry.dense import dense_model
from pipeline.models.graph import graph_of
from pipeline.progress import Progress
from pipeline.recipe.config import Config
from pipeline.recipe.prune import PruneSection
from pipeline.release.reuse import folder_of
from pipeline.selection import choose
from pipeline.selection.curves import SHARES
from pipeline.selection.kinds import policy_of
from pipeline.selection.observe import observe
from pipeline.training import masks

SHOWN = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 9 / 10)
"""Of the shares where curves are measured, those that a table on a terminal has room for."""


@dataclass(frozen=True)
class LayerCurve:
    """One cluster: `divergence` (nats) at each of the shares of its `groups`; `macs_saved`: of all, 0..1, by half."""

    cluster: str
    groups: int
    divergence: tuple[float, ...]
    macs_saved: float


@dataclass(frozen=True)
class Sensitivity:
    """The curves, worst first, and how they came about. `weights`: where these come from, in words."""

    layers: tuple[LayerCurve, ...]
    shares: tuple[float, ...]
    measured_at: tuple[float, ...]
    weights: str
    words: str
    samples: int
    refit: bool
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values for machines."""
        return asdict(self)


def sensitivity(config: Config, progress: Progress | None = None) -> Sensitivity:
    """Measure the curves that `prune.scope = "curves"` decides by, on the dense weights. Nothing is written.

    Raises ConfigError for weights that a deploy would have to train first, and for a recipe that takes no whole groups.
    """
    runner.check(config)
    if config.prune.method != "structured":
        raise ConfigError(
            f"Curves are of whole groups, and prune.method is {config.prune.method!r}.",
            "Leave the method out, or set it to structured.",
        )
    said = {name: getattr(config.prune, name) for name in config.prune.model_fields_set}
    cfg = PruneSection(**said | {"scope": "curves"})
    source, data, task = runner.sources(config.model, None, config)
    folder = folder_of(config)
    model, origin = dense_model(config.baseline, source, folder, runner.steps(config, folder, source, data, task))
    if not origin:
        raise ConfigError(
            f"{config.model} has no weights yet: a deploy would train it first.",
            "Give --weights, or run `leanort deploy` with the same options and --until baseline.",
        )
    analysis = analyse(graph_of(model, source), policy_of(cfg.groups))
    seen = observe(model, data, task, choose.observed(cfg), analysis, cfg.samples, seed=cfg.seed)
    measured = choose.measured(analysis, seen, cfg, masks.maskable(model), choose.outputs_apart(task, source), progress)
    assert measured is not None, "a recipe with scope curves measures them"
    rows = [
        LayerCurve(
            cluster=name,
            groups=measured.sizes[name],
            divergence=tuple(curve.at(share * measured.sizes[name]) for share in SHARES),
            macs_saved=_saved(analysis, name, measured.sizes),
        )
        for name, curve in measured.curves.items()
    ]
    return Sensitivity(
        layers=tuple(sorted(rows, key=lambda row: -row.divergence[len(SHARES) // 2])),
        shares=SHARES,
        measured_at=measured.shares,
        weights=origin,
        words=choose.chosen_by(cfg),
        samples=measured.samples,
        refit=measured.refit,
        seconds=measured.seconds,
    )


def picture(found: Sensitivity, title: str, path: Path) -> None:
    """Draw the curves into `path` (.svg or .png). Raises ConfigError where it cannot be written."""
    from pipeline.drawing.sensitivity import plot

    try:
        plot({row.cluster: row.divergence for row in found.layers}, found.shares, title, path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}).", "Give --picture another place.") from error


def _saved(analysis: Analysis, name: str, sizes: Mapping[str, int]) -> float:
    gone = np.arange(sizes[name]) < sizes[name] // 2
    return 1.0 - analysis.estimate({name: gone}).macs / max(1, analysis.macs)
