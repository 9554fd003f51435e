"""The command line: words and exit codes only. Heavy imports are inside the commands, so that --help is instant."""

from pipeline.cli import building, bundles, gating, modules, sweeping, timing, versions
from pipeline.cli.group import main

__all__ = ["building", "bundles", "gating", "main", "modules", "sweeping", "timing", "versions"]
