"""A model's weights from anybody's checkpoint: the part of it that fits is found, and what was chosen is said.

Every name and shape must agree. Whatever training scripts put around a state dict is one dotted beginning of its
names (`state_dict.model.`, `params_ema.`, `module.`): the beginning under which the whole model is found is taken off.
Where several fit, averaged weights (EMA, SWA) are preferred to the raw ones beside them, as timm does; any other choice
is the user's, who names it: `FILE#student`.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from foundation import checkpoints
from foundation.errors import WeightsError
from foundation.files import memory_of, sha256
from pipeline.models import checkpoint, computed, plain
from pipeline.models.checkpoint import Checkpoint, listed, oddity
from pipeline.models.source import ModelSource, build_module

COUNTERS = ("total_ops", "total_params", "n_averaged")
"""Last parts of names that profilers (thop) and averaging leave in a state dict: one number each, no weight."""

AVERAGED = re.compile(r"(^|[._-])(ema|swa|avg|averaged|shadow)([._-]|$)", re.IGNORECASE)
"""A beginning of names that says that these are averaged weights."""


@dataclass(frozen=True)
class Loaded:
    """What was loaded into a model: from where, and what the model kept of its own."""

    origin: str
    sha256: str
    """Hash of the file, or of all shards; "" for a library's own download."""
    tensors: int
    stripped: str = ""
    """Beginning that was taken off every name."""
    fresh: tuple[str, ...] = ()
    """Names that stay at their initial values, such as a classifier for another number of classes."""
    notes: tuple[str, ...] = ()
    """What else was decided on the way, for people."""

    def __str__(self) -> str:
        stripped = (f"prefix {self.stripped!r} taken off",) if self.stripped else ()
        fresh = (f"untrained: {listed(self.fresh)}",) if self.fresh else ()
        return ", ".join([f"{self.tensors} tensors from {self.origin}", *stripped, *self.notes, *fresh])


@dataclass(frozen=True)
class _Option:
    """One way to read a checkpoint: the names under `start`, with `added` put before them."""

    start: str
    state: dict[str, Tensor]
    """By the model's names, as far as it has them."""
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    other: tuple[str, ...]
    """Of another shape or kind than the model's."""
    untied: tuple[str, ...]
    """Pairs that the model ties, and that differ here."""
    aside: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unexpected or self.other or self.untied)


def comes_with(source: ModelSource) -> bool:
    """Whether own code gives its model weights, as far as one can know: built under two seeds, they are the same.

    Tensors that hold one number alone (norms, zero biases) say nothing; random ones differ.
    """
    if not source.origin.weigh_values:
        return False
    one, other = (build_module(source.spec, source.origin, source.seed + more).state_dict() for more in (0, 1))
    telling = [
        name
        for name, value in one.items()
        if value.is_floating_point() and value.numel() > 1 and value.min() < value.max()
    ]
    return bool(telling) and all(name in other and torch.equal(one[name], other[name]) for name in telling)


def load_weights(model: nn.Module, path: Path | str) -> Loaded:
    """Fill `model` in place from a checkpoint; every name and shape must agree.

    `path` is a file, the index of a sharded checkpoint or a folder of either, and may end in `#PART`: only what stands
    under that key or prefix. Wrappers, prefixes and counters around the weights are seen through; half precision is
    cast. Weights that the checkpoint keeps as weight norm, spectral norm or a pruning mask computed them fill a model
    of plain ones; then `model` is made plain itself.

    Raises WeightsError, and leaves the model untouched, if the file is missing, unreadable, wants to run code, does not
    fit (each name is given), fits in several ways, or holds NaN, infinity or a negative variance.
    """
    file, part = checkpoints.split(str(path))
    found = checkpoint.read(file)
    if not any(inside in name for name in model.state_dict() for inside in checkpoint.INSIDE):
        found = found.without(checkpoint.INSIDE)
    if part:
        found = found.part(part, file)
    options = _options(found, model)
    notes: tuple[str, ...] = ()
    to_fold = False
    if not any(option.fits for option in options):
        simple = copy_of_plain(model)
        made, how = computed.plain(found, simple)
        others = _options(made, simple)
        if any(option.fits for option in others):
            options, to_fold = others, True
            notes = (f"{how} computed into plain weights",) if how else ()
    option, chosen = _choice(options, file)
    _check_values(option.state, model, str(file))
    if to_fold:
        plain.fold(model)
    casts = _fill(model, option.state, str(file))
    asides = (f"{len(option.aside)} tensors left aside ({listed(option.aside)})",) if option.aside else ()
    return Loaded(str(path), _digest(file), len(option.state), option.start, notes=(*chosen, *notes, *casts, *asides))


