"""Judge the shipped file: parity at every hop, accuracy, latency and size against the dense model; then the verdict."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from exporters import describe
from pipeline.artifacts import Baseline, Candidate, Exported, Folded, Hop, Optimized, Shrunk, Validated
from pipeline.channels import capture
from pipeline.config import GateSection
from pipeline.data import Data
from pipeline.models import ModelSource, example
from pipeline.progress import Progress
from pipeline.stages.precise import SEEDS, Precise
from validators import (
    Feed,
    Limit,
    Measured,
    OrtRunner,
    ParityReport,
    Runner,
    TorchRunner,
    compare_accuracy,
    compare_chain,
    edge_feeds,
    evaluate,
    judge,
    measure,
    race,
    random_feeds,
    real_feeds,
)

BATCHES = (1, 3, 8)
EVALUATION_BATCH = 64
PRECISION_LOSS = "accuracy lost to reduced precision (points)"


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
    progress: Progress,
) -> Validated:
    """Measure everything, then judge it by the recipe's limits. Raises ValidationError when a model cannot be run."""
    chain, (precise, *shaken) = _chain(cfg, source, folded, shrunk, exported, optimized)
    feeds = _feeds(cfg, chain[-1], data)
    progress.say(f"  parity of {len(chain)} models on {len(feeds)} feeds")
    parity = compare_chain(chain, feeds, atol=cfg.parity, rtol=0.0, precise=precise, shaken=shaken)
    winner = optimized.winner
    dense = OrtRunner(baseline.onnx, threads=cfg.threads, name="dense")
    shipped = OrtRunner(optimized.onnx, threads=cfg.threads, name="shipped", session=winner.session)
    progress.say(f"  accuracy of the shipped file on {len(data.test)} test samples")
    accuracy = compare_accuracy(
        *(evaluate(r, data.batches("test", EVALUATION_BATCH)) for r in (dense, shipped)), seed=cfg.seed
    )
    progress.say(f"  latency, dense against shipped, {cfg.threads} thread(s), batch {cfg.batch_size}")
    feed = random_feeds(shipped.inputs, seed=cfg.seed, batches=(cfg.batch_size,))[0]
    latency = race({"dense": dense, "shipped": shipped}, feed, reference="dense", seconds=cfg.seconds, seed=cfg.seed)
    before, after = (measure(r.path, feed, threads=cfg.threads) for r in (dense, shipped))
    hops = (*(_hop(report) for report in parity.hops[:-1]), _last_hop(parity.hops[-1], winner))
    drop = accuracy.drop.value
    ratio = latency.runners["shipped"].ratio
    metrics: dict[str, float | Measured | None] = {
        **{f"parity {hop.reference} - {hop.candidate}": r.judged for hop, r in zip(hops, parity.hops, strict=True)},
        "accuracy drop (points)": drop,
        "latency (of dense)": ratio,
        "file size (of dense)": after.bytes / before.bytes,
    }
    limits = _limits(cfg, hops)
    if winner.budget == "accuracy":
        last = f"parity {hops[-1].reference} - {hops[-1].candidate}"
        limits = [limit for limit in limits if limit.metric != last]
        limits.append(Limit(metric=PRECISION_LOSS, operator="<=", value=winner.allowed))
        metrics[PRECISION_LOSS] = _precision_loss(cfg, data, exported, shipped) if hops[-1].passed else None
    if not optimized.proven:
        # Nothing vouches for it, whatever this stage's own inputs say.
        limits.append(Limit(metric="proof in the race (1 = yes)", operator="==", value=1))
        metrics["proof in the race (1 = yes)"] = 0.0
    verdict = judge(metrics, limits)
    for name, report in (("parity", parity), ("accuracy", accuracy), ("latency", latency), ("verdict", verdict)):
        (out / f"{name}.json").write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    structure = {"dense": before.model_dump(mode="json"), "shipped": after.model_dump(mode="json")}
    for entry in structure.values():
        del entry["path"]
    (out / "structure.json").write_text(json.dumps(structure, indent=1) + "\n", encoding="utf-8")
    mine, reference = latency.runners["shipped"], latency.runners["dense"]
    return Validated(
        folder=out,
        verdict=verdict,
        hops=hops,
        dense_accuracy=accuracy.dense,
        accuracy=accuracy.shipped,
        accuracy_drop_points=drop,
        accuracy_drop_low=accuracy.drop.low,
        accuracy_drop_high=accuracy.drop.high,
        dense_latency_ms=reference.median_ms,
        latency_ms=mine.median_ms,
        latency_p95_ms=mine.p95_ms,
        latency_p99_ms=mine.p99_ms,
        latency_ratio=ratio.value,
        latency_ratio_low=ratio.low,
        latency_ratio_high=ratio.high,
        threads=cfg.threads,
        dense_bytes=before.bytes,
        bytes=after.bytes,
        dense_load_ms=before.load_ms,
        load_ms=after.load_ms,
    )


