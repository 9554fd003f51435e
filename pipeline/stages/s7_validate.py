"""Judge the shipped file: parity at every hop, accuracy, latency and size against the dense model; then the verdict."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from pipeline.artifacts.eager import Baseline, Folded
from pipeline.artifacts.program import Exported, Shrunk
from pipeline.artifacts.race import Optimized
from pipeline.artifacts.verdict import Promoted, Validated
from pipeline.data.parts import Data
from pipeline.drawing.plots import scatter_plot
from pipeline.gate import measuring, policy
from pipeline.gate.chain import chain_feeds, divergence, hop_of, last_hop, open_chain, precision_loss
from pipeline.models.source import ModelSource
from pipeline.progress import Progress
from pipeline.recipe.policy import GateSection
from pipeline.tasks.pictures import pictured
from pipeline.tasks.task import Task
from validators.parity import ChainReport, compare_chain

# Test samples that only one of dense and shipped got right: the first few as pictures.
FLIPPED = "flipped"
PICTURES = 24
CAME_PRUNED = 0.02
"""Share of channels that are wholly zero, beyond which a checkpoint counts as pruned: some die in any training."""
# Test samples that lost most of another score: pictures, and beside them what either model scores on each.
WORSE = "worse"
# Predicted numbers over the true ones.
SCATTER = "predicted.png"


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
    task: Task,
    progress: Progress,
) -> Validated:
    """Measure everything, then judge it by the recipe's policy.

    A validator that breaks off is a fail with its reason, and the others still run: a version is sealed either way.
    """
    crashed = measuring.Crashes()
    winner = optimized.winner
    parity: ChainReport | None = None
    where: list[str] = []
    with crashed.noted("parity"):
        chain = open_chain(cfg, source, baseline, folded, shrunk, exported, optimized)
        feeds = chain_feeds(cfg, source, chain.runners[-1], optimized.onnx, data)
        progress.say(f"  parity of {len(chain.runners)} models on {len(feeds)} feeds")
        precise, *shaken = chain.precise
        parity = compare_chain(
            chain.runners, feeds, atol=cfg.parity, rtol=0.0, precise=precise, shaken=shaken, yardstick=chain.yardstick
        )
        where = divergence(cfg, out, parity, feeds, chain, exported, optimized)
    files = {"dense": baseline.onnx, "shipped": optimized.onnx}
    if promoted.onnx is not None:
        files["promoted"] = promoted.onnx
    found = measuring.contest(
        cfg,
        files,
        data,
        progress,
        task=task,
        sizes=source.usual,
        ranges=source.ranges,
        sessions={"shipped": winner.session},
    )
    crashed |= found.crashed
    reports = parity.hops if parity else ()
    hops = (*(hop_of(report) for report in reports[:-1]), *(last_hop(report, winner) for report in reports[-1:]))
    measurements = found.measurements | {
        f"{policy.PARITY}{hop.reference} - {hop.candidate}": policy.exactly(report.judged)
        for hop, report in zip(hops, reports, strict=True)
        if hop.judged
    }
    if winner.reduced_precision:
        measurements[policy.BEYOND_BUDGET] = None
        with crashed.noted("accuracy lost to reduced precision"):
            if hops and hops[-1].passed:
                beyond = precision_loss(cfg, data, task, exported, optimized) - winner.allowed
                measurements[policy.BEYOND_BUDGET] = policy.exactly(beyond)
    if not optimized.proven:  # nothing vouches for it, whatever this stage's own inputs say
        measurements[policy.PROVEN] = policy.exactly(0.0)
    counts = {"macs": shrunk.macs_after, "parameters": shrunk.params_after}
    measurements |= {name: policy.exactly(count) for name, count in counts.items()}
    others = {"dense": (baseline.macs, baseline.params), "promoted": (promoted.macs, promoted.params)}
    for name in files.keys() & others.keys():
        macs, params = others[name]
        measurements |= measuring.against(counts, {"macs": macs, "parameters": params}, name)
    given_zeros = _came_pruned(baseline)
    verdict, notes = policy.decide(
        cfg,
        measurements,
        hops=[key for key in measurements if key.startswith(policy.PARITY)],
        promoted=promoted.onnx is not None,
        judged=policy.Judged.of(task, labelled=data.labelled, made_up=data.made_up),
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
    if found.worse:
        (out / WORSE).mkdir(exist_ok=True)
        for sample, (_, picture) in found.worse.items():
            picture.save(out / WORSE / f"{sample}.png")
        told = {"panels": task.panels, "samples": [asdict(one) for one, _ in found.worse.values()]}
        (out / f"{WORSE}.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    if found.predicted:
        scatter_plot(found.predicted, out / SCATTER)
    agreed, alike = (measurements.get(key) for key in (policy.AGREEMENT, policy.COSINE))
    right = accuracy if data.labelled else None
    scores = found.scores.get("dense", ()) if data.labelled or task.taught else ()
    mine, reference = (latency.runners[name] if latency else None for name in ("shipped", "dense"))
    before, after = (found.structure.get(name) for name in ("dense", "shipped"))
    return Validated(
        folder=out,
        verdict=verdict,
        hops=hops,
        dense_accuracy=right and right.dense,
        accuracy=right and right.shipped,
        accuracy_drop_points=right and right.drop.value,
        accuracy_drop_low=right and right.drop.low,
        accuracy_drop_high=right and right.drop.high,
        task=task.name,
        scores=scores,
        labelled=data.labelled,
        made_up=data.made_up,
        agreement=agreed and agreed.value,
        cosine=alike and alike.value,
        dense_latency_ms=reference and reference.median_ms,
        latency_ms=mine and mine.median_ms,
        latency_p95_ms=mine and mine.p95_ms,
        latency_p99_ms=mine and mine.p99_ms,
        latency_ratio=mine and mine.ratio.value,
        latency_ratio_low=mine and mine.ratio.low,
        latency_ratio_high=mine and mine.ratio.high,
        threads=cfg.threads,
        batch=cfg.batch_size,
        dense_bytes=before and before.bytes,
        bytes=after and after.bytes,
        dense_load_ms=before and before.load_ms,
        load_ms=after and after.load_ms,
        measurements={key: policy.finite(value) for key, value in measurements.items()},
        notes=(*notes, *given_zeros, *where, *found.notes),
        complete=not crashed,
        crashed=dict(crashed),
        promoted=promoted.version,
    )


def _came_pruned(baseline: Baseline) -> list[str]:
    """What the verdict does not say where the weights that count as dense had been pruned before they came in."""
    if baseline.zero_channels <= CAME_PRUNED:
        return []
    return [
        f"{baseline.zero_channels:.0%} of the channels of the weights that count as dense were zero already: what "
        "pruning them cost was not measured; `leanort shrink` takes the weights from before that, too: --dense FILE"
    ]
