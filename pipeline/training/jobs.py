"""Handing a job, training or a fit, from the first process to the others: which model, from which weights, how.

What the others have of their own are model source, data and task, built from the same command line. A model that
`source` builds is built there, too; another one (made smaller, say) travels whole, as a pickle within the run's own
process group. Its weights follow, tensor by tensor; its masks, which pickles do not bear, go beside it.
"""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from foundation.errors import ModelError, TrainingError, first_line
from pipeline.data.parts import AnsweredBy, Data, Part
from pipeline.models.at_home import own_class
from pipeline.models.dense import Answering
from pipeline.models.source import ModelSource
from pipeline.recipe.train import TrainSettings
from pipeline.training import devices
from pipeline.training import masks as masking

_PARTS: tuple[Part, ...] = ("train", "calibration")


@dataclass(frozen=True)
class Training:
    """Train by `settings`; `guided` where masks may change before any step, `timed` where a few steps are all."""

    settings: TrainSettings
    guided: bool = False
    timed: bool = False


@dataclass(frozen=True)
class Fit:
    """Fit what the model's masks have left to what the teacher gives, on so many `samples` of the training part."""

    samples: int
    seed: int


Work = Training | Fit


@dataclass(frozen=True)
class _Sketch:
    """A module as far as others can tell whether theirs is the same: `digest` of its layers and the shapes in it."""

    digest: str
    masks: dict[str, Tensor]
    frozen: tuple[str, ...]
    """Parameters that are not trained."""


@dataclass(frozen=True)
class _Header:
    work: Work
    modules: tuple[_Sketch | None, ...]
    """The model, its teacher, and the model whose answers are the data's targets."""
    labels: Mapping[Part, Tensor | None]
    """Answers in the place of labels, for data that has none."""
    data: tuple[str, ...]
    """What the data of all must agree in."""


@dataclass(frozen=True)
class Job:
    """What a process is to do, and on what."""

    work: Work
    model: nn.Module
    teacher: nn.Module | None
    data: Data


# ── the first process ────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def handed_out(work: Work, model: nn.Module, data: Data, teacher: nn.Module | None) -> Iterator[None]:
    """Hand a job to the other processes, if there are any, and do one's own part of it within the context.

    Raises ModelError where the model is none that they can build, nor one that can be pickled.
    """
    if devices.count() == 1:
        yield
        return
    answering = None
    if data.answer is not None and isinstance(work, Training):
        by = data.answer.model if isinstance(data.answer, AnsweredBy) else None
        if not isinstance(by, Answering):
            raise TrainingError("The targets are made by a function that other processes have not.", "Train with one.")
        answering = by.model()
    taught = isinstance(work, Fit) or work.settings.distill_weight > 0
    modules = (model, teacher if taught else None, answering)
    labels = {part: data.split(part).labels for part in _PARTS} if not data.labelled and data.answer is None else {}
    sketches = tuple(None if one is None else _sketch(one) for one in modules)
    devices.told(_Header(work, sketches, labels, _agreeing(data)))
    if refusal := _refusal(""):
        raise TrainingError(refusal, "All processes must be given the same model and data.")
    for module in modules:
        if module is None:
            continue
        if not all(devices.everybodys(True)):
            carried, reason = _pickled(module)
            devices.told((carried, own_class(module) is not type(module)))
            if refusal := _refusal(reason):
                raise ModelError(
                    f"The model cannot be handed to the other processes: {refusal}.",
                    "Train with one process, or define its classes at the top of an importable module.",
                )
        _alike(module)
    yield


def _sketch(module: nn.Module) -> _Sketch:
    frozen = tuple(name for name, value in masking.parameters(module).items() if not value.requires_grad)
    return _Sketch(_digest(module), masking.masks_of(module), frozen)


def _digest(module: nn.Module) -> str:
    state = sorted(masking.originals(module).items())  # masks change the order
    told: list[object] = [(name, tuple(value.shape), str(value.dtype)) for name, value in state]
    for name, part in module.named_modules():
        if "parametrizations" not in name.split("."):
            kind = type(part).__bases__[0] if torch.nn.utils.parametrize.is_parametrized(part) else type(part)
            told.append((name, kind.__qualname__, part.extra_repr()))
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _pickled(module: nn.Module) -> tuple[bytes | None, str]:
    """The module without its masks, and "", or None and the reason."""
    plain = copy.deepcopy(module)
    state = masking.originals(module)
    masking.fold(plain)
    plain.load_state_dict(state)
    plain.__class__ = own_class(plain)  # a pickle knows the user's alone
    into = io.BytesIO()
    try:
        torch.save(plain, into)
    except Exception as error:  # whatever its classes say to being pickled
        return None, first_line(error)
    return into.getvalue(), ""


def _agreeing(data: Data) -> tuple[str, ...]:
    return (data.fingerprint, *(str(len(data.split(part))) for part in _PARTS))


# ── the others ───────────────────────────────────────────────────────────────────────────────────────────────────────


def received(source: ModelSource, data: Data) -> Job | None:
    """Wait for the next job; None when there is no more, `Job` with everything in place else.

    Raises TrainingError where this process cannot take part; the first one is told.
    """
    header = _heard()
    if header is None:
        return None
    assert isinstance(header, _Header)
    other = header.labels == {} and header.data != _agreeing(data)
    if refusal := _refusal(f"Process {devices.rank()} has other data." if other else ""):
        raise TrainingError(refusal)
    made = [None if sketch is None else _made(sketch, source) for sketch in header.modules]
    model, teacher, answering = made
    assert model is not None
    if header.labels:
        train, calibration = (replace(data.split(part), labels=header.labels[part]) for part in _PARTS)
        data = replace(data, train=train, calibration=calibration)
    if answering is not None:
        data = data.answered_by(Answering(lambda: answering))
    return Job(header.work, model, teacher, data)


def _made(sketch: _Sketch, source: ModelSource) -> nn.Module:
    """The module of a sketch, with the first process's weights."""
    builds = (build() for build in (source.build, source.build_as_given))
    found = next((one for one in builds if _digest(one) == sketch.digest), None)
    if not all(devices.everybodys(found is not None)):
        (carried, adapted), reason = _heard(), ""
        if carried is not None:
            try:
                found = torch.load(io.BytesIO(carried), weights_only=False)  # from this run's own first process
                if adapted and source.adapt is not None:
                    found = source.adapt(found)
            except Exception as error:
                reason = f"{type(error).__name__}: {first_line(error)}"
        if _refusal(reason) or found is None:
            raise TrainingError("No model to train.")
    assert found is not None
    for name, value in masking.parameters(found).items():
        value.requires_grad_(name not in sketch.frozen)
    _alike(found)
    masking.apply(found, sketch.masks)
    return found


def _alike(module: nn.Module) -> None:
    """Give the module the first process's weights, on every process."""
    for _, value in sorted(masking.originals(module).items()):
        sent = value.detach().contiguous()
        dist.broadcast(sent, src=0)
        if sent.data_ptr() != value.data_ptr():
            value.detach().copy_(sent)


def over() -> None:
    """Tell the others that there is no more to do."""
    if devices.count() > 1 and devices.rank() == 0:
        devices.told(None)


def _heard() -> Any:
    """What the first process tells."""
    return devices.told(None)


def _refusal(own: str) -> str:
    """The first reason against a job that any process has; "" where none has one."""
    return next(filter(None, devices.everybodys(own)), "")
