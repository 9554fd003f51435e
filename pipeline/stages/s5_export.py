"""Write the shrunk program as ONNX: norms as one operator, dynamic batch, checked, with its origin inside the file."""

from __future__ import annotations

from pathlib import Path

from exporters.export import to_onnx
from exporters.summary import describe
from foundation.files import sha256
from pipeline.artifacts.base import Artifact
from pipeline.artifacts.eager import Baseline, Finetuned, Folded, Pruned
from pipeline.artifacts.program import Exported, Shrunk
from pipeline.channels.centring.centre import RMS_OPSET, Centred, centre
from pipeline.channels.removal.verify import prove
from pipeline.data.parts import Data
from pipeline.models.source import ModelSource, example
from pipeline.recipe.export import ExportSection
from pipeline.release.records import project_version, read_stage, recipe_digest, section_digest

SAMPLES = 4


def run(
    cfg: ExportSection,
    out: Path,
    source: ModelSource,
    data: Data,
    baseline: Baseline,
    pruned: Pruned,
    finetuned: Finetuned,
    folded: Folded,
    shrunk: Shrunk,
) -> Exported:
    """Export `shrunk` to `model.onnx`; weights go beside it only above 2 GB.

    Residual streams that lost channels are centred first (see `channels.centring.centre`); that is proven here.
    Raises ExportError; RefusedError where the centred program is not the same function.
    """
    centred = _centred(cfg, source, data, shrunk)
    history: tuple[Artifact, ...] = (baseline, pruned, finetuned, folded, shrunk)
    made = to_onnx(
        centred.program,
        out / "model.onnx",
        example=example(source),
        opset=cfg.opset,
        input_names=[one.name for one in source.inputs],
        output_names=source.outputs,
        free=source.free,
        metadata={
            "leanort.version": project_version(),
            "leanort.model": source.spec,
            "leanort.dense_sha256": sha256(baseline.folder / baseline.WEIGHTS),
            "leanort.folded_sha256": sha256(folded.folder / folded.WEIGHTS),
            "leanort.recipe_sha256": _recipe_digest(cfg, history),
            "leanort.data": data.fingerprint,
            "leanort.sparsity": f"{folded.sparsity:.6f}",
            "leanort.params": str(shrunk.params_after),
        },
    )
    summary = describe(made.path)
    return Exported(
        folder=out,
        opset=summary.opset,
        onnx_bytes=summary.bytes,
        inputs=tuple(spec.name for spec in summary.inputs),
        outputs=tuple(spec.name for spec in summary.outputs),
        external_data=bool(summary.external_files),
        nodes=sum(summary.operators.values()),
        centred_norms=centred.norms,
    )


def _centred(cfg: ExportSection, source: ModelSource, data: Data, shrunk: Shrunk) -> Centred:
    plain = Centred(shrunk.program(), 0, 0, 0, 0)
    if not cfg.centre or cfg.opset < RMS_OPSET:
        return plain
    centred = centre(plain.program)
    if centred.norms:
        feeds = [example(source, seed=cfg.seed), data.sample("calibration", SAMPLES)]
        prove(plain, centred, feeds, rounded=True)
    return centred


def _recipe_digest(cfg: ExportSection, history: tuple[Artifact, ...]) -> str:
    """Digest of every choice that led to the file."""
    records = [read_stage(artifact.folder) for artifact in history]
    return recipe_digest([*(record.section if record else "" for record in records), section_digest(cfg)])
