"""What a release must reach, and how that is measured."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import AliasChoices, ConfigDict, Field, field_validator, model_validator

from foundation.errors import brief
from pipeline.recipe.section import BatchSize, Seconds, Section, Seed, Threads, file_digests

RATIOS = ("latency", "latency_p99", "file_size", "session_load", "peak_memory", "cold_first_inference", "parameters")


class Rule(Section):
    """A limit on one metric: as it is, or against the dense or the promoted model.

    Against another model, accuracies count the points lost, further metrics what their mean lost, and everything else
    is a ratio. A rule against the promoted version binds only once there is one.
    """

    model_config = ConfigDict(allow_inf_nan=True)  # infinity is no limit

    metric: str = Field(description="one that the gate measures: accuracy, latency, latency_p99, file_size, ...")
    against: Literal["dense", "promoted"] | None = None
    max: float | None = None
    min: float | None = None
    level: Literal["required", "warn"] = "required"
    by: Literal["value", "interval"] | None = Field(None, description="interval: all of it must be inside the limit")

    @model_validator(mode="after")
    def _bounded(self) -> Rule:
        if self.max is None and self.min is None:
            raise ValueError(f"the limit on {brief(self.metric)} has neither max nor min")
        if any(value is not None and math.isnan(value) for value in (self.max, self.min)):
            raise ValueError(f"the limit on {brief(self.metric)} is not a number")
        if self.max is not None and self.min is not None and self.min > self.max:
            raise ValueError(f"the limit on {brief(self.metric)} can never hold: min is above max")
        share = self.metric in ("accuracy", "top5")
        if share and self.against is None and self.min is not None and self.min > 1:
            raise ValueError(f"the limit on {brief(self.metric)} can never hold: it is a share, at most 1")
        if not share and self.metric in RATIOS and self.max is not None and self.max <= 0:
            raise ValueError(f"the limit on {brief(self.metric)} can never hold: it is never 0 or less")
        return self


class Policy(Section):
    """What a release must reach; the gate section of a recipe, or a file of its own."""

    model_config = ConfigDict(allow_inf_nan=True)  # infinity is no limit

    max_score_lost: float = Field(
        1.0,
        validation_alias=AliasChoices("max_score_lost", "max_accuracy_drop_points"),
        description="what the task's score may lose from dense to shipped: points, or per cent of one that is no share",
    )
    score_by: Literal["value", "interval"] = Field(
        "value",
        validation_alias=AliasChoices("score_by", "accuracy_by"),
        description="judge the measured loss, or its whole 95 % interval",
    )
    min_agreement: float = Field(
        0.95, ge=0, le=1, description="where the data has no labels: share of samples answered as dense does"
    )
    min_cosine: float = Field(
        0.9, ge=-1, le=1, description="where the data has no labels: mean cosine of the outputs with the dense ones"
    )
    max_latency_ratio: float = Field(1.0, gt=0, description="shipped over dense latency, medians")
    max_size_ratio: float = Field(1.0, gt=0, description="shipped over dense file size")
    parity: float = Field(1e-5, gt=0, le=1e6, description="|a-b| at most this times max(1, max|reference|), every hop")
    limits: tuple[Rule, ...] = Field((), description="further limits")

    @field_validator("max_score_lost")
    @classmethod
    def _number(cls, value: float) -> float:
        if math.isnan(value):
            raise ValueError("is not a number")
        return value


class GateSection(Policy):
    """Stage 7: limits, and how what they limit is measured."""

    threads: Threads = Field(1, description="onnxruntime threads for the latency")
    batch_size: BatchSize = Field(1, description="batch size for the latency")
    seconds: Seconds = Field(4.0, description="time for measuring latency; less where it is decided earlier")
    metrics: tuple[str, ...] = Field((), description="also: top5, cosine, spearman, path/to/file.py:callable")
    seed: Seed = 0

    def code(self) -> dict[str, str]:
        """The files of the user's own metrics -> their sha256."""
        return file_digests(*self.metrics)
