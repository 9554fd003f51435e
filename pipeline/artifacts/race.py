"""The candidates that raced, and which of them ships."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from pipeline.artifacts.base import Artifact


class CandidateLatency(BaseModel):
    """One candidate's median in one race, and its ratio to the reference candidate with the 95 % interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threads: int
    batch_size: int
    median_ms: float
    ratio: float
    low: float
    high: float


class Candidate(BaseModel):
    """One way to ship the model: how it was made, how it was proven, what it costs.

    `outcome`: "passed" = proven, and timed; "failed" = could not be made or is not the same function; "skipped" = this
    model or installation has none. `reason` says why it failed or was skipped, or why one that passed and is faster
    than the one that ships does not. `budget` is what it was proven by, at most `allowed` of it: float32 rounding
    (`max_scaled`, the largest error over max(1, max|reference|)), or what the score loses on the calibration part
    (`score_lost` against the shrunk model, `score_lost_dense` against the dense one; the larger
    counts), with the mean `loss` there. `session` holds the session configuration entries that it must
    be loaded with. `file` is "" where it was not kept. Sizes in bytes, `zstd_bytes` only where the zeros stayed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    technique: str = ""
    outcome: Literal["passed", "failed", "skipped"]
    reason: str = ""
    file: str = ""
    portable: bool = True
    isa: str = ""
    budget: Literal["rounding", "accuracy"] = "rounding"
    allowed: float = 0.0
    session: dict[str, str] = Field(default_factory=dict)
    max_scaled: float | None = None
    top1_agreement: float | None = None
    score_lost: float | None = Field(None, validation_alias=AliasChoices("score_lost", "accuracy_drop_points"))
    score_lost_dense: float | None = Field(
        None, validation_alias=AliasChoices("score_lost_dense", "accuracy_drop_points_dense")
    )
    loss: float | None = Field(None, validation_alias=AliasChoices("loss", "cross_entropy"))
    bytes: int = 0
    zstd_bytes: int | None = None
    load_ms: float | None = None
    peak_rss: int | None = None
    latencies: tuple[CandidateLatency, ...] = ()
    denormals: int = 0
    operators: dict[str, int] = Field(default_factory=dict)
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def reduced_precision(self) -> bool:
        """Whether it is another function on purpose, so that its score is judged and not float rounding."""
        return self.budget == "accuracy"


class Optimized(Artifact):
    """The candidates that raced, and which of them ships, and why. `statements` are what the user must know."""

    STAGE: ClassVar[str] = "6-optimize"

    onnxruntime: str
    ships: str
    shipped: str
    proven: bool
    why: str
    operators_before: dict[str, int]
    candidates: tuple[Candidate, ...]
    statements: tuple[str, ...]

    @property
    def onnx(self) -> Path:
        """The file that ships."""
        return self.folder / self.ships

    @property
    def winner(self) -> Candidate:
        """The candidate that ships."""
        return next(candidate for candidate in self.candidates if candidate.name == self.shipped)
