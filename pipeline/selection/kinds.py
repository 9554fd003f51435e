"""Which kinds of channel groups may go, as the engine takes it."""

from __future__ import annotations

from pipeline.channels.operators.trace import Policy
from pipeline.recipe.removal import GroupSwitches


def policy_of(kinds: GroupSwitches) -> Policy:
    """The recipe's switches as the engine takes them."""
    return Policy(**kinds.model_dump())
