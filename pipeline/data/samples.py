"""A sample of anybody's as tensors: what the model is fed, and what it should give; and how samples make a batch."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils import _pytree as pytree

from foundation.errors import DataError, brief, nearest
from foundation.files import storage_of
from pipeline.data.parts import Fed, Inputs, Target
from pipeline.models.calling import flattened
from pipeline.models.source import Input

TARGETS = ("labels", "label", "targets", "target", "y")
"""Entries of a mapping that are what the model should give, unless the recipe names another."""

SHOWN = 6
"""Inputs that a message names, before it only counts."""

Sample = tuple[Inputs, Target]
"""Of one sample: its inputs and its target, without a dimension for the batch."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """Which entries of a sample mean what.

    `inputs`, `target`: entries of a mapping; None: the target is the first of `TARGETS` that there is, and everything
    else is an input. `dims`: input -> the names of its dimensions, the batch first; a number is a fixed size.
    `targets`: whether whole numbers are classes ("auto": where they can be), or values. `images`: a matrix of floats is
    an image of one channel. `collate`: makes a batch of samples, in place of stacking. `pad`: what whole numbers as
    targets are filled up with where they differ in size; None: such targets stay a list.
    """

    inputs: tuple[str, ...] | None = None
    target: str | None = None
    dims: Mapping[str, tuple[str | int, ...]] = dataclasses.field(default_factory=dict)
    targets: Literal["auto", "classes", "values"] = "auto"
    images: bool = False
    collate: Callable[[list[Any]], Any] | None = None
    pad: int | None = None
    tokenizer: Path | None = None
    """The tokenizer.json of texts, or a folder with it."""
    max_tokens: int | None = None
    sample_rate: int = 16_000
    """Samples per second that recordings are brought to."""
    seconds: float = 1.0
    """Length that recordings are cut or filled up to."""
    names: tuple[str, ...] = ()
    """The model's own classes, in the order of its outputs."""
    pixels: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """Mean and deviation that the model's images of three channels are normalised by; None: ImageNet's."""

    def ordered(self, classes: Sequence[str]) -> tuple[str, ...]:
        """Class names of data as the model numbers them, where both have the same ones, whatever the case of their
        letters; else as they are.
        """
        spelt = {one.casefold(): one for one in classes}
        own = [one.casefold() for one in self.names]
        if len(spelt) < len(classes) or sorted(spelt) != sorted(own):
            return tuple(classes)
        return tuple(spelt[one] for one in own)