def load_pretrained(model: nn.Module, source: ModelSource) -> Loaded:
    """Fill `model` in place with the library's own weights, downloading them if need be.

    Raises WeightsError if the library has none for this model or cannot be reached.
    """
    found = source.pretrained()
    option = _option(Checkpoint(found.state, dict.fromkeys(found.state, ""), ()), model, "", "")
    _refuse_misfit(option, found.origin)
    _check_values(option.state, model, found.origin)
    _fill(model, option.state, found.origin)
    return Loaded(found.origin, "", len(found.state) - len(found.fresh), fresh=found.fresh)


def copy_of_plain(model: nn.Module) -> nn.Module:
    """A copy of `model` whose computed weights are plain ones; `model` itself if they all are."""
    if not plain.computes(model):
        return model
    folded = plain.copied(model)
    plain.fold(folded)
    return folded


def check_finite(state: Mapping[str, Tensor], origin: str) -> None:
    """Raise WeightsError, naming the tensors, if any value is NaN or infinite."""
    bad = [
        name
        for name, value in state.items()
        if (value.is_floating_point() or value.is_complex()) and not bool(value.isfinite().all())
    ]
    if bad:
        raise WeightsError(
            f"{origin} holds NaN or infinity in {listed(bad)}.", "Use a checkpoint from before it diverged."
        )


def _options(found: Checkpoint, model: nn.Module) -> list[_Option]:
    """Every beginning under which some name of the model is found, the one with most names first."""
    expected = model.state_dict()
    # A model that wraps another one: its own names may have a beginning that the file lacks.
    common = {name.partition(".")[0] for name in expected if "." in name}
    added = f"{common.pop()}." if len(common) == 1 and all("." in name for name in expected) else ""
    hits: Counter[tuple[str, str]] = Counter()
    for name in found.tensors:
        for start in _starts(name):
            rest = name[len(start) :]
            if rest in expected:
                hits[start, ""] += 1
            elif added and added + rest in expected:
                hits[start, added] += 1
    most = sorted(hits, key=lambda key: (-hits[key], bool(key[1]), len(key[0]))) or [("", "")]
    # A name can be found under many beginnings by chance; only those with nearly all names can fit.
    return [_option(found, model, *key) for key in most if hits[key] * 2 >= hits[most[0]]]


def _starts(name: str) -> list[str]:
    """Every beginning of a dotted name: "", "a.", "a.b."."""
    return ["", *(name[: match.end()] for match in re.finditer(r"\.", name))]


def _option(found: Checkpoint, model: nn.Module, start: str, added: str) -> _Option:
    expected = model.state_dict()
    under = {added + name[len(start) :]: name for name in found.tensors if name.startswith(start)}
    state = {short: found.tensors[name] for short, name in under.items() if short in expected}
    tied = {value.data_ptr() for name, value in expected.items() if name in state and value.numel()}
    missing = tuple(
        name
        for name, value in expected.items()
        # Old checkpoints do not count batches, and tied weights are often stored once.
        if name not in state and not name.endswith("num_batches_tracked") and value.data_ptr() not in tied
    )
    homes = {found.homes[under[short]] for short in state} or {""}
    rest = [
        (short, name)
        for short, name in under.items()
        if short not in expected and not _counts(name, found.tensors[name])
    ]
    unexpected = tuple(short for short, name in rest if found.homes[name] in homes)
    counters = [
        name for name in under.values() if _counts(name, found.tensors[name]) and name[len(start) :] not in expected
    ]
    # What stands in the same container outside `start` is named; whole other containers (an optimizer's) are not.
    outside = [name for name in found.tensors if not name.startswith(start) and found.homes[name] in homes]
    other = tuple(
        f"{name} {_kind(state[name])} instead of {_kind(value)}"
        for name, value in expected.items()
        if name in state and not oddity(state[name]) and not _alike(state[name], value)
    )
    untied = _untied(state, expected)
    return _Option(start, state, missing, unexpected, other, untied, (*counters, *outside))


