"""Training with masks held, from scratch or to recover: seeded, resumable after a kill, best epoch kept.

A run is a function of model, data, settings, device and number of processes alone. What is random in an epoch (order,
augmentation, dropout) is drawn from generators seeded by (seed, epoch, process), so a run that was killed goes on from
its last whole epoch to exactly the weights that it would have reached, and nothing about generators has to be stored.

Where several processes train, each runs this loop on its part of every batch (`following.py`); the first one alone
reads and writes the checkpoint, asks the callbacks, and shows and returns the figures.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from foundation.errors import ConfigError, TrainingError, first_line
from foundation.files import replacing
from pipeline.data.parts import Batch, Data, Inputs, Target
from pipeline.data.samples import sliced
from pipeline.models.calling import named
from pipeline.progress import Progress
from pipeline.recipe.train import TrainSettings
from pipeline.seeding import of_epoch, seeded
from pipeline.tasks.evaluation import Evaluation, evaluate, judged, seen_by
from pipeline.tasks.task import Task
from pipeline.training import jobs, trackers
from pipeline.training import masks as masking
from pipeline.training.devices import CPU, Devices, check_pieces, check_rows, facts
from pipeline.training.history import Epoch
from pipeline.training.masks import Masks
from validators.runners import Array
from validators.scores import measured

OnStep = Callable[[int, int], Masks | None]
"""Called before each step with (step, total); masks that it returns, or puts on the model itself, hold from then on."""

FORMAT = 3
"""Of checkpoint files; another number is not resumed from."""
RESUMED = (".pt", ".epochs")
"""Endings of the files, in a stage's folder, that a run which was killed goes on from."""


@dataclass(frozen=True)
class TrainResult:
    """What a run ended in. The trained model itself holds the best state."""

    settings: TrainSettings
    history: tuple[Epoch, ...]
    state: dict[str, Tensor]
    """Best weights by calibration score, plain names, originals under the masks."""
    masks: dict[str, Tensor]
    best_epoch: int
    """1 is the first; 0 means that no epoch was trained."""
    best_score: float
    """On the calibration part."""
    seconds: float
    """Over all epochs, those before a kill included."""
    resumed_from: int = 0
    """Epochs that a checkpoint had done already."""


def learning_rate(settings: TrainSettings, step: int, total: int) -> float:
    """Learning rate at `step` of `total`, the first being 0.

    onecycle: a cosine up from lr/25 over the warm-up, then a cosine down to lr/250000, as torch's OneCycleLR (Smith &
    Topin 2017, arXiv:1708.07120). cosine: a linear warm-up, then a cosine down to 0 (Loshchilov & Hutter 2016,
    arXiv:1608.03983). constant: a linear warm-up, then lr.
    """
    rising = settings.warmup * total
    if settings.schedule == "onecycle":
        if step < rising - 1:
            return _between(settings.lr / 25, settings.lr, step / (rising - 1))
        return _between(settings.lr, settings.lr / 250_000, (step - rising + 1) / max(total - rising, 1))
    if step < rising:
        return settings.lr * min((step + 1) / rising, 1.0)
    if settings.schedule == "constant":
        return settings.lr
    return _between(settings.lr, 0.0, (step - rising) / max(total - rising, 1))


def _between(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(max(share, 0.0), 1.0))) / 2


