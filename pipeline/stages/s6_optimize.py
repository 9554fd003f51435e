"""Make every candidate, prove each by its own budget, race those that passed; the fastest ships, the reasons with it.

    model.onnx -> candidates -> proof -> race -> winner

A candidate that is not proven is not timed and cannot ship. One that was made but may not ship (a file of this host's
CPU, say) is a row all the same, so that what it would have bought is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnxruntime

from exporters.summary import describe
from pipeline.artifacts.eager import Baseline, Pruned
from pipeline.artifacts.program import Exported, Shrunk
from pipeline.artifacts.race import Optimized
from pipeline.data.parts import Data
from pipeline.drawing.race import plot
from pipeline.models.source import ModelSource
from pipeline.progress import Progress
from pipeline.race.budgets import AccuracyBudget, Budget, RoundingBudget
from pipeline.race.choice import choose
from pipeline.race.context import open_context
from pipeline.race.entrants import entrants
from pipeline.race.files import kept, sweep
from pipeline.race.flushing import without_denormals
from pipeline.race.proof import candidate
from pipeline.race.timing import timed
from pipeline.race.words import lines, statements
from pipeline.recipe.race import OptimizeSection
from pipeline.tasks.task import Task


def run(
    cfg: OptimizeSection,
    out: Path,
    source: ModelSource,
    data: Data,
    baseline: Baseline,
    pruned: Pruned,
    shrunk: Shrunk,
    exported: Exported,
    task: Task,
    progress: Progress,
) -> Optimized:
    """Write the candidates that may ship, `candidates.json` and a plot of the race.

    Where no candidate that may ship is proven, the first one goes on unproven, and the gate fails it. Raises
    ExportError where not even that could be made.
    """
    specs = entrants(cfg)
    context, flushed = without_denormals(open_context(cfg, out, source, data, task, baseline, shrunk, exported))
    rounding = RoundingBudget(context)
    budgets: Mapping[str, Budget] = {"rounding": rounding, "accuracy": AccuracyBudget(context)}
    rows = []
    with progress.bar("candidates", len(specs) + 1) as move:
        for number, spec in enumerate(specs):
            move(number, spec.name)
            rows.append(candidate(context, spec, budgets[spec.budget], progress))
        move(len(specs), "racing")
        rows = timed(context, rows)
        move(len(specs) + 1, f"{sum(row.outcome == 'passed' for row in rows)} of {len(rows)} passed")
    choice = choose(cfg, rows)
    compress = not shrunk.removed and pruned.zeros > 0
    rows = [kept(row, choice.winner, out, compress=compress) for row in choice.explained(rows)]
    sweep(out, {row.file for row in rows})
    winner = next(row for row in rows if row.name == choice.winner.name)
    said = statements(rows, winner, flushed=flushed, guilty=rounding.guilty.values(), attentions=context.attentions)
    made = Optimized(
        folder=out,
        onnxruntime=onnxruntime.__version__,
        ships=winner.file,
        shipped=winner.name,
        proven=winner.outcome == "passed",
        why=choice.why,
        operators_before=describe(exported.onnx).operators,
        candidates=tuple(rows),
        statements=tuple(said),
    )
    (out / "candidates.json").write_text(made.model_dump_json(indent=1) + "\n", encoding="utf-8")
    plot(rows, winner, out / "candidates.svg")
    for line in (*lines(rows, winner), choice.why, *made.statements):
        progress.say(f"  {line}")
    return made
