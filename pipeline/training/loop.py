"""Training with masks held, from scratch or to recover: seeded, resumable after a kill, best epoch kept.

A run is a function of model, data and settings alone. What is random in an epoch (order, augmentation, dropout) is
drawn from generators seeded by (seed, epoch), so a run that was killed goes on from its last whole epoch to exactly the
weights that it would have reached, and nothing about generators has to be stored.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from foundation.errors import TrainingError, first_line
from foundation.files import replacing
from pipeline.data.parts import Data, Inputs, Target
from pipeline.models.calling import named
from pipeline.progress import Progress
from pipeline.recipe.train import TrainSettings
from pipeline.seeding import seeded
from pipeline.tasks.evaluation import evaluate
from pipeline.tasks.task import Task
from pipeline.training import masks as masking
from pipeline.training.history import Epoch
from pipeline.training.masks import Masks
from validators.runners import Array
from validators.scores import measured

OnStep = Callable[[int, int], Masks | None]
"""Called before each step with (step, total); masks that it returns, or puts on the model itself, hold from then on."""

FORMAT = 2
"""Of checkpoint files; another number is not resumed from."""


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

    Originals under a mask are as they were when it was put on, whatever weight decay and momentum did to them.

    Raises TrainingError if the loss becomes NaN or infinite, MaskError if a masked weight is not zero, ModelError if
    teacher and model disagree in shape, StoreError if the checkpoint cannot be written.
    """
    progress = progress or Progress()
    if masks:
        masking.apply(model, masks)
    with _threads(settings.threads):
        run = _Run(model, data, task, settings, teacher)
        key = run.key() if checkpoint else ""
        if checkpoint is not None:
            run.resume(checkpoint, key, progress)
        resumed_from = len(run.history)
        total = settings.epochs * run.steps
        with progress.bar("training", total) as bar:
            for epoch in range(len(run.history) + 1, settings.epochs + 1):
                done = run.epoch(epoch, total, on_step, bar)
                if checkpoint is not None:
                    run.save(checkpoint, key)
                if on_epoch is not None:
                    on_epoch(done)
        return run.finish(resumed_from)


TIMED_STEPS = 4
"""Steps that tell how long an epoch takes; one before them warms up."""


def seconds_per_epoch(
    model: nn.Module, data: Data, task: Task, settings: TrainSettings, teacher: nn.Module | None
) -> float:
    """How long an epoch of `train` would take here, timed on a few of its steps; `model` stays as it was.

    The pass over the calibration part that ends an epoch is counted as a third of what its samples cost in training,
    since it has no backward pass.
    """
    before = {name: value.clone() for name, value in model.state_dict().items()}
    was_training = model.training
    run = _Run(model, data, task, settings.model_copy(update={"lr": 0.0, "weight_decay": 0.0}), teacher)
    batches = data.batches("train", settings.batch_size, True, settings.seed, augment=settings.augment)
    model.train()
    began, steps = time.perf_counter(), 0
    with seeded(settings.seed):
        for steps, (inputs, target) in enumerate(itertools.islice(batches, 1 + TIMED_STEPS)):
            if steps == 1:
                began = time.perf_counter()
            run._step(inputs, target, 0.0)
    each = (time.perf_counter() - began) / max(1, steps)
    model.load_state_dict(before)
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    return each * (run.steps + len(data.calibration) / settings.batch_size / 3)


