"""The dense source, kept for ever, since pruning is a one-way street: weights, accuracy, dense ONNX, dense latency."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import nn

from exporters import host
from exporters.export import to_onnx
from foundation.errors import WeightsError
from foundation.files import save_tensors
from pipeline.artifacts.eager import Baseline
from pipeline.channels.program.capture import capture
from pipeline.channels.program.macs import count_macs
from pipeline.data.parts import Data
from pipeline.drawing.plots import history_plot
from pipeline.models import plain, weights
from pipeline.models.source import ModelSource, example
from pipeline.models.trial import check
from pipeline.progress import Progress
from pipeline.recipe.source import BaselineSection
from pipeline.tasks import classification
from pipeline.training import loop
from pipeline.training.defaults import default_settings
from pipeline.training.history import history_csv
from validators.feeds import random_feeds
from validators.latency import race
from validators.runners import OrtRunner

LEAST_CLASSES = 2
"""Outputs that a model has at least where the data has no labels: of one alone, the largest is always the same."""


def run(cfg: BaselineSection, out: Path, source: ModelSource, data: Data, progress: Progress) -> Baseline:
    """Load or train the dense model and measure it.

    Everything that can refuse the model does so before training: a wrong input shape, too few outputs, a forward pass
    that torch.export cannot follow. Raises ModelError, WeightsError, CaptureError, TrainingError, ExportError.
    """
    inputs = example(source)
    model = source.build_as_given()
    check(model, inputs, data.classes or LEAST_CLASSES, source.spec)
    if plain.free(model):
        progress.say("  every parameter of the model is frozen: they are freed, or nothing could be recovered")
    # Plain weights from here on, whatever computed them; trained or filled before that, in the form that was given.
    simple = plain.copied(model) if plain.computes(model) else model
    said = plain.said(plain.fold_checked(simple, inputs, source.spec))
    capture(simple, inputs)
    del simple
    if said:
        progress.say(f"  {said}")
    origin, seconds = _fill(cfg, model, source, data, out, progress)
    plain.fold_checked(model, inputs, source.spec)
    save_tensors(model.state_dict(), out / Baseline.WEIGHTS)
    captured = capture(model, inputs)
    made = to_onnx(
        captured.program,
        out / "dense.onnx",
        example=inputs,
        opset=cfg.opset,
        metadata={},
        input_names=source.input_names,
        output_names=source.origin.outputs,
    )
    runner = OrtRunner(made.path, threads=cfg.threads)
    feed = random_feeds(runner.inputs, seed=cfg.seed, batches=(1,))[0]
    latency = race({"dense": runner}, feed, reference="dense", seconds=cfg.seconds, seed=cfg.seed)
    if not data.labelled:
        answers, classes = classification.answers(model, data)
        data = data.answered(answers, classes)
        save_tensors(answers | {Baseline.CLASSES: torch.tensor(classes)}, out / Baseline.ANSWERS)
        progress.say(f"  {data.name} has no labels: what counts from here on is how often a model answers as this one")
    (out / "latency.json").write_text(latency.model_dump_json(indent=1) + "\n", encoding="utf-8")
    (out / "model.txt").write_text(f"{model}\n", encoding="utf-8")
    return Baseline(
        folder=out,
        trained_here=seconds > 0,
        weights_origin=f"{origin}; {said}" if said else origin,
        accuracy=classification.evaluate(model, data, "test").accuracy,
        calibration_accuracy=classification.evaluate(model, data, "calibration").accuracy,
        params=sum(p.numel() for p in model.parameters()),
        macs=count_macs(captured.program),
        onnx_bytes=made.summary.bytes,
        latency_ms=latency.runners["dense"].median_ms,
        threads=cfg.threads,
        isa=host.isa(),
        training_seconds=seconds,
        labelled=data.labelled,
    )


def _fill(
    cfg: BaselineSection, model: nn.Module, source: ModelSource, data: Data, out: Path, progress: Progress
) -> tuple[str, float]:
    """Give `model` its weights; where they came from, and the seconds that training took (0 = none)."""
    if cfg.weights == "pretrained":
        progress.say(f"  weights: {weights.load_pretrained(model, source)}")
        return "pretrained", 0.0
    if cfg.weights not in ("auto", "train"):
        try:
            loaded = weights.load_weights(model, cfg.weights)
        except WeightsError as error:
            if data.labelled:
                raise
            # Nothing told the model how many classes there are, so that this is what is wrong most often.
            hint = "Is it a checkpoint of this very model? Of another number of classes: --set data.classes=NUMBER"
            raise WeightsError(error.message, hint) from error
        progress.say(f"  weights: {cfg.weights} ({loaded})")
        return str(Path(cfg.weights).name), 0.0
    if cfg.weights == "auto" and not source.initial:
        if source.origin.note:
            progress.say(f"  weights: {source.origin.note}")
        return "as given", 0.0
    if cfg.weights == "auto" and not data.labelled:
        progress.say(f"  weights: those that {source.spec} comes with")
        return "as built", 0.0
    settings = default_settings(model, seed=cfg.seed, given=cfg.train)
    progress.say(
        f"  no weights were given: training {source.spec} on {data.name} for {settings.epochs} epochs "
        "(done once; reused from then on)"
    )
    began = time.perf_counter()
    result = loop.train(model, data, settings, checkpoint=out / "training.pt", progress=progress)
    history_csv(result.history, out / "history.csv")
    history_plot(result.history, result.best_epoch, out / "history.svg")
    (out / "training.pt").unlink(missing_ok=True)
    return f"trained here on {data.name}, {settings.epochs} epochs", time.perf_counter() - began
