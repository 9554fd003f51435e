"""What criteria look at besides the weights, gathered in forward and backward passes over the calibration part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from foundation.errors import DataError, ModelError
from pipeline.channels.coupling.groups import Analysis
from pipeline.data.parts import Data, Inputs
from pipeline.models.calling import named
from pipeline.selection.activations import SAMPLES, norm_scales, observe_readers
from pipeline.selection.criteria import Evidence, Observation, Scores, over_indices, per_index
from pipeline.selection.criteria import effects as effects_of
from pipeline.tasks.task import Task
from pipeline.training import masks

BATCH = 64
ONE_BY_ONE = 256
"""Samples, at the most, whose gradients are taken one by one."""
JUDGES = 2
"""One in so many calibration samples, at the most, is kept from the readers."""


def observe(
    model: nn.Module,
    data: Data,
    task: Task,
    wanted: frozenset[Observation],
    analysis: Analysis,
    samples: int = 64,
    *,
    seed: int = 0,
) -> Evidence:
    """The weights as the masked model sees them, and what else is `wanted`; `samples` of the calibration part.

    What readers see is observed on others of it: these are there to judge what is fitted to that. One in `JUDGES` of a
    part is the most that judges then. What is masked already counts zero, so that pruning in rounds only ever takes
    more. `seed` draws the labels of "sampled effects" and the positions of activations. Deterministic. Raises
    ModelError, naming the layer, for gradients and activations that are not finite.
    """
    held = masks.masks_of(model)
    state = masks.originals(model)
    weights = {name: value * held[name] if name in held else value for name, value in state.items()}
    effects = wanted & {"effects", "sampled effects"}
    readers = wanted & {"activations", "grams"}
    judges, others = _divided(data, samples if "samples" in wanted else 0) if readers else (data, data)
    captured = analysis.captured.with_state(weights)
    read = _varied(others.sample("calibration", SAMPLES)) if readers else None
    return Evidence(
        weights,
        gradients=_gradients(model, data, task) if "gradients" in wanted else {},
        samples=judges.sample("calibration", samples) if "samples" in wanted else None,
        scales=norm_scales(captured),
        seed=seed,
        effects=_effects(model, data, task, weights, analysis, "sampled effects" in effects, seed) if effects else {},
        readers=observe_readers(captured, analysis.clusters, read, grams="grams" in readers, seed=seed) if read else {},
        others=read,
    )


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The trained parameters by name, without gradients; dropout off, norms as in use. Afterwards all is as before."""
    parameters = masks.parameters(model)
    before = {name: value.grad for name, value in parameters.items()}
    was_training = model.training
    model.eval()
    try:
        for value in parameters.values():
            value.grad = None
        yield parameters
    finally:
        for name, value in parameters.items():
            value.grad = before[name]
        model.train(was_training)


def _gradients(model: nn.Module, data: Data, task: Task) -> dict[str, Tensor]:
    """Parameter -> gradient of the task's loss, mean over the calibration samples."""
    with _differentiable(model):
        for inputs, target in data.batches("calibration", BATCH):
            loss = task.losses(named(model(*inputs)), target, 0.0).sum() / len(data.calibration)
            loss.backward()  # type: ignore[no-untyped-call]
        return _gathered(model)


def _effects(
    model: nn.Module,
    data: Data,
    task: Task,
    weights: Mapping[str, Tensor],
    analysis: Analysis,
    sampled: bool,
    seed: int,
) -> dict[str, Scores]:
    """Cluster -> mean over samples of (Σ g·w over the group)², g the gradient of one sample's loss.

    `sampled`: the label of each is drawn from the model's own softmax instead of taken from the data.
    """
    places = {place for cluster in analysis.clusters for place in cluster.labels}
    total = {cluster.name: np.zeros(cluster.size) for cluster in analysis.clusters}
    draw = torch.Generator().manual_seed(seed)
    part = data.some("calibration", ONE_BY_ONE)
    with _differentiable(model) as parameters:
        for inputs, target in part.batches("calibration", 1):
            outputs = _outputs_of_one(model, inputs)
            if sampled:
                shares = task.read(outputs).detach().double().softmax(1)
                _check({"the last layer": shares}, "outputs")
                target = torch.multinomial(shares, 1, generator=draw).flatten()
            task.losses(outputs, target, 0.0).sum().backward()  # type: ignore[no-untyped-call]
            products = {name: effects_of(value, weights[name]) for name, value in _gathered(model).items()}
            sums = {(name, dim): per_index(products[name], dim) for name, dim in places if name in products}
            for cluster in analysis.clusters:
                total[cluster.name] += np.square(over_indices(cluster, sums)) / len(part.calibration)
            for value in parameters.values():
                value.grad = None
    return total


def _outputs_of_one(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """The outputs for one sample, (1, ...) each; it is given twice to a model that takes no batch of one, or drops the
    dimension.
    """
    try:
        found = named(model(*inputs))
        if all(value.dim() > 1 and len(value) == 1 for value in found.values()):
            return found
    except (RuntimeError, IndexError, ValueError, TypeError):
        pass
    twice = named(model(*(torch.cat([one, one]) for one in inputs)))
    return {name: value[:1] for name, value in twice.items()}


def _divided(data: Data, judges: int) -> tuple[Data, Data]:
    """`data` with up to so many samples of its calibration part, evenly spaced, and with all others; with all of them,
    twice, where nobody judges or nobody would be left.
    """
    count = len(data.calibration)
    judges = min(judges, count // JUDGES)
    if not judges:
        return data, data
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[torch.linspace(0, count - 1, judges).long()] = True
    first, second = (data.only("calibration", some.nonzero().flatten()) for some in (chosen, ~chosen))
    return first, second


def _varied(samples: Inputs) -> Inputs:
    """`samples`. Raises DataError where there are several and all of them are alike."""
    if len(samples[0]) > 1 and all(bool((one == one[:1]).all()) for one in samples):
        raise DataError(
            f"The {len(samples[0])} calibration samples are all alike: what layers read does not vary over them.",
            "Give samples that differ, or look at the weights only: --set prune.criterion=l2 --set prune.refit=false",
        )
    return samples


def _gathered(model: nn.Module) -> dict[str, Tensor]:
    """The gradients by every name of their parameters. Raises ModelError where one is not finite."""
    named = {name: masks.original_of(module, attribute) for name, module, attribute in masks.parameters_by_name(model)}
    found = {name: value.grad for name, value in named.items() if value.grad is not None}
    _check(found)
    return found


def _check(found: Mapping[str, Tensor], what: str = "gradients") -> None:
    """Raise ModelError for the first that is not finite."""
    for name, value in found.items():
        if not bool(value.isfinite().all()):
            layer = name.rpartition(".")[0] or name
            raise ModelError(
                f"The {what} of {layer} are NaN or infinite on the calibration samples.",
                "Check the weights and the samples, or take a criterion that looks at the weights only: "
                "--set prune.criterion=l2",
            )