class _Run:
    """The moving parts of one training run."""

    def __init__(
        self, model: nn.Module, data: Data, task: Task, settings: TrainSettings, teacher: nn.Module | None
    ) -> None:
        self.model, self.data, self.task, self.settings = model, data, task, settings
        self.teacher = teacher.eval() if teacher is not None and settings.distill_weight > 0 else None
        if settings.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.steps = max(1, len(data.train) // settings.batch_size)
        self.optimizer = _optimizer(model, settings)
        self.history: list[Epoch] = []
        self._hold()
        self.best: dict[str, Tensor] | None = None
        self.best_epoch = 0

    def epoch(self, epoch: int, total: int, on_step: OnStep | None, bar: Callable[[int, str], None]) -> Epoch:
        """Train one pass, judge it, and remember it if it is the best."""
        began = time.perf_counter()
        seed = self.settings.seed * 1_000_003 + epoch
        lost, seen, rate = 0.0, 0, 0.0
        score = self.task.score
        called = score.name if self.data.labelled or self.task.taught else "agreement"
        held: Array | None = None
        # The short batch at the end is left out: batch norm fails on one sample and is noisy on few.
        batches = self.data.batches(
            "train", self.settings.batch_size, True, seed, augment=self.settings.augment, drop_last=True
        )
        self.model.train()
        with seeded(seed):
            for number, (inputs, target) in enumerate(batches):
                step = (epoch - 1) * self.steps + number
                if on_step is not None:
                    self._masks_from(on_step(step, total))
                rate = learning_rate(self.settings, step, total)
                loss, outputs = self._step(inputs, target, rate)
                if not math.isfinite(loss):
                    raise TrainingError(
                        f"The loss became {loss} in epoch {epoch}, step {number + 1}.",
                        "Lower the learning rate (lr), or clip the gradient (grad_clip).",
                    )
                self._check_one(step)
                rows = len(inputs[0])
                lost, seen = lost + loss * rows, seen + rows
                added = measured(score, outputs, target, rows)
                held = score.gathered(added[:0] if held is None else held, added)
                # One that has to look at all samples again is told at the end of the epoch only.
                shown = f"  {called} {score.words(score.of(held))}" if score.pooled is None else ""
                note = f"epoch {epoch}/{self.settings.epochs}  loss {lost / seen:.3f}{shown}"
                bar(step + 1, note)
        _put_back(self.model, self.masks, self.under)
        masking.check_held(self.model, self.masks)
        judged = evaluate(self.task, self.model, self.data, "calibration")
        trained = math.nan if held is None else score.of(held)
        done = Epoch(epoch, rate, lost / seen, trained, judged.loss, judged.score, time.perf_counter() - began)
        self.history.append(done)
        if self.best is None or self._rank(done) > self._rank(self.history[self.best_epoch - 1]):
            self.best, self.best_epoch = _copy(masking.originals(self.model)), epoch
        bar(
            epoch * self.steps,
            f"epoch {epoch}/{self.settings.epochs}  calibration {called} {score.words(judged.score)}",
        )
        return done

    def _rank(self, epoch: Epoch) -> tuple[float, float]:
        better = 1.0 if self.task.score.higher_is_better else -1.0
        return better * epoch.calibration_score, -epoch.calibration_loss

    def _step(self, inputs: Inputs, target: Target, rate: float) -> tuple[float, dict[str, Tensor]]:
        settings = self.settings
        if settings.channels_last:
            inputs = tuple(
                one.contiguous(memory_format=torch.channels_last) if one.dim() == 4 else one for one in inputs
            )
        outputs = named(self.model(*inputs))
        share = settings.distill_weight if self.teacher is not None else 0.0
        loss = torch.zeros(())
        if share < 1:
            loss = (1 - share) * self.task.losses(outputs, target, settings.label_smoothing).mean()
        if self.teacher is not None:
            with torch.no_grad():
                taught = named(self.teacher(*inputs))
            loss = loss + share * self.task.divergence(outputs, taught, settings.distill_temperature).mean()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if settings.grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return float(loss.detach()), {name: value.detach() for name, value in outputs.items()}

    def _masks_from(self, given: Masks | None) -> None:
        """Take over masks that were just returned or put on the model."""
        if given is not None:
            masking.apply(self.model, given)
        now = masking.masks_of(self.model)
        if now.keys() == self.held.keys() and all(now[name] is self.held[name] for name in now):
            return
        if any(name not in self.masks or not torch.equal(now[name], self.masks[name]) for name in now):
            self.best, self.best_epoch = None, 0  # epochs under other masks say nothing about these
        _put_back(self.model, self.masks, self.under)
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
        digest.update(str(self.teacher is not None).encode())
        for state in (masking.originals(self.model), self.masks):
            for name, value in state.items():
                digest.update(name.encode())
                digest.update(
                    value.detach().contiguous().view(-1).view(torch.uint8).numpy().data if value.numel() else b""
                )
        return digest.hexdigest()

    def save(self, path: Path, key: str) -> None:
        """Write everything that the next epoch needs."""
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
        # Not durable: a kill leaves whole files all the same, and after a power cut training just starts anew.
        with replacing(path, durable=False) as partial:
            try:
                torch.save(content, partial)
            except RuntimeError as error:  # how torch's own writer reports a full disk
                raise OSError(first_line(error)) from error

    def resume(self, path: Path, key: str, progress: Progress) -> None:
        """Go on from a checkpoint of this very run; anything else there is left unread and replaced."""
        if not path.is_file():
            return
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, KeyError, ValueError):
            progress.say("  The checkpoint is damaged; training starts anew.")
            return
        if not isinstance(found, Mapping) or found.get("key") != key:
            progress.say("  The checkpoint belongs to another run; training starts anew.")
            return
        masking.apply(self.model, found["masks"])
        masking.load_originals(self.model, found["weights"])
        self.optimizer.load_state_dict(found["optimizer"])
        self._hold()
        self.history = [Epoch(**one) for one in found["history"]]
        self.best, self.best_epoch = found["best"], found["best_epoch"]
        progress.say(f"  Resuming after epoch {len(self.history)} of {self.settings.epochs}.")

    def finish(self, resumed_from: int) -> TrainResult:
        """Put the best weights into the model."""
        if self.best is not None:
            masking.load_originals(self.model, self.best)
        self.model.eval()
        score = (
            self.history[self.best_epoch - 1].calibration_score
            if self.best_epoch
            else evaluate(self.task, self.model, self.data, "calibration").score
        )
        return TrainResult(
            settings=self.settings,
            history=tuple(self.history),
            state=_copy(masking.originals(self.model)),
            masks=self.masks,
            best_epoch=self.best_epoch,
            best_score=score,
            seconds=sum(one.seconds for one in self.history),
            resumed_from=resumed_from,
        )


def _optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Weight decay on tensors of two or more dimensions only; in the order of names, which masks do not change."""
    named = masking.parameters(model)
    trained = [named[name] for name in sorted(named) if named[name].requires_grad]
    groups = [
        {"params": [one for one in trained if one.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [one for one in trained if one.ndim < 2], "weight_decay": 0.0},
    ]
    # Fused: one kernel per step, 26 ms instead of 139 ms for ResNet-50 on one AVX2 core.
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.momentum, 0.999), fused=True)
    nesterov = settings.momentum > 0
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=nesterov, fused=True)


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