def _untied(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names that are one weight in the model, and for which the file holds different values."""
    first: dict[Hashable, str] = {}
    found = []
    for name, value in expected.items():
        if name not in state or not value.numel() or oddity(state[name]):
            continue
        other = first.setdefault(memory_of(name, value), name)
        if other != name and not torch.equal(state[other], state[name]):
            found.append(f"{other} and {name}")
    return tuple(found)


def _alike(given: Tensor, wanted: Tensor) -> bool:
    same_kind = given.is_floating_point() == wanted.is_floating_point() and given.is_complex() == wanted.is_complex()
    return same_kind and given.shape == wanted.shape


def _counts(name: str, value: Tensor) -> bool:
    return name.rpartition(".")[2] in COUNTERS and not oddity(value) and value.numel() == 1


def _choice(options: list[_Option], file: Path) -> tuple[_Option, tuple[str, ...]]:
    """The option to load, and what to say of it. Raises WeightsError if none fits, or several that are not the same."""
    fitting: list[_Option] = []
    for option in options:
        if option.fits and not any(_equal(option, earlier) for earlier in fitting):
            fitting.append(option)
    if not fitting:
        _refuse_misfit(options[0], str(file))
    if len(fitting) == 1:
        return fitting[0], ()
    names = [option.start.rstrip(".") or "the outermost names" for option in fitting]
    averaged = [number for number, option in enumerate(fitting) if AVERAGED.search(option.start.rstrip("."))]
    if len(averaged) != 1:
        named = [option.start.rstrip(".") for option in fitting if option.start]
        raise WeightsError(
            f"{file} holds {len(fitting)} sets of weights that fit: {listed(names)}.",
            f"Say which: {' or '.join(f'{file}#{name}' for name in named[:3])}.",
        )
    mine = averaged[0]
    rest = [name for number, name in enumerate(names) if number != mine]
    return fitting[mine], (f"the averaged ones, not {listed(rest)} (FILE#KEY takes another)",)


def _equal(one: _Option, other: _Option) -> bool:
    """Whether two options would load the same values."""
    return one.state.keys() == other.state.keys() and all(
        value is other.state[name]
        or (
            not oddity(value)
            and not oddity(other.state[name])
            and value.dtype == other.state[name].dtype
            and value.equal(other.state[name])
        )
        for name, value in one.state.items()
    )


def _refuse_misfit(option: _Option, origin: str) -> None:
    parts = [
        f"{len(names)} {what}: {listed(names)}"
        for what, names in (
            ("missing", option.missing),
            ("unexpected", option.unexpected),
            ("of another shape", option.other),
            ("different under one weight of the model", option.untied),
        )
        if names
    ]
    if not parts:
        return
    if any("parametrizations." in name or name.endswith(("_orig", "_g")) for name in option.unexpected):
        hint = "The file's weights are parametrized: build the model with the same parametrizations, then load it."
    else:
        hint = "Is it a checkpoint of this very model, with the same number of classes and input size?"
    raise WeightsError(f"{origin} does not fit the model: {'; '.join(parts)}.", hint)


def _check_values(state: Mapping[str, Tensor], model: nn.Module, origin: str) -> None:
    odd = [f"{name} ({why})" for name, value in state.items() if (why := oddity(value))]
    if odd:
        raise WeightsError(
            f"{origin} holds tensors that are no plain weights: {listed(odd)}.",
            "Save them dense, on the CPU and in float32: value.to_dense().float().",
        )
    check_finite(state, origin)
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    variances = [f"{name}.running_var" if name else "running_var" for name in norms]
    negative = [name for name in variances if name in state and bool((state[name] < 0).any())]
    if negative:
        raise WeightsError(
            f"{origin} holds negative variances in {listed(negative)}.", "Use a checkpoint that is not damaged."
        )


def _fill(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> tuple[str, ...]:
    """Copy the values in, in the model's own types; what was cast, for people. Raises WeightsError on an overflow."""
    expected = model.state_dict()
    cast = {name: value.to(expected[name].dtype) for name, value in state.items()}
    check_finite(cast, f"{origin}, in the model's own precision,")
    kinds = {
        f"{str(value.dtype).removeprefix('torch.')} cast to {str(expected[name].dtype).removeprefix('torch.')}"
        for name, value in state.items()
        if value.is_floating_point() and value.dtype != expected[name].dtype
    }
    model.load_state_dict(cast, strict=False)
    return tuple(sorted(kinds))


def _digest(path: Path) -> str:
    """Hash of the file, or of the hashes of an index and its shards."""
    files = checkpoints.files(str(path))
    if len(files) == 1:
        return sha256(files[0])
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def _kind(tensor: Tensor) -> str:
    return f"{'x'.join(map(str, tensor.shape)) or 'scalar'} {str(tensor.dtype).removeprefix('torch.')}"
