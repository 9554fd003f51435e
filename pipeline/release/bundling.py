"""The bundle of a version: what ships, with golden answers of the shrunk program, beside the stages' folders."""

from __future__ import annotations

import filecmp
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from exporters import bundling
from exporters.bundling import Answer, Bundle, InputNote, Variant, bundle
from exporters.summary import describe
from foundation.errors import VersionError
from foundation.rounding import scaled
from pipeline.artifacts.program import Exported, Shrunk
from pipeline.artifacts.race import Candidate, Optimized
from pipeline.artifacts.verdict import Validated
from pipeline.data.parts import Data
from pipeline.models.source import ModelSource, example
from pipeline.release.records import project_version
from pipeline.tasks.task import Task
from validators.runners import InputSpec, OrtRunner, TorchRunner

Array = np.ndarray[Any, np.dtype[Any]]

FOLDER = "bundle"
GOLDEN = 8
# Another CPU, or another onnxruntime, sums in another order: ten times the parity that was asked for here.
ELSEWHERE = 10.0
# Reduced precision may be this much further from the golden outputs than it was where it was built.
REDUCED = 1.5
# Where it was no further at all, float32 rounding remains.
ROUNDING = 1e-4
# At 1 a file that answers nothing but zeros would pass, and the self-test takes no such tolerance.
WIDEST = 0.9


def write(
    folder: Path,
    source: ModelSource,
    data: Data,
    task: Task,
    shrunk: Shrunk,
    exported: Exported,
    optimized: Optimized,
    validated: Validated,
) -> Bundle:
    """Bundle the shipped file and every other proven candidate that was kept, in the new `folder`.

    What raw inputs are read with (a tokenizer, say) comes along, and `task` says what the outputs are.
    The golden inputs are real test samples, the golden outputs the shrunk program's. Raises ExportError when a variant
    fails the self-test.
    """
    summary = describe(exported.onnx)
    names = [spec.name for spec in summary.inputs]
    program = TorchRunner(
        shrunk.program(),
        example=example(source),
        threads=torch.get_num_threads(),
        input_names=names,
        output_names=[spec.name for spec in summary.outputs],
        free=source.free,
        name="shrunk",
    )
    golden = data.arrays("test", GOLDEN)
    answers = program.infer(golden)
    score = validated.judged_score
    measured = {
        **({score.name: score.shipped, f"dense_{score.name}": score.dense} if score is not None else {}),
        "latency_ratio": validated.latency_ratio,
    }
    shipped = optimized.winner
    others = [
        row
        for row in optimized.candidates
        if row.outcome == "passed"
        and row.file
        and row is not shipped
        and _same_integers(optimized.folder, row, golden, answers)
    ]
    return bundle(
        [_variant(optimized.folder, row, golden, answers, validated.threads) for row in (shipped, *others)],
        folder,
        golden_inputs=golden,
        golden_outputs=answers,
        inputs=list(_notes(program, data)),
        labels=data.labels or data.names,
        answers=_answers(task, list(answers)),
        files=data.files,
        sizes=dict(source.sizes),
        threads=validated.threads,
        metadata={
            **summary.metadata,
            "leanort.model": source.spec,
            "leanort.version": project_version(),
            "leanort.ships": shipped.name,
            **{name: f"{value:.6f}" for name, value in measured.items() if value is not None},
        },
    )


def _variant(
    folder: Path, row: Candidate, golden: dict[str, Array], answers: dict[str, Array], threads: int
) -> Variant:
    timed = next((t for t in row.latencies if t.batch_size == 1 and t.threads == threads), None)
    tolerance = ELSEWHERE * row.allowed
    if row.reduced_precision:
        found = OrtRunner(folder / row.file, threads=1, session=row.session).infer(golden)
        errors = (
            scaled(float(np.abs(found[name] - wanted).max()), float(np.abs(wanted).max()))
            for name, wanted in answers.items()
            if wanted.dtype.kind == "f"
        )
        tolerance = max(ROUNDING, REDUCED * max(errors, default=0.0))
    return Variant(
        name=row.name,
        path=folder / row.file,
        portable=row.portable,
        isa=row.isa,
        session=row.session,
        tolerance=min(tolerance, WIDEST),
        latency_ms=timed.median_ms if timed else None,
    )