def train(
    model: nn.Module,
    data: Data,
    task: Task,
    settings: TrainSettings,
    *,
    teacher: nn.Module | None = None,
    masks: Masks | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_step: OnStep | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train `model` in place and leave it with its best weights, in eval mode, its masks still on.

    The loss is the task's; with a `teacher` the share `distill_weight` of it is how far the outputs are from the
    teacher's (softened: Hinton et al. 2015, arXiv:1503.02531). The best epoch is the one with the best calibration
    score, of equals the one with the lowest loss, among those trained under the final masks. After each epoch the
    whole state is written to `checkpoint`, and a run that finds one of its own there goes on from it.

    Originals under a mask are as they were when it was put on, whatever weight decay and momentum did to them. The
    model is on the CPU before and after. Where several processes train, `on_step` may put masks on, and nothing else.

    Raises ConfigError if the device is not there, TrainingError if the loss becomes NaN or infinite, MaskError if a
    masked weight is not zero, ModelError if teacher and model disagree in shape, StoreError if the checkpoint cannot be
    written.
    """
    progress = progress or Progress()
    if masks:
        masking.apply(model, masks)
    with (
        _threads(settings.threads),
        jobs.handed_out(jobs.Training(settings, on_step is not None), model, data, teacher),
    ):
        return take_part(
            model, data, task, settings, teacher, on_epoch, on_step, on_step is not None, checkpoint, progress
        )


def take_part(
    model: nn.Module,
    data: Data,
    task: Task,
    settings: TrainSettings,
    teacher: nn.Module | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_step: OnStep | None = None,
    guided: bool = False,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """`train` on this process: on the first one all of it, on another one its share (`guided`: masks may change)."""
    progress = progress or Progress()
    with closing(_Run(model, data, task, settings, teacher, guided=guided)) as run:
        key = run.key() if checkpoint else ""
        run.saves = run.everybody_saves(checkpoint)
        run.begin(run.found(checkpoint, key, progress) if checkpoint is not None else None)
        if run.devices.doubtful and not run.history and settings.epochs:
            run.check_faster()
        resumed_from = len(run.history)
        total = settings.epochs * run.steps
        shown = trackers.start(settings, checkpoint, progress) if run.devices.leads else trackers.Nowhere()
        with shown, progress.bar("training", total) as bar:
            for epoch in range(len(run.history) + 1, settings.epochs + 1):
                done = run.epoch(epoch, total, on_step, bar)
                shown.show(done)
                run.save(checkpoint, key)
                if on_epoch is not None:
                    on_epoch(done)
        return run.finish(resumed_from)


APART = 2_654_435_761
"""Between the seeds of processes: no seed of an epoch is that of another process."""
TIMED_STEPS = 4
"""Steps that tell how long an epoch takes; one before them warms up."""


def seconds_per_epoch(
    model: nn.Module, data: Data, task: Task, settings: TrainSettings, teacher: nn.Module | None
) -> float:
    """How long an epoch of `train` would take here, timed on a few of its steps; `model` stays as it was.

    The pass over the calibration part that ends an epoch is counted as a third of what its samples cost in training,
    since it has no backward pass.
    """
    with _threads(settings.threads), jobs.handed_out(jobs.Training(settings, timed=True), model, data, teacher):
        return time_steps(model, data, task, settings, teacher)


def time_steps(model: nn.Module, data: Data, task: Task, settings: TrainSettings, teacher: nn.Module | None) -> float:
    """`seconds_per_epoch` on this process: all of them take the same steps."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    was_training = model.training
    still = settings.model_copy(update={"lr": 0.0, "weight_decay": 0.0})
    with closing(_Run(model, data, task, still, teacher)) as run:
        run.begin(None)
        batches = run.batches(settings.seed)
        run.model.train()
        began, steps = time.perf_counter(), 0
        with seeded(settings.seed, run.devices.device), run.devices.stepping():
            for steps, (inputs, target) in enumerate(itertools.islice(batches, 1 + TIMED_STEPS)):
                if steps == 1:
                    began = time.perf_counter()
                run.step(inputs, target, 0.0)
        each = (time.perf_counter() - began) / max(1, steps)
        model.load_state_dict(before)
        model.zero_grad(set_to_none=True)
        model.train(was_training)
        judging = len(data.calibration) / settings.batch_size / 3
        return each * (run.steps + judging)


class _Objective(nn.Module):
    """The model with its loss behind it, as one module: what several processes must agree in is what the loss reaches.

    Called with inputs, target and the share of the loss that these rows carry; gives the loss and the outputs.
    """

    def __init__(
        self, model: nn.Module, task: Task, settings: TrainSettings, teacher: nn.Module | None, devices: Devices
    ) -> None:
        super().__init__()
        self.model = model
        # Never used, so that DDP, which looks for parameters that a step does not reach, does not say each time that
        # there are none.
        self.idle = nn.Parameter(torch.zeros(1))
        self._task, self._settings, self._devices = task, settings, devices
        self._teacher: Callable[..., object] | None = None
        if teacher is not None:
            self._teacher = lambda *inputs: teacher(*inputs)  # not as a module of this one: nothing trains it

    def forward(self, inputs: Inputs, target: Target, weight: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, a scalar, and outputs by name."""
        settings, devices = self._settings, self._devices
        with devices.computing():
            outputs = devices.whole(named(self.model(*inputs)))
        share = settings.distill_weight if self._teacher is not None else 0.0
        loss = torch.zeros((), device=devices.device)
        if share < 1:
            with devices.losing():
                loss = (1 - share) * self._task.losses(outputs, target, settings.label_smoothing).mean()
        if self._teacher is not None:
            with torch.no_grad(), devices.computing():
                taught = devices.whole(named(self._teacher(*inputs)))
            with devices.losing():
                loss = loss + share * self._task.divergence(outputs, taught, settings.distill_temperature).mean()
        return (loss if weight == 1 else loss * weight), outputs


class _Run:
    """The moving parts of one training run."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        task: Task,
        settings: TrainSettings,
        teacher: nn.Module | None,
        *,
        guided: bool = False,
    ) -> None:
        self.data, self.task, self.settings, self.guided = data, task, settings, guided
        self.teacher = teacher.eval() if teacher is not None and settings.distill_weight > 0 else None
        self.devices = Devices(settings)
        self.saves = False
        self.share = replace(self.devices.share, cuts=settings.accumulate)
        self.rows = min(settings.batch_size, len(data.train))
        check_rows(len(data.train), settings)
        check_pieces(guided or bool(masking.masks_of(model)))
        if settings.channels_last and not self.devices.in_pieces:  # which are cut from rows that lie one after another
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.steps = max(1, len(data.train) // settings.batch_size)
        self.given, self.model = model, self.devices.trained(model)
        self.optimizer = _optimizer(self.model, settings, fused=not self.devices.in_pieces)
        self.history: list[Epoch] = []
        self._hold()
        self.best: dict[str, Tensor] | None = None
        self.best_epoch = 0

    def close(self) -> None:
        """Leave the device."""
        self.devices.close(self.given, *([] if self.teacher is None else [self.teacher]))

    def everybody_saves(self, checkpoint: Path | None) -> bool:
        """Whether this process takes part in writing checkpoints: with its pieces, or alone."""
        has = checkpoint is not None
        return self.devices.told(has) if self.devices.in_pieces else has

    def begin(self, found: Mapping[str, Any] | None) -> None:
        """Start, or go on from what a checkpoint held, on every process alike; then the model is on its device."""
        found = self.devices.told(found)
        if found is not None:
            masking.apply(self.model, found["masks"])
            own = masking.originals(self.model)
            masking.load_originals(self.model, self._pieces(found["weights"], own))
            self.optimizer.load_state_dict(found["optimizer"])
            for parameter, held in self.optimizer.state.items():
                held.update({name: self.devices.pieces(value, parameter) for name, value in held.items()})
            self.history = [Epoch(**one) for one in found["history"]]
            self.best, self.best_epoch = self._pieces(found["best"], own), found["best_epoch"]
        self.devices.place(self.model)
        if self.teacher is not None:
            self.devices.place(self.teacher)
        if found is not None:
            self.optimizer.load_state_dict(self.optimizer.state_dict())  # its state follows the weights
        self._hold()
        self._prepare()

    def _pieces(self, state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.devices.pieces(value, like[name]) for name, value in state.items()}

    def _prepare(self) -> None:
        """Make the module that steps call."""
        self.objective: nn.Module | None = None  # what was there leaves the parameters first
        objective = _Objective(self.model, self.task, self.settings, self.teacher, self.devices)
        self.devices.place(objective)
        self.objective = self.devices.prepared(objective)

    def check_faster(self) -> None:
        """Raise ConfigError where a step takes no less in the lower precision than in float32, by processor seconds.

        The same batch forward and back, in turn, the least time of each; model and generators stay as they were.
        """
        before = _copy(self.model.state_dict())
        self.model.train()
        least = {True: math.inf, False: math.inf}
        with seeded(self.settings.seed), self.devices.stepping():
            inputs, target = next(self.batches(self.settings.seed))
            for number in range(2 * (1 + TIMED_STEPS)):
                lowered = number % 2 == 0
                with nullcontext() if lowered else self.devices.in_float32():
                    began = time.process_time()
                    self.back(inputs, target)
                    took = time.process_time() - began
                if number > 1:
                    least[lowered] = min(least[lowered], took)
        self.model.load_state_dict(before)
        self.optimizer.zero_grad()
        ratio = self.devices.told(least[True] / least[False])
        if ratio >= 1:
            raise ConfigError(
                f"precision is {self.settings.precision!r}, and on this CPU a step of this model takes "
                f"{ratio:.2f} times as long in it as in float32.",
                'Write precision = "float32".',
            )

    def batches(self, seed: int) -> Iterator[Batch]:
        """This process's part of every batch of an epoch.

        The short batch at the end is left out: batch norm fails on one sample and is noisy on few.
        """
        settings = self.settings
        return self.data.batches(
            "train", settings.batch_size, True, seed, augment=settings.augment, drop_last=True, share=self.share
        )

    def epoch(self, epoch: int, total: int, on_step: OnStep | None, bar: Callable[[int, str], None]) -> Epoch:
        """Train one pass, judge it, and remember it if it is the best."""
        began = time.perf_counter()
        devices = self.devices
        seed = of_epoch(self.settings.seed, epoch)
        lost, seen, rate = 0.0, 0.0, 0.0
        score = self.task.score
        called = score.name if self.data.labelled or self.task.taught else "agreement"
        held: Array | None = None
        self.model.train()
        # The order of samples is everybody's, what a process draws itself (dropout) is its own.
        with seeded(seed + devices.rank * APART, devices.device), devices.stepping():
            for number, (inputs, target) in enumerate(self.batches(seed)):
                step = (epoch - 1) * self.steps + number
                if self.guided:
                    self._masks_from(on_step(step, total) if on_step is not None else None)
                rate = learning_rate(self.settings, step, total)
                own, outputs = self.step(inputs, target, rate)
                rows = len(inputs[0])
                summed, everybodys = devices.summed(own * rows, rows)
                if not math.isfinite(summed):
                    raise TrainingError(
                        f"The loss became {summed / everybodys} in epoch {epoch}, step {number + 1}.",
                        "Lower the learning rate (lr), or clip the gradient (grad_clip).",
                    )
                self._check_one(step)
                lost, seen = lost + summed, seen + everybodys
                added = measured(score, outputs, target, rows)
                held = score.gathered(added[:0] if held is None else held, added)
                # One that has to look at all samples again is told at the end of the epoch only.
                shown = f"  {called} {score.words(score.of(held))}" if score.pooled is None else ""
                note = f"epoch {epoch}/{self.settings.epochs}  loss {lost / seen:.3f}{shown}"
                bar(step + 1, note)
        _put_back(self.model, self.masks, self.under)
        masking.check_held(self.model, self.masks)
        judged = self.judged()
        everybodys_held = devices.gathered([] if held is None else [held])
        trained = score.of(np.concatenate(everybodys_held)) if everybodys_held else math.nan
        done = Epoch(epoch, rate, lost / seen, trained, judged.loss, judged.score, time.perf_counter() - began)
        self.history.append(done)
        if self.best is None or self._rank(done) > self._rank(self.history[self.best_epoch - 1]):
            self.best, self.best_epoch = _copy(masking.originals(self.model)), epoch
        bar(
            epoch * self.steps,
            f"epoch {epoch}/{self.settings.epochs}  calibration {called} {score.words(judged.score)}",
        )
        return done

    def judged(self) -> Evaluation:
        """The model on the calibration part, in float32 always; processes take whole batches in turn, since a score may
        compare the samples of one.
        """
        devices = self.devices
        if devices.count == 1 and devices.device.type == "cpu":
            return evaluate(self.task, self.model, self.data, "calibration")
        self.model.eval()
        batches = self.data.batches("calibration", self.task.batch, turn=(devices.rank, devices.count))
        run = devices.judging(lambda *inputs: named(self.model(*inputs)))
        seen = seen_by(self.task, run, batches)
        turns = -(-math.ceil(len(self.data.calibration) / self.task.batch) // devices.count)
        if devices.in_pieces and len(seen) < turns:
            with torch.no_grad():  # others have one batch more, and need these pieces for it
                run(*next(self.data.batches("calibration", self.task.batch))[0])
        return judged(self.task, self.devices.gathered(seen))

    def _rank(self, epoch: Epoch) -> tuple[float, float]:
        better = 1.0 if self.task.score.higher_is_better else -1.0
        return better * epoch.calibration_score, -epoch.calibration_loss

    def step(self, inputs: Inputs, target: Target, rate: float) -> tuple[float, dict[str, Tensor]]:
        """One step on this process's rows of a batch: their mean loss, and the outputs, on the CPU."""
        found = self.back(inputs, target)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.devices.step(self.optimizer, self.model, self.settings.grad_clip)
        return found

    def back(self, inputs: Inputs, target: Target) -> tuple[float, dict[str, Tensor]]:
        """Forward and back, cut by cut; the gradients are the whole batch's."""
        devices = self.devices
        if self.settings.channels_last:
            inputs = tuple(
                one.contiguous(memory_format=torch.channels_last) if one.dim() == 4 else one for one in inputs
            )
        assert self.objective is not None
        whole = self.settings.accumulate == devices.count == 1
        self.optimizer.zero_grad()
        lost, outputs, start = 0.0, [], 0
        sizes = self.share.sizes(self.rows)
        for number, rows in enumerate(sizes, start=1):
            part = slice(start, start + rows)
            start += rows
            given = inputs if len(sizes) == 1 else tuple(one[part] for one in inputs)
            aim = target if len(sizes) == 1 else sliced(target, part)
            with devices.adding(self.objective, self.model, last=number == len(sizes)):
                # Its share of the whole batch's mean, times the processes whose gradients are averaged.
                weight = 1.0 if whole else rows * devices.count / self.rows
                loss, found = self.objective(devices.moved(given), devices.moved(aim), weight)
                devices.backward(loss)
            lost += float(loss.detach()) / weight * rows
            outputs.append(devices.back(found))
        return lost / sum(sizes), _joined(outputs)

    def _masks_from(self, given: Masks | None) -> None:
        """Take over masks that were just returned or put on the model."""
        if given is not None:
            masking.apply(self.model, self.devices.moved(dict(given)))
        now = masking.masks_of(self.model)
        changed = now.keys() != self.held.keys() or any(now[name] is not self.held[name] for name in now)
        told = self.devices.told(now if changed else None)
        if told is not None and not self.devices.leads:
            masking.apply(self.model, self.devices.moved(told))
            now = masking.masks_of(self.model)
        if now.keys() == self.held.keys() and all(now[name] is self.held[name] for name in now):
            return
        if any(name not in self.masks or not torch.equal(now[name], self.masks[name]) for name in now):
            self.best, self.best_epoch = None, 0  # epochs under other masks say nothing about these
        _put_back(self.model, self.masks, self.under)
        if self.devices.count > 1 and now.keys() != self.held.keys():
            self.optimizer.zero_grad()
            self._prepare()  # a parameter that was just masked is no longer seen by what averages gradients
        self._hold()

    def _hold(self) -> None:
        """Remember the masks now on the model, in copies that nobody else can change, and what lies under them."""
        self.held = masking.masks_of(self.model)
        self.masks = _copy(self.held)
        self.under = _under(self.model, self.masks)

    def _check_one(self, step: int) -> None:
        """Check one masked parameter, another one each step; all of them are checked after each epoch."""
        if self.masks:
            name = list(self.masks)[step % len(self.masks)]
            masking.check_held(self.model, {name: self.masks[name]})

    def key(self) -> str:
        """What a checkpoint must agree in: settings, data, masks, and the weights that training starts from."""
        digest = hashlib.sha256(
            f"{FORMAT} {self.settings.model_dump_json()} {self.data.fingerprint} {self.task.fingerprint}".encode()
        )
        digest.update(repr(sorted(facts(self.settings).items())).encode())
        digest.update(str(self.teacher is not None).encode())
        for state in (masking.originals(self.given), self.masks):
            for name, value in state.items():
                digest.update(name.encode())
                digest.update(
                    value.detach().contiguous().view(-1).view(torch.uint8).numpy().data if value.numel() else b""
                )
        return digest.hexdigest()

    def save(self, path: Path | None, key: str) -> None:
        """Write everything that the next epoch needs, on the process that has a `path`; where weights lie in pieces,
        the others give theirs.
        """
        if not self.saves:
            return
        fresh = self.best is not None and self.best_epoch == len(self.history)
        content = {
            "key": key,
            "weights": self.best if fresh else masking.originals(self.model),  # one copy where they are the same
            "masks": self.masks,
            "optimizer": self.optimizer.state_dict(),
            "history": [asdict(one) for one in self.history],
            "best": self.best,
            "best_epoch": self.best_epoch,
        }
        content = self.devices.in_one(content)
        if path is None:
            return
        # Not durable: a kill leaves whole files all the same, and after a power cut training just starts anew.
        with replacing(path, durable=False) as partial:
            try:
                torch.save(content, partial)
            except RuntimeError as error:  # how torch's own writer reports a full disk
                raise OSError(first_line(error)) from error

    def found(self, path: Path, key: str, progress: Progress) -> Mapping[str, Any] | None:
        """The checkpoint of this very run; anything else there is left unread and replaced."""
        if not path.is_file():
            return None
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, KeyError, ValueError):
            progress.say("  The checkpoint is damaged; training starts anew.")
            return None
        if not isinstance(content, Mapping) or content.get("key") != key:
            progress.say("  The checkpoint belongs to another run; training starts anew.")
            return None
        progress.say(f"  Resuming after epoch {len(content['history'])} of {self.settings.epochs}.")
        return content

    def finish(self, resumed_from: int) -> TrainResult:
        """Put the best weights into the model."""
        if self.best is not None:
            masking.load_originals(self.model, self.best)
        self.model.eval()
        if self.devices.in_pieces:
            masking.load_originals(self.given, self.devices.in_one(masking.originals(self.model)))
            self.given.eval()
        score = self.history[self.best_epoch - 1].calibration_score if self.best_epoch else self.judged().score
        self.model.zero_grad(set_to_none=True)
        return TrainResult(
            settings=self.settings,
            history=tuple(self.history),
            state={name: value.to(CPU) for name, value in _copy(masking.originals(self.given)).items()},
            masks={name: value.to(CPU) for name, value in self.masks.items()},
            best_epoch=self.best_epoch,
            best_score=score,
            seconds=sum(one.seconds for one in self.history),
            resumed_from=resumed_from,
        )


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    if len(parts) == 1:
        return dict(parts[0])
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _optimizer(model: nn.Module, settings: TrainSettings, *, fused: bool = True) -> torch.optim.Optimizer:
    """Weight decay on tensors of two or more dimensions only, and on none that says how an orthogonal matrix is turned;
    in the order of names, which masks do not change.
    """
    named, turning = masking.parameters(model), _turning(model)
    trained = [named[name] for name in sorted(named) if named[name].requires_grad]
    decaying = [one.ndim >= 2 and id(one) not in turning for one in trained]
    groups = [
        {"params": list(itertools.compress(trained, decaying)), "weight_decay": settings.weight_decay},
        {"params": [one for one, decays in zip(trained, decaying, strict=True) if not decays], "weight_decay": 0.0},
    ]
    # Fused: one kernel per step, 26 ms instead of 139 ms for ResNet-50 on one AVX2 core. Torch has none for pieces.
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.momentum, 0.999), fused=fused)
    nesterov = settings.momentum > 0
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=nesterov, fused=fused)


def _turning(model: nn.Module) -> set[int]:
    """Ids of what lies behind weights that torch keeps orthogonal.

    Their norm is what it is, so decay means nothing to them; and torch keeps signs among these numbers, as 1 and -1,
    which it reads as integers: the first decay makes them 0, and with them the whole weight.
    """
    return {
        id(value)
        for part in model.modules()
        if isinstance(part, parametrize.ParametrizationList)
        if any(isinstance(one, parametrizations._Orthogonal) for one in part)
        for value in part.parameters()
    }


def _under(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
    """Original values under the masks, in one row each."""
    state = masking.originals(model) if masks else {}
    return {name: state[name][~mask].clone() for name, mask in masks.items()}


def _put_back(model: nn.Module, masks: Masks, under: Mapping[str, Tensor]) -> None:
    """Undo what weight decay and momentum did to the originals under the masks."""
    state = masking.originals(model) if masks else {}
    for name, mask in masks.items():
        state[name].masked_scatter_(~mask, under[name])


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Use that many torch threads inside the block; 0 leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
