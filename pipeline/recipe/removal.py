"""What may be removed at all, and the two stages that turn masks into smaller layers."""

from __future__ import annotations

from pydantic import Field

from pipeline.recipe.section import Section, Seed


class GroupSwitches(Section):
    """Which kinds of channel groups pruning may take."""

    channels: bool = True
    neurons: bool = Field(True, description="feed-forward neurons")
    heads: bool = Field(True, description="whole attention heads")
    head_positions: bool = Field(False, description="the same positions inside every head")
    residual: bool = Field(
        False,
        description="residual streams under LayerNorm; left out: true where curves decide",
    )


class FoldSection(Section):
    """Stage 3: masks into weights."""

    seed: Seed = 0


class ShrinkSection(Section):
    """Stage 4: remove dead channels."""

    seed: Seed = 0
