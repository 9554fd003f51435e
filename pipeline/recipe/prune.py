"""What is masked, and in how many rounds."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import AliasChoices, Field, field_validator, model_validator

from foundation import checkpoints
from pipeline.recipe.removal import GroupSwitches
from pipeline.recipe.section import Seconds, Section, Seed
from pipeline.recipe.target import TargetSection
from pipeline.recipe.train import Training


class PruneSection(Section):
    """Stage 1: what is masked."""

    method: Literal["structured", "unstructured", "2:4", "given", "none"] = Field(
        "structured", description="groups of channels; single weights; two of four; what is zero in `weights`; nothing"
    )
    weights: str | None = Field(
        None, description="method given: a checkpoint that was pruned elsewhere, its zeros written out or still masks"
    )
    ratio: float = Field(0.5, ge=0.0, lt=1.0, description="share of groups (structured) or weights to remove")
    criterion: str = Field(
        "l2",
        # `norm` is how it was called while norms were all there was.
        validation_alias=AliasChoices("criterion", "norm"),
        description="how much a group matters: l2, taylor, fisher, wanda, ...; those that matter least go",
    )
    target: TargetSection = TargetSection()
    scope: Literal["layer", "global", "curves"] = Field(
        "layer", description="rank inside each layer, over the whole model, or by measured loss per operation saved"
    )
    samples: int = Field(64, ge=1, le=100_000, description="calibration samples that curves are measured on")
    seconds: Seconds | None = Field(None, description="time for measuring curves; where it is short, fewer points")
    refit: bool = Field(True, description="measure curves with whatever reads a group fitted anew")
    allocation: Literal["greedy", "exact"] = Field(
        "greedy", description="widths by curves: the cheapest block first, or an integer program on top of that"
    )
    depth: bool = Field(True, description="with a target: residual branches may go as a whole, where that loses less")
    align: int | Literal["auto"] = Field("auto", description="kept channels are a multiple; auto = host vector block")
    floor: float = Field(0.1, ge=0.0, le=1.0, description="share of every layer's groups that always stays")
    overrides: dict[str, float] = Field(default_factory=dict, description="layer glob -> ratio")
    groups: GroupSwitches = GroupSwitches()
    schedule: str = Field("one-shot", description="one-shot, iterative or gradual (cubic)")
    steps: int = Field(
        3, ge=1, le=100_000, description="rounds of iterative pruning; mask updates per epoch when gradual"
    )
    train: Training = Field(None, description="the recovery between rounds (iterative, gradual)")
    seed: Seed = 0

    @field_validator("align")
    @classmethod
    def _align(cls, value: int | str) -> int | str:
        if isinstance(value, int) and not 1 <= value <= 65_536:
            raise ValueError("must be 1 to 65536, or 'auto'")
        return value

    @field_validator("overrides")
    @classmethod
    def _overrides(cls, value: dict[str, float]) -> dict[str, float]:
        for glob, ratio in value.items():
            if not 0.0 <= ratio < 1.0:  # NaN, too
                raise ValueError(f"the ratio for {glob!r} must be in [0, 1), got {ratio}")
        return value

    def code(self) -> dict[str, str]:
        """Each file of the pruned checkpoint, and the file of a device -> its sha256."""
        return self.target.code() | ({} if self.weights is None else checkpoints.digests(self.weights))

    @model_validator(mode="before")
    @classmethod
    def _streams_by_curves(cls, values: Any) -> Any:
        """Where curves decide, residual streams may go as well unless the recipe says otherwise: what one loses is
        measured like anything else, and the layers around a whole stream come to the end of what they can save.
        """
        if not isinstance(values, dict) or values.get("scope") != "curves":
            return values
        if values.get("method", "structured") != "structured":  # what is given, or stays, was chosen by nothing
            return values
        groups = values.get("groups", {})
        named = groups.model_dump(exclude_unset=True) if isinstance(groups, GroupSwitches) else groups
        return {**values, "groups": {"residual": True, **named}} if isinstance(named, dict) else values

    @model_validator(mode="after")
    def _given(self) -> PruneSection:
        if (self.method == "given") != (self.weights is not None):
            raise ValueError("method 'given' goes with weights, the checkpoint that was pruned, and with nothing else")
        return self

    @model_validator(mode="after")
    def _curves(self) -> PruneSection:
        if self.scope == "curves" and self.method not in ("structured", "given", "none"):
            raise ValueError(f"scope 'curves' is for method 'structured', not {self.method!r}: use layer or global")
        return self

    @model_validator(mode="after")
    def _aimed(self) -> PruneSection:
        asked = self.target.amounts
        if asked and self.method != "structured":
            raise ValueError(
                f"a target ({', '.join(asked)}) is met by removing channels: it goes with method 'structured', "
                f"not with {self.method!r}"
            )
        if asked and not self.ratio:
            raise ValueError("ratio is 0, and there is a target: leave the ratio out, the target decides")
        return self
