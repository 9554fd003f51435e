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
from pipeline.channels.program.macs import count_macs
from pipeline.data.parts import Data
from pipeline.drawing.plots import history_plot
from pipeline.models import plain, weights
from pipeline.models.dense import Answering
from pipeline.models.graph import graph_of
from pipeline.models.source import ModelSource, example
from pipeline.progress import Progress
from pipeline.recipe.source import BaselineSection
from pipeline.selection.weights import prunable
from pipeline.tasks import classification
from pipeline.tasks.evaluation import evaluate
from pipeline.tasks.task import Task
from pipeline.training import loop, own
from pipeline.training.defaults import default_settings
from pipeline.training.history import history_csv
from validators.feeds import random_feeds
from validators.latency import race
from validators.runners import OrtRunner


def run(cfg: BaselineSection, out: Path, source: ModelSource, data: Data, task: Task, progress: Progress) -> Baseline:
    """Load or train the dense model and measure it.

    Everything that can refuse the model does so before training: a wrong input shape, too few outputs, a forward pass
    that torch.export cannot follow. Raises ModelError, WeightsError, CaptureError, TrainingError, ExportError.
    """
    inputs = example(source)
    model = source.build_as_given()
    if plain.free(model):
        progress.say("  every parameter of the model is frozen: they are freed, or nothing could be recovered")
    # Plain weights from here on, whatever computed them; trained or filled before that, in the form that was given.
    simple = plain.copied(model) if plain.computes(model) else model
    said = plain.said(plain.fold_checked(simple, inputs, source.spec))
    graph_of(simple, source)
    del simple
    if said:
        progress.say(f"  {said}")
    origin, seconds = _fill(cfg, model, source, data, task, out, progress)
    plain.fold_checked(model, inputs, source.spec)
    save_tensors(model.state_dict(), out / Baseline.WEIGHTS)
    captured = graph_of(model, source)
    made = to_onnx(
        captured.program,
        out / "dense.onnx",
        example=inputs,
        opset=cfg.opset,
        input_names=[one.name for one in source.inputs],
        output_names=source.outputs,
        free=source.free,
        metadata={},
    )
    runner = OrtRunner(made.path, threads=cfg.threads)
    feed = random_feeds(runner.inputs, seed=cfg.seed, batches=(1,), sizes=source.usual, ranges=source.ranges)[0]
    latency = race({"dense": runner}, feed, reference="dense", seconds=cfg.seconds, seed=cfg.seed)
    if task.taught:
        data = data.answered_by(Answering(lambda: model))
        progress.say(
            f"  {data.name} has no labels: what counts from here on is how near the outputs are to this model's"
        )
    elif not data.labelled:
        answers, classes = classification.answers(task, model, data)
        data = data.answered(answers, classes)
        save_tensors(answers | {Baseline.CLASSES: torch.tensor(classes)}, out / Baseline.ANSWERS)
        progress.say(f"  {data.name} has no labels: what counts from here on is how often a model answers as this one")
    (out / "latency.json").write_text(latency.model_dump_json(indent=1) + "\n", encoding="utf-8")
    (out / "model.txt").write_text(f"{model}\n", encoding="utf-8")
    return Baseline(
        folder=out,
        trained_here=seconds > 0,
        weights_origin=f"{origin}; {said}" if said else origin,
        score=evaluate(task, model, data, "test").score,
        score_name=task.score.name,
        calibration_score=evaluate(task, model, data, "calibration").score,
        params=sum(p.numel() for p in model.parameters()),
        macs=count_macs(captured.program),
        onnx_bytes=made.summary.bytes,
        latency_ms=latency.runners["dense"].median_ms,
        threads=cfg.threads,
        isa=host.isa(),
        training_seconds=seconds,
        zero_channels=_zero_channels(model),
        labelled=data.labelled,
    )


def _zero_channels(model: nn.Module) -> float:
    """Share of the output channels, of all matrices and kernels, that are wholly zero."""
    alive = [value.flatten(1).any(1) for value in prunable(model).values()]
    return float((~torch.cat(alive)).double().mean()) if alive else 0.0


def _fill(
    cfg: BaselineSection, model: nn.Module, source: ModelSource, data: Data, task: Task, out: Path, progress: Progress
) -> tuple[str, float]:
    """Give `model` its weights; where they came from, and the seconds that training took (0 = none)."""
    if cfg.weights == "pretrained" or (cfg.weights == "auto" and source.origin.brings):
        loaded = weights.load_pretrained(model, source)
        progress.say(f"  weights: {loaded}")
        if not loaded.fresh:
            return "pretrained", 0.0
        if not data.labelled:
            progress.say("  what is untrained answers at random: give weights of the whole model, --weights FILE")
            return "pretrained", 0.0
        return _trained(cfg, model, data, task, out, progress, "from these weights")
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
    if cfg.loop is not None:
        return _trained(cfg, model, data, task, out, progress, "from the beginning")
    if cfg.weights == "auto" and not source.initial:
        if source.origin.note:
            progress.say(f"  weights: {source.origin.note}")
        return "as given", 0.0
    if cfg.weights == "auto" and (not data.labelled or weights.comes_with(source)):
        progress.say(
            f"  weights: those that {source.spec} comes with, however often it is built"
            + ("; to train it from them: --weights train" if data.labelled else "")
        )
        return "as built", 0.0
    progress.say("  no weights were given")
    return _trained(cfg, model, data, task, out, progress, "from the beginning")


def _trained(
    cfg: BaselineSection, model: nn.Module, data: Data, task: Task, out: Path, progress: Progress, start: str
) -> tuple[str, float]:
    """Train `model`, by the recipe's own loop where it names one; what from, in words, and the seconds."""
    began = time.perf_counter()
    if cfg.loop is not None:
        own.train(cfg.loop, model, data, seed=cfg.seed, progress=progress)
        return f"trained here on {data.name} by {cfg.loop}", time.perf_counter() - began
    settings = default_settings(model, seed=cfg.seed, given=cfg.train)
    progress.say(f"  training on {data.name} {start} for {settings.epochs} epochs (done once; reused from then on)")
    result = loop.train(model, data, task, settings, checkpoint=out / "training.pt", progress=progress)
    history_csv(result.history, out / "history.csv")
    history_plot(result.history, result.best_epoch, out / "history.svg", task.score.name)
    (out / "training.pt").unlink(missing_ok=True)
    return f"trained here on {data.name}, {settings.epochs} epochs", time.perf_counter() - began
