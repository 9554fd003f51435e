"""The chain that a release is proven along: folded, shrunk, exported, optimised, each against the one before it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram

from exporters.summary import describe
from foundation.errors import first_line
from foundation.files import sha256
from pipeline.artifacts.eager import Baseline, Folded
from pipeline.artifacts.program import Exported, Shrunk
from pipeline.artifacts.race import Candidate, Optimized
from pipeline.artifacts.verdict import Hop
from pipeline.channels.program.capture import Captured
from pipeline.data.parts import Data
from pipeline.gate import measuring
from pipeline.models.feeding import answers_of, made_feeds
from pipeline.models.graph import graph_of
from pipeline.models.precise import SEEDS, Precise
from pipeline.models.source import ModelSource, example
from pipeline.recipe.policy import GateSection
from pipeline.tasks.evaluation import evaluate
from pipeline.tasks.task import Task
from validators.divergence import repro_pack
from validators.feeds import BATCHES, Feed, drawn_batches, real_feeds
from validators.matching import Trail, first_unmatched, onnx_trail, torch_trail
from validators.parity import ChainReport, Opener, ParityReport
from validators.runners import OrtRunner, Runner, TorchRunner

# The first hop that failed, cut down to where it parts.
REPRO = "repro.zip"


@dataclass(frozen=True)
class Chain:
    """Folded, shrunk, exported, optimised as runners, each compared with the one before it; the first two as graphs,
    with their inputs' and outputs' names; folded in float64, then shaken; and the dense model in each runtime, which is
    the yardstick of what runtimes differ by.
    """

    runners: Sequence[Runner]
    yardstick: Sequence[Opener | None]
    precise: Sequence[Runner]
    captured: Captured
    small: ExportedProgram
    inputs: Sequence[str]
    outputs: Sequence[str]


def open_chain(
    cfg: GateSection,
    source: ModelSource,
    baseline: Baseline,
    folded: Folded,
    shrunk: Shrunk,
    exported: Exported,
    optimized: Optimized,
) -> Chain:
    """The four models as runners, and the dense model in each runtime beside them."""
    summary = describe(exported.onnx)
    names = [spec.name for spec in summary.inputs]
    outputs = [spec.name for spec in summary.outputs]
    model = source.build()
    model.load_state_dict(folded.weights())
    inputs, small = example(source), shrunk.program()

    def in_torch(name: str, program: nn.Module | ExportedProgram) -> Runner:
        return TorchRunner(
            program,
            example=inputs,
            threads=torch.get_num_threads(),
            input_names=names,
            output_names=outputs,
            free=source.free,
            name=name,
        )

    def dense_in_torch() -> Runner:
        dense = source.build()
        dense.load_state_dict(baseline.weights())
        return in_torch("dense", dense.eval())

    yardstick = [
        None,  # from folded to shrunk is torch on both sides: exactness is what is proven there
        dense_in_torch,
        partial(OrtRunner, baseline.onnx, threads=cfg.threads, optimize=False, name="dense, exported"),
        partial(OrtRunner, baseline.onnx, threads=cfg.threads, name="dense, optimized"),
    ]
    chain: list[Runner] = [
        in_torch("folded", model.eval()),
        in_torch("shrunk", small),
        OrtRunner(exported.onnx, threads=cfg.threads, optimize=False, name="exported"),
        OrtRunner(optimized.onnx, threads=cfg.threads, name="optimized", session=optimized.winner.session),
    ]
    captured = graph_of(model, source)
    precise = [Precise(captured, chain[0], outputs, seed) for seed in SEEDS]
    return Chain(chain, yardstick, precise, captured, small, names, outputs)


def chain_feeds(cfg: GateSection, source: ModelSource, shipped: Runner, file: Path, data: Data) -> list[Feed]:
    """Seeded random, edge (zeros, large values) and real test samples, at batch 1, 3 and 8; random ones at two further
    sizes, drawn by the seed and the bytes of the shipped `file`, so that no file is made for the sizes that are tried.
    """
    drawn = drawn_batches(cfg.seed + int(sha256(file)[:12], 16))
    return [
        *made_feeds(shipped.inputs, source, seed=cfg.seed, batches=drawn, edges=BATCHES),
        *real_feeds(data.arrays("test", max(BATCHES)), batches=BATCHES),
    ]


def last_hop(report: ParityReport, winner: Candidate) -> Hop:
    """Exported to optimised. Reduced precision is another function on purpose: there, only what is missing fails."""
    hop = hop_of(report)
    if not winner.reduced_precision:
        return hop
    comparable = report.max_scaled is not None
    reason = f"{winner.name} is judged by the accuracy that it costs, not by float rounding"
    update = {"judged": False, "passed": comparable, "reasons": (reason,) if comparable else hop.reasons}
    return hop.model_copy(update=update)


def hop_of(report: ParityReport) -> Hop:
    """A parity report as the figures of its worst output and feed."""
    return Hop(
        reference=report.reference,
        candidate=report.candidate,
        passed=report.passed,
        max_abs=_worst(o.max_abs for o in report.outputs),
        mean_abs=_worst(o.mean_abs for o in report.outputs),
        max_rel=_worst(o.max_rel for o in report.outputs),
        mean_rel=_worst(o.mean_rel for o in report.outputs),
        top1_agreement=report.top1,
        top5_agreement=_least(o.top5 for o in report.outputs),
        ulp_p50=_worst(o.ulp_p50 for o in report.outputs),
        ulp_p99=_worst(o.ulp_p99 for o in report.outputs),
        cosine=_least(o.cosine for o in report.outputs),
        worst_feed=report.worst.feed if report.worst else "",
        feeds=len(report.feeds),
        reasons=report.reasons or report.notes,
    )


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def _worst(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def divergence(
    cfg: GateSection,
    out: Path,
    parity: ChainReport,
    feeds: list[Feed],
    chain: Chain,
    exported: Exported,
    optimized: Optimized,
) -> list[str]:
    """Where the first hop that failed parts, in one line, if one did; a repro pack is written."""
    broken = next((at for at, hop in enumerate(parity.hops) if not hop.passed), None)
    if broken is None or (hop := parity.hops[broken]).worst is None:
        return []
    last = broken == len(parity.hops) - 1
    if last and (optimized.winner.reduced_precision or optimized.onnx.suffix != ".onnx"):
        return []
    feed = next(feed for feed in feeds if feed.label == hop.worst.feed)
    pack = out / REPRO

    def trail(program: ExportedProgram, state: Mapping[str, torch.Tensor] | None = None) -> Trail:
        return torch_trail(program, feed, inputs=chain.inputs, outputs=chain.outputs, state=state)

    try:
        if last:
            found = repro_pack(exported.onnx, optimized.onnx, feed, pack, atol=cfg.parity)
        elif broken == 0:
            before, after = trail(chain.captured.program, chain.captured.state), trail(chain.small)
            found = first_unmatched(before, after, feed, atol=cfg.parity, cut=True, pack=pack)
        else:
            before, after = trail(chain.small), onnx_trail(exported.onnx, feed)
            found = first_unmatched(before, after, feed, atol=cfg.parity, pack=pack)
    except Exception as error:  # of any graph: that they differ is known all the same
        return [f"{hop.candidate}: where it differs could not be found: {first_line(error)}"]
    return [f"{hop.candidate} {found.words}; see {REPRO}" if found else f"{hop.candidate}: differs only once loaded"]


def precision_loss(cfg: GateSection, data: Data, task: Task, exported: Exported, optimized: Optimized) -> float:
    """What the score loses from the exported float file to the shipped one on the test part: points, or per cent."""
    runners = (
        OrtRunner(exported.onnx, threads=cfg.threads, name="exported"),
        OrtRunner(optimized.onnx, threads=cfg.threads, name="shipped", session=optimized.winner.session),
    )
    batch = min(measuring.EVALUATION_BATCH, task.batch)
    found = [evaluate(task, answers_of(runner), data, "test", batch).score for runner in runners]
    return task.score.lost(*found)
