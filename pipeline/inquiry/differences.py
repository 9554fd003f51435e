"""What differs between two versions: recipe, channels kept per layer, figures."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

from pipeline.artifacts.eager import Baseline, Folded, Pruned
from pipeline.artifacts.program import Shrunk
from pipeline.artifacts.race import Optimized
from pipeline.artifacts.verdict import Validated
from pipeline.release import records
from pipeline.release.opening import Release

Change = tuple[str, str, str]


def differences(first: Release, second: Release) -> list[Change]:
    """(what, value in first, value in second) for everything that is not the same, recipe first."""
    return [*_recipe(first, second), *_sources(first, second), *_widths(first, second), *_figures(first, second)]


def _recipe(first: Release, second: Release) -> list[Change]:
    return _changed(*(_flat(_read_recipe(release)) for release in (first, second)))


def _sources(first: Release, second: Release) -> list[Change]:
    def facts(release: Release) -> dict[str, str]:
        made = release.manifest
        flat = {"model": made.model_fingerprint, "data": made.data_fingerprint, "commit": made.git.get("commit", "")}
        weights = next(r.files["weights.safetensors"].sha256 for r in made.stages if r.stage == Baseline.STAGE)
        shipped = next(r for r in made.stages if r.stage == Optimized.STAGE).files[release[Optimized].ships].sha256
        folded = next(r.files["weights.safetensors"].sha256 for r in made.stages if r.stage == Folded.STAGE)
        flat |= {"pruned weights": folded, "shipped file": shipped}
        tools = {f"tool {name}": version for name, version in made.tools.items()}
        return {k: v[:12] for k, v in {**flat, "dense weights": weights}.items()} | tools | made.host

    return _changed(facts(first), facts(second))


def _widths(first: Release, second: Release) -> list[Change]:
    def widths(release: Release) -> dict[str, str]:
        return {f"width {w.cluster}": f"{w.after} of {w.before}" for w in release[Pruned].widths}

    return _changed(widths(first), widths(second))


def _figures(first: Release, second: Release) -> list[Change]:
    def figures(release: Release) -> dict[str, str]:
        made = {f"{r.stage} {name}": value for r in release.manifest.stages for name, value in r.metrics.items()}
        shown = {name: f"{value:.5g}" if isinstance(value, float) else str(value) for name, value in made.items()}
        return {**shown, "verdict": release[Validated].verdict.outcome, "parameters": str(release[Shrunk].params_after)}

    return _changed(figures(first), figures(second))


def _read_recipe(release: Release) -> dict[str, Any]:
    return tomllib.loads((release.folder / records.RECIPE).read_text(encoding="utf-8"))


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return flat


def _changed(first: Mapping[str, str], second: Mapping[str, str]) -> list[Change]:
    names = [*first, *(name for name in second if name not in first)]
    pairs = [(name, first.get(name, "-"), second.get(name, "-")) for name in names]
    return [pair for pair in pairs if pair[1] != pair[2]]
