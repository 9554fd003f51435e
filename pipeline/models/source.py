"""A model as a value: where it comes from, how to build it afresh, what goes in, and a fingerprint of all that."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.channels.program.capture import unsupported
from pipeline.errors import CaptureError, ModelError, WeightsError
from pipeline.seeding import seeded

Size = tuple[int, int, int]
"""Channels, height, width of one image."""

Shape = tuple[int, ...]
"""Shape of one sample: an image (channels, height, width), a clip (channels, frames, height, width), or, for models
from transformers, a sentence or recording (length,) or a spectrogram (as the model takes it).
"""

DEFAULT_SIZE: Size = (3, 224, 224)
"""The size that torchvision and timm train at, used when neither the data nor the user names one."""

LIBRARIES = ("torch", "torchvision", "timm", "transformers")
"""Code whose version pins its behaviour; any other class of a model is fingerprinted by its source text."""


@dataclass(frozen=True)
class Input:
    """One tensor that the model's forward takes, batch dimension left out."""

    name: str
    shape: tuple[int, ...]
    kind: Literal["float", "tokens", "mask"] = "float"
    high: int = 2
    """Tokens are whole numbers in 0..high-1."""

    def sample(self, batch: int, generator: torch.Generator) -> Tensor:
        """Return a batch of this input: standard normal floats, uniform tokens, or a mask of ones."""
        shape = (batch, *self.shape)
        if self.kind == "float":
            return torch.randn(shape, generator=generator)
        if self.kind == "tokens":
            return torch.randint(0, self.high, shape, generator=generator)
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

    @classmethod
    def of(
        cls, spec: str, origin: Origin, num_classes: int | None, input_size: Shape | None, seed: int = 0
    ) -> ModelSource:
        """Build the model once, to be sure that it can be built, and describe it.

        Raises CaptureError where it is scripted or quantised.
        """
        model = _build(spec, origin, seed)
        obstacle = unsupported(model)
        if obstacle is not None:
            raise CaptureError(*obstacle)
        digest = hashlib.sha256(repr((spec, num_classes, input_size, seed, origin.identity)).encode())
        digest.update(structure(model).encode())
        digest.update(own_code(model).encode())
        if origin.weigh_values:
            for name, tensor in model.state_dict().items():
                digest.update(name.encode())
                digest.update(_bytes(tensor))
        return cls(spec, num_classes, input_size, seed, origin.inputs(model), digest.hexdigest(), origin)

    @property
    def initial(self) -> bool:
        """Whether a built module still has to be given weights; an object comes with its own."""
        return self.origin.initial

    def build(self) -> nn.Module:
        """Return a fresh module in eval mode, its initial weights decided by the seed alone.

        Raises ModelError if the code behind the spec fails or does not return a module.
        """
        return _build(self.spec, self.origin, self.seed)

    def pretrained(self) -> Pretrained:
        """Return the library's own weights, downloading them if need be; raises WeightsError where there are none."""
        if self.origin.pretrained is None:
            raise WeightsError(
                f"{self.spec} has no pretrained weights of its own.", "Give a checkpoint file, or train."
            )
        with seeded(self.seed):
            return self.origin.pretrained()


def _build(spec: str, origin: Origin, seed: int) -> nn.Module:
    with seeded(seed):
        model: object = origin.make()
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{spec} gave a {type(model).__name__}, not a torch.nn.Module.", "Let the callable return the built model."
        )
    return model.eval()


def _bytes(tensor: Tensor) -> bytes:
    """Raw bytes of a tensor of any dtype, in row-major order."""
    plain = tensor.detach().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def structure(model: nn.Module) -> str:
    """Modules, their printed settings, and every parameter's and buffer's name, shape and dtype, as text."""
    printed = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(model))  # a lambda's address changes from run to run
    tensors = [f"{name} {tuple(t.shape)} {t.dtype}" for name, t in model.state_dict().items()]
    return "\n".join([printed, *tensors])


def own_code(model: nn.Module) -> str:
    """Source text of every class in the model that comes from none of `LIBRARIES`, or its bytecode if there is none."""
    classes = {base for module in model.modules() for base in type(module).__mro__ if issubclass(base, nn.Module)}
    own = [cls for cls in classes if cls.__module__.partition(".")[0] not in LIBRARIES]
    return "\n".join(source_text(cls) for cls in sorted(own, key=lambda cls: cls.__qualname__))


def source_text(code: Callable[..., object]) -> str:
    """Text of a class or function; without a file (a notebook long gone), its bytecode."""
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):
        function = getattr(code, "forward", code)
        compiled = getattr(function, "__code__", None)
        return f"{code!r}" if compiled is None else f"{compiled.co_code.hex()} {compiled.co_names}"


def accepted(call: Callable[..., object], **offered: object) -> dict[str, object]:
    """The part of `offered` that `call` takes by name, values of None left out."""
    try:
        parameters = inspect.signature(call).parameters.values()
    except (ValueError, TypeError):  # some built-ins show no signature
        return {}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {k: v for k, v in offered.items() if v is not None and (takes_any or k in names)}


def required(call: Callable[..., object]) -> list[str]:
    """Names of the arguments that `call` cannot do without."""
    try:
        parameters = inspect.signature(call).parameters.values()
    except (ValueError, TypeError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in kinds and p.default is p.empty]


def image_input(size: Shape | None) -> Callable[[nn.Module], tuple[Input, ...]]:
    """Describe a model that takes one float tensor of images (batch, channels, height, width) or clips."""
    inputs = (Input("input", size or DEFAULT_SIZE),)
    return lambda _model: inputs
