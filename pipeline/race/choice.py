"""Which candidate ships, and why: from the rows of the race alone, without looking at a file or a clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from foundation.errors import ExportError
from pipeline.artifacts.race import Candidate
from pipeline.recipe.race import OptimizeSection


@dataclass(frozen=True)
class Choice:
    """The candidate that ships, a sentence that says why, and for each faster one why it does not, by name."""

    winner: Candidate
    why: str
    passed_over: dict[str, str]

    def explained(self, rows: Sequence[Candidate]) -> list[Candidate]:
        """The rows, each that was passed over with its reason."""
        return [
            row.model_copy(update={"reason": f"does not ship: {self.passed_over[row.name]}"})
            if row.name in self.passed_over
            else row
            for row in rows
        ]


def choose(cfg: OptimizeSection, rows: Sequence[Candidate]) -> Choice:
    """The choice.

    The first allowed one ships unless another is faster beyond the race's doubt: the whole interval of its ratio,
    averaged over the settings, is below that of the first. Of several in reduced precision that are as fast as the
    fastest, as far as the race can tell, the most accurate ships. With `prefer = "size"` the smallest ships. Where none
    that may ship is proven, the first that could be made goes on unproven, and the gate fails it.

    Raises ExportError where not even that could be made.
    """
    winner, why = _winner(cfg, rows)
    return Choice(winner, why, {row.name: _why_not(cfg, row, winner) for row in rows if _faster(row, winner)})


def _winner(cfg: OptimizeSection, rows: Sequence[Candidate]) -> tuple[Candidate, str]:
    allowed = [row for row in rows if row.outcome == "passed" and not _forbidden(cfg, row)]
    if not allowed:
        return _unproven(rows)
    # Without special session entries before with them: a user who forgets them gets another function.
    plain = [row for row in allowed if not row.session] or allowed
    if cfg.prefer == "size":
        winner = min(plain, key=lambda row: row.bytes)
        return winner, f"{winner.name} ships: the smallest of {len(plain)} that may, {winner.bytes / 1e6:.3g} MB."
    first = plain[0]
    faster = [row for row in plain[1:] if _beyond_doubt(row, first)]
    if not faster:
        others = "no other one is faster beyond doubt" if len(plain) > 1 else "it is the only one that passed and may"
        return first, f"{first.name} ships: {first.latencies[0].median_ms:.3g} ms, and {others}."
    winner = min(faster, key=_ratio)
    level = [row for row in faster if row.reduced_precision and _as_fast(row, winner)]
    if winner.reduced_precision:
        winner = min(level, key=lambda row: (row.score_lost or 0.0, row.loss or 0.0))
    took = f"{winner.latencies[0].median_ms:.3g} ms, {_ratio(winner) / _ratio(first):.3f} of {first.name}"
    if winner.reduced_precision and len(level) > 1:
        equals = f"{len(level)} candidates in reduced precision are as fast"
        return winner, f"{winner.name} ships: {took}; {equals}, and this one is the most accurate."
    return winner, f"{winner.name} ships: {took}, the fastest of {len(plain)} that may ship."


def _unproven(rows: Sequence[Candidate]) -> tuple[Candidate, str]:
    """The first that was made for any machine and is the same function by intent, though it failed its proof."""
    made = (row for row in rows if row.file and row.outcome == "failed" and row.portable and not row.reduced_precision)
    first = next(made, None)
    if first is None:
        reasons = "; ".join(f"{row.name}: {row.reason or 'may not ship'}" for row in rows)
        raise ExportError(f"No candidate may ship. {reasons}.", "Change optimize.candidates in the recipe.")
    return first, f"{first.name} goes on unproven, since none that may ship passed: {first.reason}."


def _forbidden(cfg: OptimizeSection, row: Candidate) -> str:
    """Why the recipe lets a proven candidate not ship, with what lets it; "" where it may."""
    why, settings = [], []
    if not row.portable and cfg.ship != "host":
        why.append("belongs to this CPU only")
        settings.append('optimize.ship = "host"')
    if row.file.endswith(".ort") and not cfg.ort_format:
        why.append("is in onnxruntime's own format")
        settings.append("optimize.ort_format = true")
    if not why:
        return ""
    return f"{' and '.join(why)}; {' and '.join(settings)} {'lets' if len(settings) == 1 else 'let'} it ship"


def _why_not(cfg: OptimizeSection, row: Candidate, winner: Candidate) -> str:
    """Why a candidate that is faster than the winner does not ship."""
    if reason := _forbidden(cfg, row):
        return reason
    if row.session and not winner.session:
        return "needs session entries to be right, and one that needs none goes first"
    if cfg.prefer == "size":
        return 'is larger, and the smallest ships; optimize.prefer = "latency" lets the fastest ship'
    if row.reduced_precision and winner.reduced_precision and _as_fast(winner, row):
        return f"is as fast as {winner.name}, as far as the race can tell, and less accurate"
    return "is not faster beyond doubt"


def _faster(row: Candidate, winner: Candidate) -> bool:
    """Whether a proven row was timed below the winner; an unproven winner has no time, and any is below it."""
    return bool(row.latencies) and row.name != winner.name and (not winner.latencies or _ratio(row) < _ratio(winner))


def _beyond_doubt(row: Candidate, first: Candidate) -> bool:
    """Whether the whole interval of one lies below that of the other.

    The ratios of all rows are against one reference, which need not be `first`: its own interval counts, too.
    """
    return _mean([timed.high for timed in row.latencies]) < _mean([timed.low for timed in first.latencies])


def _as_fast(row: Candidate, fastest: Candidate) -> bool:
    """Whether the race leaves it open which of the two is faster: their intervals meet."""
    return _mean([timed.low for timed in row.latencies]) <= _mean([timed.high for timed in fastest.latencies])


def _ratio(row: Candidate) -> float:
    return _mean([timed.ratio for timed in row.latencies])


def _mean(ratios: Sequence[float]) -> float:
    """The geometric mean, as ratios are averaged."""
    return float(np.exp(np.mean(np.log(ratios))))
