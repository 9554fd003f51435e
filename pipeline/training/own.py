"""A training loop of the user's own, for the baseline or for recovery: `train = "file.py:fit"`.

    def fit(model, data, report):
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for epoch in range(3):
            for step, (inputs, target) in enumerate(batches := data.loader("train", 64)):
                ...
                report(step, len(batches), f"loss {loss:.3f}")

`model` is a plain module of the user's own class: in recovery the smaller one, so that no mask is on it and an average
of weights, a deep copy, a checkpoint or a pickle are what they always are. Where masks are all there is (single
weights, or a class that cannot be the smaller model), what they remove is made zero before every forward, in copies and
pickles of the module as well. `fit` trains in place and returns nothing, or returns the module whose weights count.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

from foundation.errors import ConfigError, TrainingError, nearest
from pipeline.data.parts import Data, Inputs, Part
from pipeline.models.at_home import as_written
from pipeline.models.from_code import load_callable, user_code
from pipeline.progress import Bar, Progress
from pipeline.seeding import of_epoch, seeded
from pipeline.training import launched
from pipeline.training import masks as masking
from pipeline.training.masks import Masks

WRAPPERS = ("module.", "_orig_mod.")
"""What torch's DistributedDataParallel and compile put before the names of a module that they wrap."""


@dataclass(frozen=True)
class TrainingData:
    """What a loop trains on: `train` to learn from, `calibration` to choose the best epoch by; never the test part.

    Inputs are in the form in which the model's own forward takes them: a tensor, a tuple of them, or a mapping by name.
    `teacher`: the dense model in recovery, in eval mode, called like the model; None for the baseline. `labels`: name
    of each class, where targets are class numbers.
    """

    data: Data
    teacher: nn.Module | None
    by_name: bool
    seed: int

    @property
    def labels(self) -> tuple[str, ...]:
        """Name of each class; empty where targets are no class numbers."""
        return self.data.labels

    def loader(
        self, part: Part = "train", batch_size: int = 64, *, shuffle: bool | None = None, augment: bool | None = None
    ) -> Loader:
        """Batches of (inputs, target), anew and in another order each time it is iterated; the order depends on the
        recipe's seed and on how often that was. `shuffle` and `augment`: True for the training part where left out.
        """
        _check(part)
        learning = part == "train"
        return Loader(
            self, part, batch_size, learning if shuffle is None else shuffle, augment in (None, True) and learning
        )

    def dataset(self, part: Part = "train") -> Samples:
        """The samples as a torch Dataset of (inputs, target) without the batch dimension, for loops that batch."""
        _check(part)
        return Samples(self, part)

    def given(self, inputs: Inputs) -> Any:
        """A row of tensors in the form that the model's own forward takes."""
        if self.by_name:
            return {one.name: value for one, value in zip(self.data.inputs, inputs, strict=True)}
        args, kwargs = pytree.tree_unflatten(list(inputs), self.data.fed.tree)
        if not kwargs:
            return args[0] if len(args) == 1 else tuple(args)
        return kwargs if not args else (tuple(args), kwargs)


def _check(part: str) -> None:
    if part not in ("train", "calibration"):
        raise ConfigError(
            f"A loop of your own asked for the part {part!r}.",
            nearest(part, ("train", "calibration")) or "There are train and calibration; the test part judges later.",
        )


