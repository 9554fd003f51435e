"""What a candidate may change, as two values: each proves a candidate, and repairs one that fails where it can.

rounding   the same function, but for float32 rounding; repaired by leaving out the optimiser that breaks it
accuracy   another function, as long as it costs no more accuracy than allowed; repaired by keeping the nodes that
           hurt most in float
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol

from exporters.candidates import CANDIDATES, Source
from exporters.guilty import guilty_optimizers
from exporters.quantize import sensitivity
from exporters.to_ort import session_config
from foundation.errors import ExportError, ValidationError
from pipeline.artifacts.race import Candidate
from pipeline.progress import Progress
from pipeline.race.context import RaceContext
from pipeline.tasks.evaluation import Evaluation
from validators.parity import ParityReport
from validators.runners import OrtRunner, Runner

# Samples of the calibration part that tell which nodes hurt.
PROBES = 32

# Makes a candidate again, from another source and loaded with those session entries, and proves it.
Remake = Callable[[Source, Mapping[str, str]], Candidate]


class Budget(Protocol):
    """A promise that a candidate keeps."""

    @property
    def allowed(self) -> float:
        """How much of it a candidate may use."""

    def prove(self, runner: Runner) -> dict[str, Any]:
        """The figures of a candidate's row, its outcome, and why where it breaks the promise."""

    def repair(self, row: Candidate, remake: Remake, progress: Progress) -> Candidate:
        """A failed candidate made again so that it keeps the promise; `row` as it is where that cannot be had."""


class RoundingBudget:
    """The same function, but for float32 rounding."""

    def __init__(self, context: RaceContext) -> None:
        self._context = context
        self.guilty: dict[str, tuple[str, ...]] = {}
        """Candidate name -> the optimisers that break it, and that it was made without."""

    @property
    def allowed(self) -> float:
        """The largest difference over max(1, max|reference|)."""
        return self._context.cfg.parity

    def prove(self, runner: Runner) -> dict[str, Any]:
        """Parity is the whole proof."""
        parity = self._context.parity(runner)
        if parity.passed:
            return _differences(parity) | {"outcome": "passed", "notes": parity.notes}
        reason = f"not the same function: {parity.reasons[0]}"
        return _differences(parity) | {"outcome": "failed", "reason": reason}

    def repair(self, row: Candidate, remake: Remake, progress: Progress) -> Candidate:
        """Find the optimisers that break a candidate, make it without them, and prove that."""
        context = self._context

        def without(disabled: tuple[str, ...]) -> Candidate | None:
            """The candidate made and loaded without those, where it is proven."""
            session = {} if row.file.endswith(".ort") else session_config(disabled)
            try:
                again = remake(replace(context.source, disabled=disabled), session)
            except (ExportError, ValidationError):
                return None
            return again if again.outcome == "passed" else None

        def holds(disabled: tuple[str, ...]) -> bool:
            if CANDIDATES[row.name].optimizers:
                return without(disabled) is not None
            # Not onnxruntime's work, so making it again changes nothing: only loading it does.
            runner = OrtRunner(context.source.folder / row.file, threads=1, session=session_config(disabled))
            return context.parity(runner).passed

        # What broke one candidate is the first suspect for the next.
        guilty = next((known for known in dict.fromkeys(self.guilty.values()) if holds(known)), None)
        if guilty is None:
            progress.say(f"  {row.name} is {row.reason}; looking for the optimiser that breaks it")
            guilty = guilty_optimizers(holds)
        again = without(guilty) if guilty else None
        if not guilty or again is None:
            return row
        self.guilty[row.name] = guilty
        note = f"made without {', '.join(guilty)}, which breaks this model; load it with the session entries given here"
        return again.model_copy(update={"notes": (*again.notes, note)})


class AccuracyBudget:
    """Another function on purpose, such as int8: what counts is the score that it costs on the calibration part."""

    def __init__(self, context: RaceContext) -> None:
        self._context = context

    @property
    def allowed(self) -> float:
        """Points of the task's score, or per cent of one that is no share."""
        return self._context.cfg.max_score_lost

    @cached_property
    def _references(self) -> dict[str, Evaluation]:
        """What a candidate's accuracy is held against.

        The dense model too, as the gate will: what pruning lost is gone from the budget. Without labels it is always
        right, and what agreement pruning lost would leave no budget at all: there the gate has a limit of its own.
        """
        context = self._context
        found = {"shrunk": context.evaluate(context.reference.runner)}
        if context.data.labelled:
            found["dense"] = context.evaluate(OrtRunner(context.dense, threads=1))
        return found

    @cached_property
    def _worst_nodes(self) -> list[str]:
        """The nodes with weights, the one first whose quantisation hurts most."""
        context = self._context
        probe = context.data.arrays("calibration", PROBES)
        return list(sensitivity(context.source.onnx, batches=context.source.calibration(), probe=probe))

    def prove(self, runner: Runner) -> dict[str, Any]:
        """Score and loss on the calibration part; a plain difference in the outputs is no matter."""
        parity = self._context.difference(runner)
        figures = _differences(parity)
        if parity.max_scaled is None:  # an output is missing, of another shape or type, or not a number
            return figures | {"outcome": "failed", "reason": _unanswered(parity)}
        found = self._context.evaluate(runner)
        drops = {
            name: self._context.task.score.lost(report.score, found.score) for name, report in self._references.items()
        }
        figures |= {
            "score_lost": drops["shrunk"],
            "score_lost_dense": drops.get("dense"),
            "loss": found.loss,
        }
        against = max(drops, key=lambda name: drops[name])
        if drops[against] <= self.allowed:
            return figures | {"outcome": "passed"}
        task = self._context.task
        what = task.score.name if self._context.data.labelled or task.taught else "agreement with the dense model"
        unit = "points" if task.score.share else "per cent"
        lost = f"loses {drops[against]:.2f} {unit} of {what} against the {against} model, {self.allowed:g} allowed"
        return figures | {"outcome": "failed", "reason": lost}

    def repair(self, row: Candidate, remake: Remake, progress: Progress) -> Candidate:
        """Leave the nodes that hurt most in float, twice as many each time, until the budget holds."""
        if row.score_lost is None:
            return row
        if "_worst_nodes" not in vars(self):  # not known from another candidate yet
            progress.say(f"  {row.name} {row.reason}; looking for the nodes that hurt most")
        count = 1
        while count < len(self._worst_nodes):
            exclude = tuple(self._worst_nodes[:count])
            try:
                again = remake(replace(self._context.source, exclude=exclude), {})
            except ExportError:  # nothing is left to quantise
                return row
            if again.outcome == "passed":
                shown = ", ".join(exclude[:3]) + (", ..." if count > 3 else "")
                return again.model_copy(update={"notes": (*again.notes, f"in float: {shown}")})
            count *= 2
        return row


def _differences(parity: ParityReport) -> dict[str, Any]:
    return {"max_scaled": parity.max_scaled, "top1_agreement": parity.top1}


def _unanswered(parity: ParityReport) -> str:
    """Why a reduced-precision candidate has no comparable output; a plain difference is not among the reasons."""
    entry = next((e for e in parity.outputs if e.max_abs is None), None)
    return f"{entry.feed}: {entry.output}: {entry.reason}" if entry else parity.reasons[0]
