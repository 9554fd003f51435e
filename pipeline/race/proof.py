"""One candidate made and proven: whatever goes wrong is its row."""

from __future__ import annotations

import time
from collections.abc import Mapping

from exporters.candidates import CandidateSpec, Made, NotApplicable, Source, make
from foundation.errors import ExportError, ValidationError
from pipeline.artifacts.race import Candidate
from pipeline.progress import Progress
from pipeline.race.budgets import Budget
from pipeline.race.context import RaceContext
from pipeline.race.flushing import flush_made
from validators.runners import OrtRunner


def candidate(context: RaceContext, spec: CandidateSpec, budget: Budget, progress: Progress) -> Candidate:
    """Make, flush and prove one candidate, and repair it where it fails."""
    began = time.perf_counter()

    def remake(source: Source, session: Mapping[str, str]) -> Candidate:
        return _prove(context, make(spec.name, source), budget, session)

    try:
        row = remake(context.source, {})
        if row.outcome == "failed":
            row = budget.repair(row, remake, progress)
    except NotApplicable as error:
        row = Candidate(name=spec.name, outcome="skipped", reason=str(error))
    except (ExportError, ValidationError) as error:
        row = Candidate(name=spec.name, outcome="failed", reason=error.message)
    return row.model_copy(update={"seconds": round(time.perf_counter() - began, 2)})


def _prove(context: RaceContext, made: Made, budget: Budget, session: Mapping[str, str]) -> Candidate:
    """Hold one file against the shrunk model, by its budget. Raises ValidationError where it cannot run."""
    denormals, flushed = flush_made(context, made, session)
    runner = OrtRunner(made.path, threads=1, name=made.spec.name, session=session)
    proof = budget.prove(runner)
    notes = (*made.notes, *flushed, *proof.pop("notes", ()))
    return Candidate(
        name=made.spec.name,
        technique=made.technique,
        file=made.path.name,
        portable=made.spec.portable,
        isa=made.isa,
        budget=made.spec.budget,
        allowed=budget.allowed,
        session=dict(session),
        bytes=made.bytes,
        denormals=denormals,
        operators=made.operators,
        notes=notes,
        **proof,
    )
