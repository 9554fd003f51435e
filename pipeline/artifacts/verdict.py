"""What was measured on the shipped file, and the verdict."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from pipeline.artifacts.base import Artifact
from validators.gates import Measured, Verdict
from validators.scores_lost import ScoreLost


class Hop(BaseModel):
    """Parity of two neighbours in the chain, each figure that of its worst output and input.

    `judged` is False where reduced precision has a budget of its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    reference: str
    candidate: str
    passed: bool
    judged: bool = True
    max_abs: float | None
    mean_abs: float | None
    max_rel: float | None
    mean_rel: float | None
    top1_agreement: float | None
    top5_agreement: float | None = None
    ulp_p50: float | None = None
    ulp_p99: float | None = None
    cosine: float | None = None
    worst_feed: str
    feeds: int
    reasons: tuple[str, ...]


class Validated(Artifact):
    """The verdict on the shipped file, with every figure that it rests on; None is what could not be measured.

    `crashed` names the validators that broke off, and why. Such a stage is run again rather than reused.
    """

    STAGE: ClassVar[str] = "7-validate"

    verdict: Verdict
    hops: tuple[Hop, ...]
    dense_accuracy: float | None
    accuracy: float | None
    accuracy_drop_points: float | None
    accuracy_drop_low: float | None
    accuracy_drop_high: float | None
    task: str = Field("classification", description="what the model is for")
    scores: tuple[ScoreLost, ...] = Field(
        (), description="scores of dense and shipped, the first the one that is gated"
    )
    labelled: bool = Field(True, description="whether the data has labels; without them, no accuracy is known")
    made_up: bool = Field(False, description="whether there was no data, so that inputs were made up")
    agreement: float | None = Field(None, description="share of test samples answered as the dense model does")
    cosine: float | None = Field(None, description="mean cosine of the outputs with the dense model's")
    dense_latency_ms: float | None
    latency_ms: float | None
    latency_p95_ms: float | None
    latency_p99_ms: float | None
    latency_ratio: float | None
    latency_ratio_low: float | None
    latency_ratio_high: float | None
    threads: int
    batch: int = Field(1, description="at which the latency was measured")
    dense_bytes: int | None
    bytes: int | None
    dense_load_ms: float | None
    load_ms: float | None
    measurements: dict[str, Measured | None] = Field({}, description="all that a policy can limit, by key")
    notes: tuple[str, ...] = Field((), description="limits that were not judged, and disturbances of the measurement")
    complete: bool = Field(True, description="whether no validator broke off")
    crashed: dict[str, str] = Field({}, description="validators that broke off, and why")
    promoted: str = Field("", description="the version that was current when this one was measured")

    @property
    def judged_score(self) -> ScoreLost | None:
        """The score that is gated, of dense and shipped; None where none was measured, or agreement stands for it."""
        if self.scores:
            return self.scores[0]
        low, high = self.accuracy_drop_low, self.accuracy_drop_high
        if self.dense_accuracy is None or self.accuracy is None or self.accuracy_drop_points is None:
            return None
        drop = self.accuracy_drop_points
        return ScoreLost(  # of a version made before there were tasks
            name="accuracy",
            dense=self.dense_accuracy,
            shipped=self.accuracy,
            samples=0,
            share=True,
            higher_is_better=True,
            drop=Measured(value=drop, low=drop if low is None else low, high=drop if high is None else high),
            p_value=1.0,
        )


@dataclass(frozen=True)
class Promoted:
    """The version that is current while another one is measured; without one, `version` is empty and `onnx` None."""

    version: str = ""
    onnx: Path | None = None
    sha256: str = ""
    macs: int | None = None
    params: int | None = None