class Parting:
    """Takes samples apart, each like the first: the same inputs under the same names, a target or none."""

    def __init__(self, reading: Reading, name: str) -> None:
        self.reading, self.name = reading, name
        self.fed: Fed | None = None
        self.names: tuple[str, ...] = ()
        """Of the inputs; "" for one that is given by position."""
        self.labelled: bool | None = None
        self.shapes: Shapes | None = None
        """What the inputs of all samples have in common, once they were read."""
        self.kind: str | None = None
        """Of the first target: whole numbers, say, of one dimension."""

    def __call__(self, sample: Any, place: str) -> tuple[tuple[Any, ...], Any]:
        """The inputs of a sample (or of a batch that a collate made), flat, and its target; None where it has none."""
        args, kwargs, target = self._parts(sample, place)
        names, leaves, tree = flattened(*leafed((args, kwargs)))
        if not leaves:
            raise DataError(f"{place} has no input for the model.", "Return (input, target), or the input alone.")
        if self.fed is None:
            self.fed, self.names = Fed(len(args), tuple(kwargs), tree), names
        if tree != self.fed.tree:
            raise DataError(
                f"{place} has the inputs {_listed(names)}, others {_listed(self.names)}.",
                "Give all samples the same inputs.",
            )
        self.labelled = target is not None if self.labelled is None else self.labelled
        if self.labelled != (target is not None):
            odd, others = ("no label", "have one") if target is None else ("a label", "have none")
            raise DataError(f"{place} has {odd}, others {others}.", "Give labels for all samples, or for none.")
        return leaves, target

    def _parts(self, sample: Any, place: str) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        if dataclasses.is_dataclass(sample) and not isinstance(sample, type):
            sample = {one.name: getattr(sample, one.name) for one in dataclasses.fields(sample)}
        if isinstance(sample, tuple) and hasattr(sample, "_asdict"):
            sample = sample._asdict()
        if isinstance(sample, Mapping):
            return ((), *self._entries(sample, place))
        if not isinstance(sample, tuple | list):
            return (sample,), {}, None
        if not sample:
            raise DataError(f"{place} is empty.", "Return (input, target), or the input alone.")
        *given, target = sample if len(sample) > 1 else (sample[0], None)
        if len(given) == 1 and isinstance(given[0], Mapping):
            inputs, _ = self._entries(given[0], place, whole=True)
            return (), inputs, target
        if len(given) == 1 and isinstance(given[0], tuple | list):
            given = list(given[0])
        return tuple(given), {}, target

    def _entries(self, sample: Mapping[Any, Any], place: str, whole: bool = False) -> tuple[dict[str, Any], Any]:
        """Inputs by name and the target, of a mapping; `whole`: all of it is input."""
        found = {str(key): value for key, value in sample.items()}
        wanted, target = self.reading.inputs, self.reading.target
        for name in (*(wanted or ()), *((target,) if target and not whole else ())):
            if name not in found:
                key = "data.inputs" if wanted and name in wanted else "data.target"
                raise DataError(
                    f"{place} has no entry {name!r}, which {key} names; it has {', '.join(found)}.",
                    nearest(name, found) or f"Name one of them in {key}.",
                )
        if target is None and not whole:
            target = next((name for name in TARGETS if name in found), None)
        inputs = {
            name: value for name, value in found.items() if (name in wanted if wanted is not None else name != target)
        }
        return inputs, None if target is None or whole else found[target]