@dataclass
class Loader:
    """Batches of one part."""

    of: TrainingData
    part: Part
    batch_size: int
    shuffle: bool
    augment: bool
    passes: int = 0

    def __len__(self) -> int:
        return -(-len(self.of.data.split(self.part)) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        self.passes += 1
        seed = of_epoch(self.of.seed, self.passes)
        data = self.of.data
        for inputs, target in data.batches(self.part, self.batch_size, self.shuffle, seed, augment=self.augment):
            yield self.of.given(inputs), target


class Samples(Dataset[tuple[Any, Any]]):
    """One part, sample by sample."""

    def __init__(self, of: TrainingData, part: Part) -> None:
        self.of, self.part = of, part

    def __len__(self) -> int:
        return len(self.of.data.split(self.part))

    def __getitem__(self, number: int) -> tuple[Any, Any]:
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        data = self.of.data.only(self.part, torch.tensor([number % len(self)]))
        inputs, target = next(data.batches(self.part, 1))
        alone = [value[0] for value in inputs]
        return self.of.given(tuple(alone)), pytree.tree_map(lambda x: x[0] if isinstance(x, Tensor) else x, target)


class Report:
    """How a loop tells where it is: `report(done, total, note)`, shown as a bar."""

    def __init__(self, progress: Progress, stack: ExitStack) -> None:
        self._progress, self._stack = progress, stack
        self._bar: Bar | None = None

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Move to `done` of `total`; `note` shows the figures of the moment, such as the loss."""
        if self._bar is None:
            self._bar = self._stack.enter_context(self._progress.bar("own loop", total))
        self._bar(done, note)


def check(*specs: str | None) -> None:
    """Raise ConfigError where a loop is named that cannot be had: no such callable, or several processes."""
    for spec in specs:
        if spec is None:
            continue
        load_callable(spec, ConfigError)
        place = launched.place()
        if place is not None:
            raise ConfigError(
                f"{spec} is a loop of your own, and {place.count} processes were started.",
                "Start one: the loop itself starts what it needs.",
            )


def train(
    spec: str,
    model: nn.Module,
    data: Data,
    *,
    teacher: nn.Module | None = None,
    masks: Masks | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Train `model` in place by the loop that `spec`, `file.py:callable`, names; it is in eval mode afterwards.

    `masks`: those that are on `model`; what lies under them stays as it is.
    Raises ConfigError where there is no such callable; TrainingError, with `model` as it was, where the loop fails or
    hands back another model, one without its masks, weights that are not finite, or the same ones.
    """
    fit, _ = load_callable(spec, ConfigError)
    plain = copy.deepcopy(model)
    masking.fold(plain)
    home, within = as_written(plain)
    masks = {name.removeprefix(f"{within}."): mask for name, mask in (masks or {}).items()}
    for name, parameter in home.named_parameters(remove_duplicate=False):
        # So that no optimizer collects, and no limit on gradients counts, what is not there.
        if name in masks and parameter.requires_grad:
            parameter.register_hook(partial(torch.mul, masks[name]))  # type: ignore[no-untyped-call]
    if masks:
        home.register_forward_pre_hook(Held(masks))
    before = {name: value.detach().clone() for name, value in home.state_dict().items()}
    learnt = [name for name, _ in home.named_parameters() if name in before]
    taught = _alone(teacher)
    given = TrainingData(data, taught, bool(within), seed)
    with seeded(seed), ExitStack() as stack, torch.enable_grad(), user_code(spec, TrainingError):
        made = fit(home.train(), given, Report(progress or Progress(), stack))
    after = _state(spec, home if made is None else made, before)
    if masks and isinstance(made, nn.Module) and not _holds(made):
        raise TrainingError(
            f"{spec} handed back a module that was trained without its masks.",
            "Train the model that you were given, or a copy or a pickle of it, which hold them; not a new one.",
        )
    _check_state(spec, before, after, learnt)
    known = masking.originals(model)
    trained = {f"{within}.{name}" if within else name: value for name, value in after.items()}
    masking.load_originals(model, {name: _under(known[name], trained[name], masks, name, within) for name in known})
    model.eval()


class Held:
    """Called before a module's forward: makes zero what masks remove. Deep copies and pickles of the module keep it."""

    def __init__(self, masks: Masks) -> None:
        self.masks = dict(masks)

    def __call__(self, module: nn.Module, _inputs: Any) -> None:
        """Zero the masked weights of `module` in place."""
        with torch.no_grad():
            for name, parameter in module.named_parameters(remove_duplicate=False):
                if name in self.masks:
                    parameter.masked_fill_(~self.masks[name].to(parameter.device), 0.0)


def _holds(made: nn.Module) -> bool:
    return any(isinstance(hook, Held) for module in made.modules() for hook in module._forward_pre_hooks.values())


def _alone(teacher: nn.Module | None) -> nn.Module | None:
    if teacher is None:
        return None
    return as_written(copy.deepcopy(teacher))[0].eval()


def _under(held: Tensor, trained: Tensor, masks: Masks, name: str, within: str) -> Tensor:
    mask = masks.get(name.removeprefix(f"{within}."))
    return trained if mask is None else torch.where(mask, trained, held)


def _state(spec: str, made: object, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that a loop hands back, on the CPU, by their own names."""
    if not isinstance(made, nn.Module):
        raise TrainingError(
            f"{spec} returned {type(made).__name__}.", "Train the model in place and return None, or return the model."
        )
    found = {name: value.detach().cpu() for name, value in made.state_dict().items()}
    for wrapper in WRAPPERS:
        if found and all(name.startswith(wrapper) for name in found):
            found = {name.removeprefix(wrapper): value for name, value in found.items()}
    other = [name for name in (*before, *found) if (name in before) != (name in found)]
    other += [name for name in before if name in found and before[name].shape != found[name].shape]
    if other:
        raise TrainingError(
            f"{spec} handed back another model than it was given: {other[0]!r} is not the same.",
            "Return the model that you were given, or one with the same parameters (an average of its weights, say).",
        )
    return {name: value.to(before[name].dtype) for name, value in found.items()}


def _check_state(
    spec: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor], parameters: Collection[str]
) -> None:
    for name, value in after.items():
        if (
            value.is_floating_point()
            and not bool(torch.isfinite(value).all())
            and bool(torch.isfinite(before[name]).all())
        ):
            raise TrainingError(
                f"{spec} left {name!r} with values that are not finite.", "Lower the learning rate, or clip gradients."
            )
    if all(torch.equal(after[name], before[name]) for name in parameters):  # statistics change by themselves
        raise TrainingError(
            f"{spec} trained nothing: every weight is as it was.",
            "Is the optimizer given model.parameters(), and are they not frozen?",
        )
