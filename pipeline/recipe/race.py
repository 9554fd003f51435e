"""Which candidates race, and which of them may ship."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasChoices, Field, field_validator

from pipeline.recipe.section import BatchSize, Seconds, Section, Seed, Threads


class OptimizeSection(Section):
    """Stage 6: which candidates race, how they are proven, and which of them may ship."""

    candidates: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        None,
        description="which candidates of the table in exporters/candidates.py to make, the first of which the others "
        "are timed against; left out: those that race by default",
    )
    int8: bool = Field(
        False,
        description="race int8-minmax, int8-entropy, int8-percentile and int8-dynamic as well, and each with -host",
    )
    ship: Literal["portable", "host"] = Field(
        "portable", description="files for any machine, or also for this one only"
    )
    prefer: Literal["latency", "size"] = Field(
        "latency", description="the fastest of those that passed, or the smallest"
    )
    ort_format: bool = Field(False, description="whether a .ort file may ship; it is made and timed either way")
    parity: float = Field(1e-5, gt=0, description="float candidates: |a-b| at most this times max(1, max|reference|)")
    max_score_lost: float = Field(
        1.0,
        ge=0,
        validation_alias=AliasChoices("max_score_lost", "max_accuracy_drop_points"),
        description="int8: the score's loss on the calibration part: points, or per cent of one that is no share",
    )
    calibration_samples: int = Field(
        256, ge=1, le=10_000_000, description="samples of the calibration part that find int8 ranges"
    )
    threads: tuple[Threads, ...] = Field((1,), min_length=1, description="onnxruntime threads to time at")
    batch_sizes: tuple[BatchSize, ...] = Field((1,), min_length=1, description="batch sizes to time at")
    seconds: Seconds = Field(5.0, description="time spent racing, for each number of threads and batch size")
    seed: Seed = 0

    @field_validator("threads", "batch_sizes")
    @classmethod
    def _positive(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if any(value < 1 for value in values):
            raise ValueError("must be at least 1")
        return values