def leafed(value: Any) -> Any:
    """Lists of numbers, as rows of Hugging Face's data sets have them, as arrays: one input each."""
    if isinstance(value, list) and value and _numbers(value):
        return np.asarray(value)
    if isinstance(value, Mapping):
        return {key: leafed(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(leafed(one) for one in value)
    return value


def _listed(names: Sequence[str]) -> str:
    shown = [name or f"number {place + 1}" for place, name in enumerate(names[:SHOWN])]
    return ", ".join(shown) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def input_tensor(value: Any, place: str, images: bool) -> Tensor:
    """One input of one sample as a tensor: bytes of an image stay bytes, whole numbers are int64, the rest float32.

    Raises DataError, beginning with `place`, for what holds no plain finite numbers.
    """
    made = _tensor(value, place, "Give tensors or arrays of numbers; texts need a tokenizer first (see jsonl:PATH).")
    if not made.numel():
        raise DataError(f"{place} has the shape {tuple(made.shape)}: nothing in it.", "Leave it out.")
    if made.dtype == torch.uint8 and made.dim() in (2, 3):
        return made if made.dim() == 3 else made[None]
    if made.dtype == torch.bool and not images:
        return made
    image = (made.dim() == 3 and made.shape[0] in (1, 3)) or (images and made.dim() == 2)
    if not made.is_floating_point() and not image:
        return made.long()
    made = made.float()
    if not bool(made.isfinite().all()):
        raise DataError(f"{place} holds NaN or infinity.", "Correct it or leave it out.")
    return made[None] if images and made.dim() == 2 else made


def kind_of(target: Target) -> str:
    """What a target is, in words: what it is made of, types and numbers of dimensions."""
    if isinstance(target, Mapping):
        return f"a mapping of {', '.join(f'{key}: {kind_of(one)}' for key, one in target.items())}"
    if isinstance(target, tuple):
        return f"{len(target)} things: {', '.join(map(kind_of, target[:SHOWN]))}"
    if not isinstance(target, Tensor):
        return "text"
    numbers = "numbers" if target.is_floating_point() else "whole numbers"
    return f"{numbers} of {target.dim()} dimensions" if target.dim() else f"one of the {numbers}"


def target_tree(value: Any, place: str) -> Target:
    """A target as tensors: numbers, arrays, label maps, and mappings or lists of them; texts stay as they are."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return {str(key): target_tree(one, place) for key, one in value.items()}
    if isinstance(value, tuple) or (isinstance(value, list) and not _numbers(value)):
        return tuple(target_tree(one, place) for one in value)
    made = _tensor(value, f"{place}: the target", "Return numbers, arrays of numbers, or a mapping of them.")
    if made.is_floating_point() and not bool(made.isfinite().all()):
        raise DataError(f"{place}: the target holds NaN or infinity.", "Correct it or leave it out.")
    return made.float() if made.is_floating_point() else made.long()


def _numbers(value: Any) -> bool:
    """Whether a list holds numbers alone, within lists or not."""
    return all(isinstance(one, int | float) or (isinstance(one, list) and _numbers(one)) for one in value)


def _tensor(value: Any, place: str, hint: str) -> Tensor:
    if isinstance(value, Image.Image):
        pixels = np.array(value)
        return torch.from_numpy(pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())
    if isinstance(value, Tensor):
        odd = "complex" if value.is_complex() else storage_of(value)
        if odd:
            raise DataError(f"{place} is a {odd} tensor, not plain numbers.", hint)
        return value.detach().cpu().resolve_neg()
    try:
        array = np.asarray(value)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # an object of anybody's, or rows of unequal length
        raise DataError(f"{place} is a {type(value).__name__} that makes no array.", hint) from error
    if array.dtype.kind not in "iufb":
        what = brief(value) if isinstance(value, str | bytes) else f"a {type(value).__name__}"
        raise DataError(f"{place} is {what}, no numbers.", hint)
    if array.dtype.kind == "u" and array.dtype != np.uint8:
        if array.size and int(array.max()) > np.iinfo(np.int64).max:
            raise DataError(f"{place} holds {int(array.max())}, which is beyond 64 bits.", hint)
        array = array.astype(np.int64)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
        return torch.from_numpy(
            np.array(array, dtype=np.float32 if array.dtype.kind == "f" else array.dtype, order="C")
        )


def digest_of(inputs: Inputs) -> bytes:
    """Of one sample, to find the same one in two parts."""
    digest = hashlib.sha256()
    for one in inputs:
        digest.update(one.contiguous().numpy().tobytes())
    return digest.digest()


def class_number(target: Target) -> int | None:
    """The class that a target is the number of; None where it is no whole number."""
    if not isinstance(target, Tensor) or target.numel() != 1:
        return None
    value = target.reshape(()).item()
    return int(value) if float(value).is_integer() else None


class Shapes:
    """What the inputs of all samples have in common: type, shape, range; which dimensions differ."""

    def __init__(self, name: str, names: Sequence[str], dims: Mapping[str, tuple[str | int, ...]]) -> None:
        self.name, self.names = name, names
        self.like: list[Tensor] = []
        self.sizes: list[list[list[int]]] = []
        """Per input and dimension: the sizes seen."""
        self.high: list[int] = []
        shown = [one or (f"input_{place}" if len(names) > 1 else "input") for place, one in enumerate(names)]
        unknown = [one for one in dims if one not in shown]
        if unknown:
            raise DataError(
                f"data.dims names an input {unknown[0]!r}; the data gives {', '.join(shown)}.",
                nearest(unknown[0], shown) or "Name one of them.",
            )
        self.dims = [dims.get(one) for one in shown]

    def add(self, inputs: Inputs, place: str) -> None:
        """Count a sample. Raises DataError where it differs from the others in more than a size that may vary."""
        if not self.like:
            self.like = list(inputs)
            self.sizes = [[[size] for size in one.shape] for one in inputs]
            self.high = [0] * len(inputs)
            for name, like, named in zip(self.names, self.like, self.dims, strict=True):
                if named is not None and len(named) != 1 + like.dim():
                    raise DataError(
                        f"data.dims gives {name or 'the input'} {len(named)} dimensions; with the batch it has "
                        f"{1 + like.dim()}.",
                        "Name every dimension, the batch first; fixed sizes as numbers.",
                    )
        for number, (one, like) in enumerate(zip(inputs, self.like, strict=True)):
            what = f"{place}: {self.names[number]}" if self.names[number] else place
            if one.dim() != like.dim():
                raise DataError(
                    f"{what} has the shape {tuple(one.shape)}, others {tuple(like.shape)}.",
                    "Give all samples the same number of dimensions.",
                )
            if one.dtype != like.dtype:  # bytes go from 0 to 255, floats as a rule from 0 to 1
                raise DataError(f"{what} is {one.dtype}, others {like.dtype}.", "Return one type of input.")
            for seen, size in zip(self.sizes[number], one.shape, strict=True):
                if size not in seen:
                    seen.append(size)
            if self._varies(number) and not self._padded(number):
                raise DataError(
                    f"{what} has the shape {tuple(one.shape)}, others {tuple(like.shape)}.",
                    "Resize all samples to one shape, or give a DataLoader with a collate_fn that makes batches.",
                )
            if one.dtype == torch.int64:
                low, high = (int(value) for value in one.aminmax())
                if low < 0:
                    raise DataError(f"{what} holds {low}: ids are whole numbers from 0.", "Give floats for values.")
                self.high[number] = max(self.high[number], high)

    def _varies(self, number: int) -> bool:
        return any(len(seen) > 1 for seen in self.sizes[number])

    def _padded(self, number: int) -> bool:
        """Whether samples of unequal length may be filled up with zeros: whole numbers along one dimension, where
        another input masks what was filled up; or an input whose dimension the user named.
        """
        free = [place for place, seen in enumerate(self.sizes[number]) if len(seen) > 1]
        named = self.dims[number]
        if named is not None:
            return all(isinstance(named[1 + place], str) for place in free)
        masked = any("mask" in one.lower() for one in self.names)
        return free == [0] and masked and not self.like[number].is_floating_point()

    def check(self, inputs: Inputs, place: str) -> None:
        """Raise DataError for a sample that is not like those that were counted."""
        for number, (one, like) in enumerate(zip(inputs, self.like, strict=True)):
            free = {place for place, _ in self._free(number)}
            fits = one.dtype == like.dtype and one.dim() == like.dim()
            if not fits or any(
                size != wanted and at not in free
                for at, (size, wanted) in enumerate(zip(one.shape, like.shape, strict=True))
            ):
                what = f"{place}: {self.names[number]}" if self.names[number] else place
                raise DataError(
                    f"{what} has the shape {tuple(one.shape)}, {one.dtype}, others {tuple(like.shape)}, {like.dtype}.",
                    "Let the data set give the same each time it is read.",
                )

    def inputs(self) -> tuple[Input, ...]:
        """What the model is fed, once all samples are counted."""
        return tuple(self._input(number) for number in range(len(self.like)))

    def _input(self, number: int) -> Input:
        like, name = self.like[number], self.names[number]
        free = self._free(number)
        shape = tuple(
            _usual(seen) if place in dict(free) and like.dtype == torch.int64 else max(seen)
            for place, seen in enumerate(self.sizes[number])
        )
        if like.dtype == torch.bool:
            return Input(name, shape, "bool", free=free)
        if like.dtype == torch.int64:
            kind: Literal["tokens", "mask"] = "mask" if "mask" in name.lower() else "tokens"
            return Input(name, shape, kind, self.high[number] + 1, free)
        return Input(name, shape, "float", free=free)

    def _free(self, number: int) -> tuple[tuple[int, str], ...]:
        """Dimensions that may have any size: those that the user named, or else those in which samples differ."""
        named = self.dims[number]
        if named is not None:
            return tuple((place, str(one)) for place, one in enumerate(named[1:]) if isinstance(one, str))
        return tuple((place, "length") for place, seen in enumerate(self.sizes[number]) if len(seen) > 1)

    def lengths(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Free dimension -> the usual size of it, the smallest and the largest that samples have."""
        found: dict[str, list[int]] = {}
        for number in range(len(self.like)):
            for place, name in self._free(number):
                found.setdefault(name, []).extend(self.sizes[number][place])
        shapes = {name: size for one in self.inputs() for (_, name), size in _sized(one)}
        return tuple((name, tuple(dict.fromkeys((shapes[name], min(all_), max(all_))))) for name, all_ in found.items())


def _sized(one: Input) -> list[tuple[tuple[int, str], int]]:
    return [((place, name), one.shape[place]) for place, name in one.free]


def _usual(seen: Sequence[int]) -> int:
    """A length for examples: the largest, or a prime below it, which nothing else in a model is likely to be."""
    longest = max(seen)
    primes = [size for size in range(max(min(seen), 5), longest + 1) if all(size % k for k in range(2, size))]
    return primes[-1] if primes and longest <= 4096 else longest


def batched(samples: Sequence[Sample], pad: int | None = None) -> Sample:
    """Samples as one batch: inputs of unequal length filled up with zeros, whole targets with `pad`; without one, and
    of any other kind, targets that differ in shape stay a list.
    """
    columns = zip(*(inputs for inputs, _ in samples), strict=True)
    targets = [target for _, target in samples]
    return tuple(_stacked(column) for column in columns), None if targets[0] is None else collated(targets, pad)


def _stacked(column: Sequence[Tensor]) -> Tensor:
    first = column[0]
    made = [one.float() / 255 for one in column] if first.dtype == torch.uint8 else list(column)
    if all(one.shape == first.shape for one in column):
        return torch.stack(made)
    if all(one.shape[1:] == first.shape[1:] for one in column):
        return pad_sequence(made, batch_first=True)
    return _filled(made, 0)


def _filled(tensors: Sequence[Tensor], value: int) -> Tensor:
    """Tensors of one number of dimensions as one, each at the beginning of its row, the rest `value`."""
    first = tensors[0]
    widest = [max(one.shape[place] for one in tensors) for place in range(first.dim())]
    filled = first.new_full((len(tensors), *widest), value)
    for row, one in zip(filled, tensors, strict=True):
        row[tuple(slice(0, size) for size in one.shape)] = one
    return filled


def collated(targets: Sequence[Target], pad: int | None = None) -> Target:
    """Targets of samples as one: tensors stacked where they have one shape, whole numbers filled up with `pad` to one,
    otherwise a list with one entry each.
    """
    first = targets[0]
    if isinstance(first, Mapping):
        return {key: collated([one[key] for one in targets], pad) for key in first}
    if isinstance(first, tuple):
        return tuple(collated([one[place] for one in targets], pad) for place in range(len(first)))
    if isinstance(first, Tensor) and all(isinstance(one, Tensor) for one in targets):
        if all(one.shape == first.shape for one in targets):
            return torch.stack(list(targets))
        # An empty list has no type; as a sequence it is as good as one of whole numbers.
        whole = all(not one.is_floating_point() or not one.numel() for one in targets)
        if pad is not None and whole and first.dim() and all(one.dim() == first.dim() for one in targets):
            return _filled([one.long() for one in targets], pad)
    return list(targets)


def sliced(target: Target, place: int | slice) -> Target:
    """The part of a batch's target that belongs to some of its samples; a list has one entry per sample."""
    if isinstance(target, Mapping):
        return {key: sliced(one, place) for key, one in target.items()}
    if isinstance(target, tuple):
        return tuple(sliced(one, place) for one in target)
    return target[place]


def leaves_of(target: Target) -> list[Any]:
    """The tensors of a target."""
    return list(pytree.tree_leaves(target))
