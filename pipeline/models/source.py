"""A model as a value: where it comes from, how to build it afresh, what goes in, and a fingerprint of all that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from foundation.errors import ModelError, WeightsError
from pipeline.seeding import seeded
from validators.integers import Whole

Size = tuple[int, int, int]
"""Channels, height, width of one image."""

Shape = tuple[int, ...]
"""Shape of one sample: an image (channels, height, width), a clip (channels, frames, height, width), or, for models
from transformers, a sentence or recording (length,) or a spectrogram (as the model takes it).
"""

DEFAULT_SIZE: Size = (3, 224, 224)
"""The size that torchvision and timm train at, used when neither the data nor the user names one."""


@dataclass(frozen=True)
class Input:
    """One tensor that the model's forward takes, batch dimension left out."""

    name: str
    """As the user wrote it; "input" where it has none and is the only one."""
    shape: tuple[int, ...]
    kind: Literal["float", "tokens", "mask", "bool"] = "float"
    high: int = 2
    """Tokens are whole numbers in 0..high-1."""
    free: tuple[tuple[int, str], ...] = ()
    """Dimensions of a sample that may have any size: (position in `shape`, name); equal names are equal sizes."""
    last: int | None = None
    """Of tokens: the one that ends every sample, and stands nowhere else in it."""

    @property
    def whole(self) -> Whole:
        """The values of tokens."""
        return Whole(0, self.high, self.last)

    def sample(self, batch: int, generator: torch.Generator) -> Tensor:
        """Return a batch of this input: standard normal floats, uniform tokens, fair booleans, or a mask of ones."""
        shape = (batch, *self.shape)
        if self.kind == "float":
            return torch.randn(shape, generator=generator)
        if self.kind == "bool":
            return torch.randint(0, 2, shape, generator=generator).bool()
        if self.kind == "tokens":
            return self.whole.placed(torch.randint(0, self.whole.others, shape, generator=generator))
        return torch.ones(shape, dtype=torch.int64)


@dataclass(frozen=True)
class Pretrained:
    """A library's own weights for a model: name -> tensor, and the names it has none for (a new classifier, say)."""

    state: dict[str, Tensor]
    fresh: tuple[str, ...]
    origin: str


@dataclass(frozen=True)
class Origin:
    """What a library, a file or an object offers for one spec; `ModelSource` is made from it."""

    make: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], tuple[Input, ...]]
    identity: str
    """Everything about the origin that is not seen in the built module: library version, file content."""
    pretrained: Callable[[], Pretrained] | None = None
    weigh_values: bool = False
    """Whether the initial values belong to the fingerprint (own code may bring its own)."""
    initial: bool = True
    """Whether a built module is untrained as far as one can know; an object's weights are taken as they are."""
    brings: bool = False
    """Whether trained weights lie beside what was named, so that they are taken unless the user says otherwise."""
    outputs: tuple[str, ...] | None = None
    """Names of its outputs where it has names for them, which a file made of it keeps."""
    note: str = ""
    """Where weights that come with it are from, and what was checked of them; for people."""
    fold: Callable[[nn.Module], object] | None = None
    """Makes computed weights (weight norm, say) plain ones, in place."""


@dataclass(frozen=True)
class ModelSource:
    """A model that can be built again and again, each time the same.

    `fingerprint` covers the spec, the library's version or the own code's text, the structure, and, for objects and
    callables, the values of the weights. `inputs` says what the model's forward takes.
    """

    spec: str
    num_classes: int | None
    input_size: Shape | None
    seed: int
    inputs: tuple[Input, ...]
    fingerprint: str
    origin: Origin = field(repr=False, compare=False)
    adapt: Callable[[nn.Module], nn.Module] | None = field(default=None, repr=False, compare=False)
    """Makes a built module take the data's inputs by position and give plain outputs; None: it does as it is."""
    outputs: tuple[str, ...] = ("output",)
    sizes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Of each free dimension by name: the sizes at which it is proven, raced and gated, the first the usual one."""

    @property
    def free(self) -> tuple[dict[int, str], ...]:
        """Per input: the dimensions of a batch, beside the batch itself, that may have any size, and their names."""
        return tuple({1 + place: name for place, name in one.free} for one in self.inputs)

    @property
    def ranges(self) -> dict[str, Whole]:
        """Inputs that are whole numbers -> their values."""
        found = {one.name: one.whole for one in self.inputs if one.kind == "tokens"}
        return found | {one.name: Whole(1, 2) for one in self.inputs if one.kind == "mask"}

    @property
    def usual(self) -> dict[str, int]:
        """Free dimension -> its usual size, at which latency is measured."""
        return {name: sizes[0] for name, sizes in self.sizes}

    @property
    def initial(self) -> bool:
        """Whether a built module still has to be given weights; an object comes with its own."""
        return self.origin.initial

    def build(self) -> nn.Module:
        """Return a fresh module in eval mode, its initial weights decided by the seed alone.

        Weights that it computes by parametrizations or hooks, such as weight norm, are plain ones.
        Raises ModelError if the code behind the spec fails or does not return a module.
        """
        model = self.build_as_given()
        if self.origin.fold is not None:
            self.origin.fold(model)
        return model

    def build_as_given(self) -> nn.Module:
        """`build` with parametrizations and hooks still on: to be trained, or filled from a checkpoint of its kind."""
        model = build_module(self.spec, self.origin, self.seed)
        return model if self.adapt is None else self.adapt(model)

    def pretrained(self) -> Pretrained:
        """Return the library's own weights, downloading them if need be; raises WeightsError where there are none."""
        if self.origin.pretrained is None:
            raise WeightsError(
                f"{self.spec} has no pretrained weights of its own.", "Give a checkpoint file, or train."
            )
        with seeded(self.seed):
            return self.origin.pretrained()


def build_module(spec: str, origin: Origin, seed: int) -> nn.Module:
    """A fresh module in eval mode; raises ModelError where the code behind `spec` gives no module."""
    with seeded(seed):
        model: object = origin.make()
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{spec} gave a {type(model).__name__}, not a torch.nn.Module.", "Let the callable return the built model."
        )
    return model.eval()


def image_input(size: Shape | None) -> Callable[[nn.Module], tuple[Input, ...]]:
    """Describe a model that takes one float tensor of images (batch, channels, height, width) or clips."""
    inputs = (Input("input", size or DEFAULT_SIZE),)
    return lambda _model: inputs


def example(source: ModelSource | Size, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    """Return seeded random inputs for one forward call, each with `batch` rows.

    Floats are standard normal, tokens uniform over the vocabulary. A plain (channels, height, width) stands for one
    image input.
    """
    inputs = source.inputs if isinstance(source, ModelSource) else (Input("input", tuple(source)),)
    generator = torch.Generator().manual_seed(seed)
    return tuple(one.sample(batch, generator) for one in inputs)
