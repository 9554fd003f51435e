"""What became of the points: one row each, read off its version or saying why there is none; which of them are best."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from foundation.errors import Explained, LeanortError
from pipeline.artifacts.eager import Aim, Baseline, Finetuned, Pruned
from pipeline.artifacts.program import Shrunk
from pipeline.artifacts.verdict import Validated
from pipeline.release import judging
from pipeline.release.opening import Release
from pipeline.report.outcome import EXIT_CODES, judged, reasons
from pipeline.sweep.points import Axis
from validators.gates import Measured
from validators.scores_lost import ScoreLost

REFUSED, BROKEN = 2, 3
_WORST = (BROKEN, REFUSED, EXIT_CODES["fail"], EXIT_CODES["inconclusive"], EXIT_CODES["pass"])
"""Exit codes, the worst first: nothing was made, nothing could be, it may not ship, nobody knows, all is well."""


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Figures(_Plain):
    """What a version was measured to be; None is what could not be. Latencies in ms, sizes in bytes."""

    aim: Aim | None = Field(description="the target of the swept quantity, as it stood before training")
    score: ScoreLost | None
    agreement: float | None = Field(description="share of test samples answered as dense does; without labels")
    latency_ms: float | None
    dense_latency_ms: float | None
    latency: Measured | None = Field(description="of dense, both timed in turns, with its interval")
    threads: int
    bytes: int | None
    dense_bytes: int | None
    params: int
    dense_params: int
    macs: int
    dense_macs: int

    @property
    def worth(self) -> Measured | None:
        """The task's own score of what ships, and where it may lie: the score of dense less what was lost."""
        if self.score is None:
            found = self.agreement
            return None if found is None else Measured(value=found, low=found, high=found)
        one = self.score
        step = 0.01 if one.share else 0.01 * abs(one.dense)
        ends = [one.dense - (step if one.higher_is_better else -step) * lost for lost in (one.drop.low, one.drop.high)]
        return Measured(value=one.shipped, low=min(ends), high=max(ends))

    @property
    def dense_worth(self) -> float | None:
        """The same score of the dense model."""
        if self.score is not None:
            return self.score.dense
        return None if self.agreement is None else 1.0

    @property
    def size(self) -> float | None:
        """The file that ships, of the dense one."""
        return self.bytes / self.dense_bytes if self.bytes and self.dense_bytes else None


class Row(_Plain):
    """What became of one point. `code` is the exit code that `leanort deploy` gives for it."""

    value: str
    code: int
    outcome: Literal["pass", "fail", "inconclusive", "refused", "broken", "lost"]
    reasons: tuple[str, ...] = ()
    version: str = Field("", description='"" where none was made')
    folder: str = Field("", description="the version's, on the machine that made it")
    host: str = Field(default_factory=platform.node)
    cpu: str = ""
    figures: Figures | None = None


def of(axis: Axis, value: str, release: Release) -> Row:
    """The row of a version."""
    checked, shrunk, dense = release[Validated], release[Shrunk], release[Baseline]
    left_out = judging.untrained(checked, release[Finetuned])
    untrained = () if left_out is None else (f"Training: {left_out}.",)
    ratio, low, high = checked.latency_ratio, checked.latency_ratio_low, checked.latency_ratio_high
    return Row(
        value=value,
        code=EXIT_CODES[checked.verdict.outcome],
        outcome=checked.verdict.outcome,
        reasons=(*reasons(checked.verdict, [judged(check) for check in checked.verdict.checks]), *untrained),
        version=release.folder.name,
        folder=str(release.folder.resolve()),
        cpu=release.manifest.host.get("cpu", ""),
        figures=Figures(
            aim=next((aim for aim in release[Pruned].aims if aim.quantity == axis), None),
            score=checked.judged_score,
            agreement=checked.agreement,
            latency_ms=checked.latency_ms,
            dense_latency_ms=checked.dense_latency_ms,
            latency=None
            if ratio is None
            else Measured(value=ratio, low=ratio if low is None else low, high=ratio if high is None else high),
            threads=checked.threads,
            bytes=checked.bytes,
            dense_bytes=checked.dense_bytes,
            params=shrunk.params_after,
            dense_params=dense.params,
            macs=shrunk.macs_after,
            dense_macs=dense.macs,
        ),
    )


def without(value: str, error: Explained) -> Row:
    """The row of a point that no version was made of, for a reason that we know."""
    code = error.exit_code if isinstance(error, LeanortError) else BROKEN
    refused = code == REFUSED
    return Row(
        value=value, code=code, outcome="refused" if refused else "broken", reasons=(error.message, *_hint(error))
    )


def unexpected(value: str, told: str) -> Row:
    """The row of a point at which something broke that we do not know."""
    return Row(value=value, code=BROKEN, outcome="broken", reasons=(told,))


def lost(value: str) -> Row:
    """The row of a point that was begun and never ended."""
    return Row(
        value=value,
        code=BROKEN,
        outcome="lost",
        reasons=("Every worker that began it was lost or broken off.", "The same command begins it again."),
    )


def _hint(error: Explained) -> tuple[str, ...]:
    return (error.hint,) if error.hint else ()


def exit_code(rows: Sequence[Row | None]) -> int:
    """The worst of all points' codes; a point without a row was not made."""
    codes = {BROKEN if row is None else row.code for row in rows}
    return next((code for code in _WORST if code in codes), BROKEN)


def frontier(points: Sequence[tuple[float, float]], higher_is_better: bool = True) -> list[bool]:
    """Of each (cost, worth), whether no other one is at least as good in both and better in one: Pareto's frontier.

    The lower cost is the better one; of two that are equal in both, both are on it.
    """
    sign = 1.0 if higher_is_better else -1.0
    known = [(cost, sign * worth) for cost, worth in points]
    return [not any(other != one and other[0] <= one[0] and other[1] >= one[1] for other in known) for one in known]
