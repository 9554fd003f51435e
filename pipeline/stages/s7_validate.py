"""Judge the shipped file: parity at every hop, accuracy, latency and size against the dense model; then the verdict."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram

from exporters.summary import describe
from foundation.errors import ValidationError
from pipeline.artifacts.eager import Baseline, Folded
from pipeline.artifacts.program import Exported, Shrunk
from pipeline.artifacts.race import Candidate, Optimized
from pipeline.artifacts.verdict import Hop, Promoted, Validated
from pipeline.channels.program.capture import Captured, capture
from pipeline.data.parts import Data
from pipeline.gate import measuring, policy
from pipeline.models.precise import SEEDS, Precise
from pipeline.models.source import ModelSource, example
from pipeline.progress import Progress
from pipeline.recipe.policy import GateSection
from pipeline.tasks.pictures import pictured
from validators.accuracy import compare_accuracy, evaluate
from validators.divergence import repro_pack
from validators.feeds import Feed, edge_feeds, random_feeds, real_feeds
from validators.matching import Trail, first_unmatched, onnx_trail, torch_trail
from validators.parity import ChainReport, Opener, ParityReport, compare_chain
from validators.runners import OrtRunner, Runner, TorchRunner

BATCHES = (1, 3, 8)
# Test samples that only one of dense and shipped got right: the first few as pictures.
FLIPPED = "flipped"
# The first hop that failed, cut down to where it parts.
REPRO = "repro.zip"
PICTURES = 24


def run(
    cfg: GateSection,
    out: Path,
    source: ModelSource,
    data: Data,
    baseline: Baseline,
    folded: Folded,
    shrunk: Shrunk,
    exported: Exported,
    optimized: Optimized,
    promoted: Promoted,
    progress: Progress,
) -> Validated:
    """Measure everything, then judge it by the recipe's policy.

    A validator that breaks off is a fail with its reason, and the others still run: a version is sealed either way.
    """
    crashed = measuring.Crashes()
    winner = optimized.winner
    parity: ChainReport | None = None
    apart: list[str] = []
    with crashed.noted("parity"):
        chain = _chain(cfg, source, baseline, folded, shrunk, exported, optimized)
        feeds = _feeds(cfg, chain.runners[-1], data)
        progress.say(f"  parity of {len(chain.runners)} models on {len(feeds)} feeds")
        precise, *shaken = chain.precise
        parity = compare_chain(
            chain.runners, feeds, atol=cfg.parity, rtol=0.0, precise=precise, shaken=shaken, yardstick=chain.yardstick
        )
        apart = _apart(cfg, out, parity, feeds, chain, exported, optimized)
    files = {"dense": baseline.onnx, "shipped": optimized.onnx}
    if promoted.onnx is not None:
        files["promoted"] = promoted.onnx
    found = measuring.contest(cfg, files, data, progress, sessions={"shipped": winner.session})
    crashed |= found.crashed
    reports = parity.hops if parity else ()
    hops = (*(_hop(report) for report in reports[:-1]), *(_last_hop(report, winner) for report in reports[-1:]))
    measurements = found.measurements | {
        f"{policy.PARITY}{hop.reference} - {hop.candidate}": policy.exactly(report.judged)
        for hop, report in zip(hops, reports, strict=True)
        if hop.judged
    }
    if winner.reduced_precision:
        measurements[policy.BEYOND_BUDGET] = None
        with crashed.noted("accuracy lost to reduced precision"):
            if hops and hops[-1].passed:
                beyond = _precision_loss(cfg, data, exported, optimized) - winner.allowed
                measurements[policy.BEYOND_BUDGET] = policy.exactly(beyond)
    if not optimized.proven:  # nothing vouches for it, whatever this stage's own inputs say
        measurements[policy.PROVEN] = policy.exactly(0.0)
    counts = {"macs": shrunk.macs_after, "parameters": shrunk.params_after}
    measurements |= {name: policy.exactly(count) for name, count in counts.items()}
    others = {"dense": (baseline.macs, baseline.params), "promoted": (promoted.macs, promoted.params)}
    for name in files.keys() & others.keys():
        macs, params = others[name]
        measurements |= measuring.against(counts, {"macs": macs, "parameters": params}, name)
    verdict, notes = policy.decide(
        cfg,
        measurements,
        hops=[key for key in measurements if key.startswith(policy.PARITY)],
        promoted=promoted.onnx is not None,
        crashed=crashed,
    )
    accuracy, latency = found.accuracy.get("dense"), found.latency
    for name, report in (("parity", parity), ("accuracy", accuracy), ("latency", latency), ("verdict", verdict)):
        if report is not None:
            (out / f"{name}.json").write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    structure = {name: report.model_dump(mode="json") for name, report in found.structure.items()}
    for entry in structure.values():
        del entry["path"]
    (out / "structure.json").write_text(json.dumps(structure, indent=1) + "\n", encoding="utf-8")
    pictures = pictured(data, [flip.sample for flip in accuracy.flipped[:PICTURES]]) if accuracy else {}
    for sample, picture in pictures.items():
        (out / FLIPPED).mkdir(exist_ok=True)
        picture.save(out / FLIPPED / f"{sample}.png")
    mine, reference = (latency.runners[name] if latency else None for name in ("shipped", "dense"))
    before, after = (found.structure.get(name) for name in ("dense", "shipped"))
    return Validated(
        folder=out,
        verdict=verdict,
        hops=hops,
        dense_accuracy=accuracy and accuracy.dense,
        accuracy=accuracy and accuracy.shipped,
        accuracy_drop_points=accuracy and accuracy.drop.value,
        accuracy_drop_low=accuracy and accuracy.drop.low,
        accuracy_drop_high=accuracy and accuracy.drop.high,
        dense_latency_ms=reference and reference.median_ms,
        latency_ms=mine and mine.median_ms,
        latency_p95_ms=mine and mine.p95_ms,
        latency_p99_ms=mine and mine.p99_ms,
        latency_ratio=mine and mine.ratio.value,
        latency_ratio_low=mine and mine.ratio.low,
        latency_ratio_high=mine and mine.ratio.high,
        threads=cfg.threads,
        dense_bytes=before and before.bytes,
        bytes=after and after.bytes,
        dense_load_ms=before and before.load_ms,
        load_ms=after and after.load_ms,
        measurements={key: policy.finite(value) for key, value in measurements.items()},
        notes=(*notes, *apart, *found.notes),
        complete=not crashed,
        crashed=dict(crashed),
        promoted=promoted.version,
    )


@dataclass(frozen=True)
class _Chain:
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


def _chain(
    cfg: GateSection,
    source: ModelSource,
    baseline: Baseline,
    folded: Folded,
    shrunk: Shrunk,
    exported: Exported,
    optimized: Optimized,
) -> _Chain:
    summary = describe(exported.onnx)
    names = [spec.name for spec in summary.inputs]
    outputs = [spec.name for spec in summary.outputs]
    model = source.build()
    model.load_state_dict(folded.weights())
    inputs, small = example(source), shrunk.program()

    def in_torch(name: str, program: nn.Module | ExportedProgram) -> Runner:
        return TorchRunner(
            program, example=inputs, threads=torch.get_num_threads(), input_names=names, output_names=outputs, name=name
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
    captured = capture(model, inputs)
    precise = [Precise(captured, chain[0], outputs, seed) for seed in SEEDS]
    return _Chain(chain, yardstick, precise, captured, small, names, outputs)


def _feeds(cfg: GateSection, shipped: Runner, data: Data) -> list[Feed]:
    """Seeded random, edge (zeros, large values) and real test samples, at batch 1, 3 and 8."""
    name = shipped.inputs[0].name
    return [
        *random_feeds(shipped.inputs, seed=cfg.seed, batches=BATCHES),
        *edge_feeds(shipped.inputs, seed=cfg.seed, batches=BATCHES),
        *real_feeds({name: data.sample("test", max(BATCHES)).numpy()}, batches=BATCHES),
    ]


def _apart(
    cfg: GateSection,
    out: Path,
    parity: ChainReport,
    feeds: list[Feed],
    chain: _Chain,
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
    except ValidationError as error:
        return [f"{hop.candidate}: where it differs could not be found: {error}"]
    return [f"{hop.candidate} {found.words}; see {REPRO}" if found else f"{hop.candidate}: differs only once loaded"]


def _last_hop(report: ParityReport, winner: Candidate) -> Hop:
    """Exported to optimised. Reduced precision is another function on purpose: there, only what is missing fails."""
    hop = _hop(report)
    if not winner.reduced_precision:
        return hop
    comparable = report.max_scaled is not None
    reason = f"{winner.name} is judged by the accuracy that it costs, not by float rounding"
    update = {"judged": False, "passed": comparable, "reasons": (reason,) if comparable else hop.reasons}
    return hop.model_copy(update=update)


def _precision_loss(cfg: GateSection, data: Data, exported: Exported, optimized: Optimized) -> float:
    """Accuracy of the exported float file minus that of the shipped one on the test part, in points."""
    runners = (
        OrtRunner(exported.onnx, threads=cfg.threads, name="exported"),
        OrtRunner(optimized.onnx, threads=cfg.threads, name="shipped", session=optimized.winner.session),
    )
    reports = [evaluate(runner, data.batches("test", measuring.EVALUATION_BATCH)) for runner in runners]
    return compare_accuracy(*reports, seed=cfg.seed).drop.value


def _hop(report: ParityReport) -> Hop:
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
