"""What every candidate is made from and held against."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from exporters.candidates import Source
from exporters.fusions import expected_attention
from exporters.summary import describe
from foundation.files import sha256
from pipeline.artifacts.eager import Baseline
from pipeline.artifacts.program import Exported, Shrunk
from pipeline.channels.program.capture import Captured
from pipeline.data.parts import Data
from pipeline.models.feeding import answers_of, made_feeds
from pipeline.models.precise import SEEDS, Precise
from pipeline.models.source import ModelSource, example
from pipeline.race.cached import CachedRunner
from pipeline.recipe.race import OptimizeSection
from pipeline.tasks.evaluation import Evaluation, evaluate
from pipeline.tasks.task import Task
from validators.feeds import Feed, drawn_batches, real_feeds
from validators.parity import Opener, ParityReport, compare, compare_chain
from validators.runners import OrtRunner, Runner, TorchRunner

BATCHES = (1, 3)
EVALUATION_BATCH = 64
CALIBRATION_BATCH = 32

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class RaceContext:
    """What every candidate is made from and held against.

    `reference` is the shrunk program, `precise` the same in float64, plainly and with shaken numbers. `dense` is the
    dense model's file; `yardstick` opens the dense model in torch and in onnxruntime. `image` names the input that the
    data goes into, `attentions` counts the attentions of the shrunk program.
    """

    cfg: OptimizeSection
    source: Source
    data: Data
    task: Task
    model: ModelSource
    reference: CachedRunner
    precise: Sequence[Runner]
    feeds: Sequence[Feed]
    dense: Path
    yardstick: Sequence[Opener]
    attentions: int

    def parity(self, runner: Runner) -> ParityReport:
        """`runner` against the shrunk model; what is measured beside the limit is so only where that is missed."""
        precise, *shaken = self.precise
        return compare_chain(
            [self.reference, runner],
            self.feeds,
            atol=self.cfg.parity,
            rtol=0.0,
            precise=precise,
            shaken=shaken,
            yardstick=self.yardstick,
        ).hops[0]

    def difference(self, runner: Runner) -> ParityReport:
        """`runner` against the shrunk model by the limit alone: how far it is off, where that decides nothing."""
        return compare(self.reference, runner, self.feeds, atol=self.cfg.parity, rtol=0.0)

    def evaluate(self, runner: Runner) -> Evaluation:
        """Score and loss on the calibration part."""
        batch = min(EVALUATION_BATCH, self.task.batch)
        return evaluate(self.task, answers_of(runner), self.data, "calibration", batch)


def open_context(
    cfg: OptimizeSection,
    out: Path,
    source: ModelSource,
    data: Data,
    task: Task,
    baseline: Baseline,
    shrunk: Shrunk,
    exported: Exported,
) -> RaceContext:
    """The shrunk program as the reference, and the feeds: random, zeros and large values, and real samples."""
    summary = describe(exported.onnx)
    inputs = example(source)
    names, outputs = [spec.name for spec in summary.inputs], [spec.name for spec in summary.outputs]
    program = shrunk.program()

    def in_torch(name: str, model: nn.Module | ExportedProgram) -> CachedRunner:
        threads = torch.get_num_threads()
        return CachedRunner(
            TorchRunner(
                model,
                example=inputs,
                threads=threads,
                input_names=names,
                output_names=outputs,
                free=source.free,
                name=name,
            )
        )

    def dense_in_torch() -> Runner:
        model = source.build()
        model.load_state_dict(baseline.weights())
        return in_torch("dense", model.eval())

    def dense_in_onnxruntime() -> Runner:
        return CachedRunner(OrtRunner(baseline.onnx, threads=1, name="dense, exported"))

    reference = in_torch("shrunk", program)
    captured = Captured(program, inputs, program.state_dict)
    *_, drawn = drawn_batches(cfg.seed + int(sha256(exported.onnx)[:12], 16), ((2, 16),))
    return RaceContext(
        cfg=cfg,
        source=Source(
            onnx=exported.onnx,
            program=lambda: program,
            example=inputs,
            calibration=lambda: _calibration(data, cfg.calibration_samples),
            folder=out,
            free=source.free,
        ),
        data=data,
        task=task,
        model=source,
        reference=reference,
        precise=[CachedRunner(Precise(captured, reference, outputs, seed)) for seed in SEEDS],
        feeds=[
            *made_feeds(reference.inputs, source, seed=cfg.seed, batches=(*BATCHES, drawn), edges=BATCHES[:1]),
            *real_feeds(data.arrays("calibration", max(BATCHES)), batches=BATCHES),
        ],
        dense=baseline.onnx,
        yardstick=[functools.cache(dense_in_torch), functools.cache(dense_in_onnxruntime)],
        attentions=expected_attention(program),
    )


def _calibration(data: Data, count: int) -> Iterator[Mapping[str, Array]]:
    """The first `count` samples of the calibration part, in batches of one size, as onnxruntime's histograms need."""
    size = min(CALIBRATION_BATCH, count, len(data.calibration))
    for number, (inputs, _) in enumerate(data.batches("calibration", size), start=1):
        if len(inputs[0]) < size or number * size > count:
            return
        yield data.feed(inputs)
