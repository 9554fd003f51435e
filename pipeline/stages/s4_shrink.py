"""Remove the dead channels for good, and prove that the output did not change."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from exporters.host import vector_block
from pipeline import channels
from pipeline.artifacts import archive
from pipeline.artifacts.base import WidthChange, write_table
from pipeline.artifacts.eager import Folded, Pruned
from pipeline.artifacts.program import Shrunk
from pipeline.channels.coupling.analyse import analyse
from pipeline.channels.coupling.groups import Analysis
from pipeline.channels.coupling.layers import layers
from pipeline.channels.dead.branches import without_zero_branches
from pipeline.channels.dead.liveness import Liveness, liveness
from pipeline.channels.dead.stray import evened
from pipeline.channels.ledger import Ledger
from pipeline.channels.program.capture import Captured
from pipeline.channels.program.macs import count_macs
from pipeline.channels.removal.verify import prove
from pipeline.data.parts import Data
from pipeline.drawing.widths import widths_svg
from pipeline.models.graph import graph_of
from pipeline.models.source import ModelSource
from pipeline.progress import Progress
from pipeline.rebuilding.rebuild import rebuild
from pipeline.recipe.removal import ShrinkSection
from pipeline.selection.kinds import policy_of

REAL_SAMPLES = 8

EMPTY = "a tensor would become empty"
"""Why groups stay that are all that a dimension has."""


def run(
    cfg: ShrinkSection,
    out: Path,
    source: ModelSource,
    data: Data,
    pruned: Pruned,
    folded: Folded,
    progress: Progress,
) -> Shrunk:
    """Find what is dead from the folded weights alone, cut it, compare folded and shrunk on random and real inputs.

    Raises RefusedError when the two differ by more than float32 rounding; CaptureError when torch.export cannot follow.
    """
    model = source.build()
    model.load_state_dict(folded.weights())
    captured = graph_of(model, source)
    whole = _cut(captured, pruned)
    small = whole.small
    left, branches = without_zero_branches(captured, policy_of(pruned.kinds))
    if branches:
        cut = _cut(left, pruned)
        known = {c.name for c in cut.analysis.clusters}
        inside = {c.name: c.size for c in whole.analysis.clusters if c.name not in known}
        small = replace(cut.small, ledger=cut.small.ledger.with_branches(whole.small.ledger, branches, inside))
    analysis, live = whole.analysis, whole.live
    feeds = [channels.small(captured, seed=cfg.seed), data.sample("calibration", REAL_SAMPLES)]
    proof = prove(captured, small, feeds)
    archive.write(small.program, out / Shrunk.PROGRAM)
    # A class runs every branch that it has: one that adds nothing stays in it, as narrow as can be.
    _, structure = rebuild(model, captured, analysis, live.dead, whole.small)
    facts = {"model": source.spec, "classes": source.num_classes, "input_size": source.input_size, "seed": source.seed}
    structure.model_copy(update=facts).write(out)
    (out / Shrunk.LEDGER).write_text(small.ledger.to_json() + "\n", encoding="utf-8")
    (out / "blocked.json").write_text(
        json.dumps(
            [{"op": b.op, "node": b.node, "reason": b.reason, "params": b.params} for b in analysis.blocked], indent=1
        )
        + "\n",
        encoding="utf-8",
    )
    widths = tuple(
        WidthChange(
            cluster=c.name,
            kind=c.kind,
            unit=c.unit,
            before=c.size,
            after=c.size - len(small.ledger.groups.get(c.name, ())),
        )
        for c in analysis.clusters
    )
    write_table(out / "widths.csv", widths)
    (out / "widths.svg").write_text(_drawing(analysis, small.ledger, source.spec), encoding="utf-8")
    params = sum(p.numel() for p in {id(p): p for p in small.program.parameters()}.values())  # tied ones once
    statement = _statement(pruned, folded, params, small.ledger) + _uneven(analysis, pruned, live)
    progress.say(f"  {statement}")
    return Shrunk(
        folder=out,
        removed=params < folded.params,
        statement=statement,
        params_before=folded.params,
        params_after=params,
        macs_before=analysis.macs,
        macs_after=count_macs(small.program),
        max_abs_diff=proof.max_abs_diff,
        max_abs_diff_float64=proof.max_abs_diff_float64,
        output_scale=proof.output_scale,
        tolerance=proof.tolerance,
        widths=widths,
        kept_back=_kept_back(analysis, small.ledger),
        original_class=structure.original,
        module=structure.why,
    )


@dataclass(frozen=True)
class _Cut:
    analysis: Analysis
    live: Liveness
    small: channels.Shrunk


def _cut(captured: Captured, pruned: Pruned) -> _Cut:
    """What is dead in a captured program, and the program without it."""
    analysis = analyse(captured, policy_of(pruned.kinds))
    live = liveness(analysis, captured.state)
    live = evened(analysis, captured.state, live, pruned.align, by_chance=pruned.method != "given")
    return _Cut(analysis, live, channels.shrink(captured, analysis, live.dead, refused=live.refusals))


def _drawing(analysis: Analysis, ledger: Ledger, title: str) -> str:
    """Every layer's width before and after, as SVG."""
    gone = {c.name: np.isin(np.arange(c.size), ledger.groups.get(c.name, ())) for c in analysis.clusters}
    return widths_svg(layers(analysis, gone), title, "widths before and after; see ledger.json for the channels")