def _same_integers(folder: Path, row: Candidate, golden: dict[str, Array], answers: dict[str, Array]) -> bool:
    """Whether a candidate of reduced precision gives the very whole numbers of the golden outputs; the self-test asks
    for that. The others were proven to.
    """
    whole = [name for name, wanted in answers.items() if wanted.dtype.kind != "f"]
    if not whole or not row.reduced_precision:
        return True
    found = OrtRunner(folder / row.file, threads=1, session=row.session).infer(golden)
    return all(np.array_equal(found[name], answers[name]) for name in whole)


_MADE_OF: dict[str, Answer] = {
    "multilabel": "labels",
    "regression": "values",
    "embedding": "embedding",
    "segmentation": "map",
    "token-classification": "tokens",
}
"""Task -> what the outputs that it reads are."""


def _answers(task: Task, outputs: list[str]) -> dict[str, Answer]:
    """What each output is; of classes, only the first that the task reads is scores."""
    kind: Answer = "classes" if task.classes else _MADE_OF.get(task.name, "array")
    read = task.reads[:1] if task.classes else task.reads
    return {name: kind if name in read else "array" for name in outputs}


_TEXT: dict[str, Literal["ids", "mask", "segments"]] = {
    "input_ids": "ids",
    "attention_mask": "mask",
    "token_type_ids": "segments",
}


def _notes(program: TorchRunner, data: Data) -> Iterable[InputNote]:
    for spec in program.inputs:
        mine = spec.name == program.inputs[0].name  # what is normalised is an image, and comes first
        holds: Literal["image", "sound", "ids", "mask", "segments", "array"] = "array"
        mean, std = (data.mean, data.std) if mine else ((), ())
        if "tokenizer.json" in data.files:
            holds = _TEXT.get(spec.name, "array")
        elif mine and data.sample_rate:
            holds = "sound"
        elif mine and (mean or _free_image(spec, len(program.inputs))):
            holds = "image"
            if not mean:  # own code's transforms have normalised already
                channels = int(spec.shape[1])
                mean, std = (0.0,) * channels, (1.0,) * channels
        yield InputNote(
            name=spec.name,
            shape=spec.shape,
            dtype=spec.dtype,
            mean=mean,
            std=std,
            holds=holds,
            fit=data.fit,
            rate=data.sample_rate if mine else 0,
        )


def _free_image(spec: InputSpec, inputs: int) -> bool:
    """Whether the only input is an image of any height and width."""
    channels = spec.shape[1] if len(spec.shape) == 4 else 0
    return inputs == 1 and spec.dtype == "float32" and channels in (1, 3)


def of(version: Path) -> Path:
    """The bundle inside a version folder. Raises VersionError where its gate did not pass, so that there is none."""
    folder = version / FOLDER
    if not folder.is_dir():
        raise VersionError(
            f"{version} has no bundle, since it did not pass its gate.", f"See {version / 'report.html'}."
        )
    return folder


def pack(version: Path, archive: Path) -> None:
    """Pack the bundle of a version into the new file `archive`.

    Raises VersionError where it has none, or one without the file that was chosen to ship; ExportError where that file
    fails its self-test here, or the archive cannot be written.
    """
    folder, optimized = of(version), Optimized.load(version / Optimized.STAGE)
    file = optimized.winner.file
    if not (folder / file).is_file() or not filecmp.cmp(folder / file, optimized.folder / file, shallow=False):
        raise VersionError(f"{folder} does not hold {Optimized.STAGE}/{file}, which ships.", "Deploy again.")
    bundling.pack(folder, archive, ships=(optimized.shipped, file))