def _chain(
    cfg: GateSection, source: ModelSource, folded: Folded, shrunk: Shrunk, exported: Exported, optimized: Optimized
) -> tuple[list[Runner], list[Runner]]:
    """Folded, shrunk, exported, optimised, each compared with the one before it; and folded in float64, then shaken."""
    summary = describe(exported.onnx)
    names = [spec.name for spec in summary.inputs]
    outputs = [spec.name for spec in summary.outputs]
    model = source.build()
    model.load_state_dict(folded.weights())
    inputs = example(source)
    torch_runners = [
        TorchRunner(
            program, example=inputs, threads=torch.get_num_threads(), input_names=names, output_names=outputs, name=name
        )
        for name, program in (("folded", model.eval()), ("shrunk", shrunk.program()))
    ]
    chain: list[Runner] = [
        *torch_runners,
        OrtRunner(exported.onnx, threads=cfg.threads, optimize=False, name="exported"),
        OrtRunner(optimized.onnx, threads=cfg.threads, name="optimized", session=optimized.winner.session),
    ]
    captured = capture(model, inputs)
    return chain, [Precise(captured, chain[0], outputs, seed) for seed in SEEDS]


def _feeds(cfg: GateSection, shipped: Runner, data: Data) -> list[Feed]:
    """Seeded random, edge (zeros, large values) and real test samples, at batch 1, 3 and 8."""
    name = shipped.inputs[0].name
    return [
        *random_feeds(shipped.inputs, seed=cfg.seed, batches=BATCHES),
        *edge_feeds(shipped.inputs, seed=cfg.seed, batches=BATCHES),
        *real_feeds({name: data.sample("test", max(BATCHES)).numpy()}, batches=BATCHES),
    ]


def _limits(cfg: GateSection, hops: tuple[Hop, ...]) -> list[Limit]:
    return [
        *(Limit(metric=f"parity {h.reference} - {h.candidate}", operator="<=", value=cfg.parity) for h in hops),
        Limit(metric="accuracy drop (points)", operator="<=", value=cfg.max_accuracy_drop_points),
        Limit(metric="latency (of dense)", operator="<=", value=cfg.max_latency_ratio),
        Limit(metric="file size (of dense)", operator="<=", value=cfg.max_size_ratio),
    ]


def _last_hop(report: ParityReport, winner: Candidate) -> Hop:
    """Exported to optimised. Reduced precision is another function on purpose: there, only what is missing fails."""
    hop = _hop(report)
    if winner.budget == "rounding":
        return hop
    comparable = report.max_scaled is not None
    reason = f"{winner.name} is judged by the accuracy that it costs, not by float rounding"
    return hop.model_copy(update={"passed": comparable, "reasons": (reason,) if comparable else hop.reasons})


def _precision_loss(cfg: GateSection, data: Data, exported: Exported, shipped: Runner) -> float:
    """Accuracy of the exported float file minus that of the shipped one on the test part, in points."""
    float32 = OrtRunner(exported.onnx, threads=cfg.threads, name="exported")
    reports = [evaluate(runner, data.batches("test", EVALUATION_BATCH)) for runner in (float32, shipped)]
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
        worst_feed=report.worst.feed if report.worst else "",
        feeds=len(report.feeds),
        reasons=report.reasons,
    )


def _worst(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
