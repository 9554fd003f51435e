"""Which channels go: scores (importance) and counts (allocate)."""

from pipeline.selection.allocate import Budget, Removed, allocate
from pipeline.selection.importance import group_norms

__all__ = ["Budget", "Removed", "allocate", "group_norms"]
