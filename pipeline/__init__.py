"""leanort from Python: the same chain as the command line, with objects in and typed results out.

    import pipeline
    release = pipeline.deploy(model, {"train": ..., "test": ...}, pipeline.Config(name="mynet"))
    release.passed, release[pipeline.Validated].latency_ratio, release.folder

Nothing is printed unless a `progress` that prints is passed in. Names load on first use, so that importing is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.artifacts import (
        Baseline,
        Exported,
        Finetuned,
        Folded,
        Optimized,
        Pruned,
        Shrunk,
        Validated,
    )
    from pipeline.progress import Progress, TerminalProgress
    from pipeline.recipe.config import Config
    from pipeline.runner import Release, deploy, open_release, plan

_HOMES = {
    **dict.fromkeys(
        ("Baseline", "Exported", "Finetuned", "Folded", "Optimized", "Pruned", "Shrunk", "Validated"),
        "pipeline.artifacts",
    ),
    "Config": "pipeline.recipe.config",
    "Progress": "pipeline.progress",
    "Release": "pipeline.runner",
    "TerminalProgress": "pipeline.progress",
    "deploy": "pipeline.runner",
    "open_release": "pipeline.runner",
    "plan": "pipeline.runner",
}

__all__ = [
    "Baseline",
    "Config",
    "Exported",
    "Finetuned",
    "Folded",
    "Optimized",
    "Progress",
    "Pruned",
    "Release",
    "Shrunk",
    "TerminalProgress",
    "Validated",
    "deploy",
    "open_release",
    "plan",
]


def __getattr__(name: str) -> Any:  # whatever the name stands for
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
