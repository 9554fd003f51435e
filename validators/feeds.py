"""What the models are fed with when they are compared: seeded, labelled, at several batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from foundation.errors import ValidationError
from validators.integers import Ranges, Whole
from validators.runners import Array, InputSpec

BATCHES = (1, 3, 8)

# Where inputs come from: data that the model is meant for; made up for a model that is meant to take any; tried out,
# since nobody said which batch sizes, lengths or ranges the model takes.
Origin = Literal["real", "made", "tried"]

# Far outside normalised data, yet far from overflow in float32 after many layers.
LARGE = 1e3

# Integers for an input that no range was given for: valid token ids, token types and attention masks of any model.
BINARY = Whole(0, 2)


@dataclass(frozen=True)
class Feed:
    """One inference's inputs: name -> array, batch first, a label that reports use, and where they come from."""

    label: str
    arrays: Mapping[str, Array]
    origin: Origin = "real"


def drawn_batches(seed: int, spans: Sequence[tuple[int, int]] = ((2, 8), (9, 32))) -> tuple[int, ...]:
    """`BATCHES`, and one more size drawn from each of `spans` (both ends included), by `seed`."""
    rng = np.random.default_rng(seed)
    choices = [[size for size in range(low, high + 1) if size not in BATCHES] for low, high in spans]
    return (*BATCHES, *(int(rng.choice(sizes)) for sizes in choices))


def drawable(spec: InputSpec) -> bool:
    """Whether an input is of numbers, or booleans, which can be made up."""
    try:
        return np.dtype(spec.dtype).kind in "iufb"
    except TypeError:
        return False


def require_drawable(inputs: Sequence[InputSpec], hint: str = "") -> None:
    """Raise ValidationError for the first input that is not `drawable`."""
    odd = next((spec for spec in inputs if not drawable(spec)), None)
    if odd is not None:
        raise ValidationError(f"Input {odd.name} is of type {odd.dtype}, which cannot be made up.", hint)


def random_feeds(
    inputs: Sequence[InputSpec],
    *,
    seed: int,
    batches: Sequence[int] = BATCHES,
    sizes: Mapping[str, int] | None = None,
    ranges: Ranges | None = None,
) -> list[Feed]:
    """Standard normal floats, uniform integers, fair booleans; one feed per batch size.

    `sizes` gives dynamic dimensions other than the batch, by name. `ranges` gives integer inputs their half-open range
    of values, by input name; without one it is 0 and 1. A model with a fixed batch is fed at that size alone.
    Raises ValidationError for a dynamic dimension without a size, and for a type that cannot be drawn, such as text.
    """
    rng = np.random.default_rng(seed)

    def fill(spec: InputSpec, shape: tuple[int, ...]) -> Array:
        if np.issubdtype(spec.dtype, np.floating):
            return np.asarray(rng.standard_normal(shape), spec.dtype)
        whole = _range(spec, ranges)
        # Of a scalar numpy draws no array.
        return np.asarray(whole.placed(np.asarray(rng.integers(0, whole.others, shape))), spec.dtype)

    return _feeds("random", inputs, fill, batches, sizes)


def edge_feeds(
    inputs: Sequence[InputSpec],
    *,
    seed: int,
    batches: Sequence[int] = BATCHES,
    sizes: Mapping[str, int] | None = None,
    ranges: Ranges | None = None,
) -> list[Feed]:
    """All zeros (integers: their lowest value), and floats of ±`LARGE` (integers: their highest); per batch size.

    Arguments and errors as in `random_feeds`.
    """
    rng = np.random.default_rng(seed)

    def zeros(spec: InputSpec, shape: tuple[int, ...]) -> Array:
        if np.issubdtype(spec.dtype, np.floating):
            return np.zeros(shape, spec.dtype)
        whole = _range(spec, ranges)
        return whole.ended(np.full(shape, whole.low, spec.dtype))

    def large(spec: InputSpec, shape: tuple[int, ...]) -> Array:
        if np.issubdtype(spec.dtype, np.floating):
            return np.asarray(LARGE * rng.choice([-1.0, 1.0], shape), spec.dtype)
        whole = _range(spec, ranges)
        return whole.ended(np.full(shape, whole.high - 1, spec.dtype))

    return _feeds("zeros", inputs, zeros, batches, sizes) + _feeds("large", inputs, large, batches, sizes)


def real_feeds(arrays: Mapping[str, Array], *, batches: Sequence[int] = BATCHES) -> list[Feed]:
    """The first samples of `arrays` (input name -> array, samples first) at each batch size that they suffice for.

    Raises ValidationError when they suffice for none.
    """
    count = min((len(array) for array in arrays.values()), default=0)
    feeds = [
        Feed(f"real, batch {batch}", {name: np.ascontiguousarray(array[:batch]) for name, array in arrays.items()})
        for batch in batches
        if batch <= count
    ]
    if not feeds:
        raise ValidationError(f"{count} samples do not fill a batch of {min(batches)}.", "Give more samples.")
    return feeds


def _feeds(
    label: str,
    inputs: Sequence[InputSpec],
    fill: Callable[[InputSpec, tuple[int, ...]], Array],
    batches: Sequence[int],
    sizes: Mapping[str, int] | None,
) -> list[Feed]:
    if not inputs:
        raise ValidationError("The model has no inputs.", "Compare its outputs by hand.")
    require_drawable(inputs)
    leading = next((spec.shape[0] for spec in inputs if spec.shape), None)
    if not isinstance(leading, str):
        return [Feed(f"{label}, fixed batch", {s.name: fill(s, _shape(s, sizes or {})) for s in inputs}, "made")]
    return [
        Feed(
            f"{label}, batch {batch}",
            {s.name: fill(s, _shape(s, {**(sizes or {}), leading: batch})) for s in inputs},
            "made",
        )
        for batch in batches
    ]


def _shape(spec: InputSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    unknown = [size for size in spec.shape if isinstance(size, str) and size not in sizes]
    if unknown:
        raise ValidationError(
            f"Input {spec.name} has a dynamic dimension {unknown[0]}.", f"Pass sizes={{'{unknown[0]}': ...}}."
        )
    return tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)


def _range(spec: InputSpec, ranges: Ranges | None) -> Whole:
    given = BINARY if spec.dtype == "bool" else (ranges or {}).get(spec.name, BINARY)
    return given if isinstance(given, Whole) else Whole(*given)