def _statement(pruned: Pruned, folded: Folded, params: int, ledger: Ledger) -> str:
    """What was removed, in words that claim no more than what happened."""
    if params < folded.params:
        groups = sum(len(gone) for gone in ledger.groups.values())
        constants = sum(len(found) for fold in ledger.folds for found in fold.constants.values())
        folded_in = (
            f" {constants:,} constants of dead channels went into {len(ledger.folds):,} biases." if constants else ""
        )
        count = len(ledger.branches)
        branches = f" and {count} whole {'branch' if count == 1 else 'branches'}" if count else ""
        became = f"{folded.params:,} parameters became {params:,}"
        return f"{groups:,} channel groups{branches} are gone: {became}.{folded_in}"
    if pruned.method in ("unstructured", "2:4"):
        return (
            f"Nothing was removed: {folded.sparsity:.1%} of the weights are zero, but no whole channel is, and "
            "onnxruntime's dense CPU kernels multiply zeros at full price. Expect no speed-up; only the compressed "
            'file is smaller. For speed, prune channels (prune.method = "structured").'
        )
    stays = [(len(one.groups), one.reason) for one in ledger.refusals]
    stays += [(len(spared), EMPTY) for spared in ledger.spared.values()]
    count = sum(groups for groups, _ in stays)
    if count:
        groups_stay = (
            "1 channel group is dead, and stays" if count == 1 else f"{count:,} channel groups are dead, and stay"
        )
        return f"Nothing was removed: {groups_stay} ({stays[0][1]})."
    return "Nothing was removed: no channel is dead in the folded weights."


def _uneven(analysis: Analysis, pruned: Pruned, live: Liveness) -> str:
    """Of a checkpoint that was pruned elsewhere: which counts of channels kernels may be slow with, and what helps; ""
    where there are none, or the recipe says what counts are to be multiples of. `live`: all that is dead.
    """
    if pruned.method != "given" or pruned.align != 1:
        return ""
    block = vector_block()
    even = evened(analysis, analysis.captured.state, live, block, by_chance=False)
    stay = even.refusals[len(live.refusals) :]
    if not stay:
        return ""
    first = next(c for c in analysis.clusters if c.name == stay[0].cluster)
    left = first.size - int(live.dead[first.name].sum())
    count = sum(len(one.groups) for one in stay)
    layers_left = "1 layer is" if len(stay) == 1 else f"{len(stay)} layers are"
    return (
        f" {layers_left} left with counts of channels that kernels may be slow with ({first.name}: {left} of "
        f"{first.size}); with prune.align={block}, {count:,} dead ones stay for even counts."
    )


def _kept_back(analysis: Analysis, ledger: Ledger) -> tuple[str, ...]:
    """Why what stays has to stay: operators that block channels, and groups that were dead yet could not go."""
    blocked = [f"{b.op} at {b.node}: {b.reason} ({b.params:,} parameters)" for b in analysis.blocked]
    refused = [f"{_groups(len(r.groups))} of {r.cluster}: {r.op} at {r.node}: {r.reason}" for r in ledger.refusals]
    refused += [f"{_groups(len(g))} of {name}: {EMPTY}" for name, g in ledger.spared.items()]
    return (*blocked, *refused)


def _groups(count: int) -> str:
    return "1 group" if count == 1 else f"{count} groups"
