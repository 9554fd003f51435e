"""Models by name, by file or as objects, each a `ModelSource` that builds the same module every time.

resnet50                        torchvision
timm:resnet18                   timm
hf:FOLDER | config.json | bert  transformers
path/to/file.py:callable        own code
package.module:callable         own code
onnx:path/to/model.onnx         an ONNX file, with its weights
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from foundation.errors import CaptureError, ModelError
from pipeline.channels.program.capture import unsupported
from pipeline.models import from_code
from pipeline.models.extras import installed, need
from pipeline.models.inspection import own_code, structure, tensor_bytes
from pipeline.models.plain import fold, materialised
from pipeline.models.source import Input, ModelSource, Origin, Shape, build_module

CHECKPOINTS = (".pt", ".pth", ".bin", ".safetensors", ".ckpt")


def load(
    spec: str | nn.Module | Callable[..., nn.Module] | ModelSource,
    *,
    num_classes: int | None = None,
    input_size: Shape | None = None,
    seed: int = 0,
    fed: tuple[Input, ...] = (),
) -> ModelSource:
    """Find a model and describe it; nothing is downloaded.

    `num_classes` and `input_size` (see `Shape`) are handed to the library or the callable where it takes them; None
    leaves its own default. `fed`: named inputs that a transformers model is to be fed with, in place of what its config
    suggests. The weights are the initial ones, decided
    by `seed`. Raises ModelError, with the near names if there is no such model, with the extra to
    install if its library is missing.
    """
    if isinstance(spec, ModelSource):
        return spec
    origin, text = _origin(spec, num_classes, input_size, fed)
    return describe(text, origin, num_classes, input_size, seed)


def _origin(
    spec: str | nn.Module | Callable[..., nn.Module],
    num_classes: int | None,
    input_size: Shape | None,
    fed: tuple[Input, ...],
) -> tuple[Origin, str]:
    if isinstance(spec, nn.Module):
        return from_code.origin_of_object(spec, input_size), f"object:{type(spec).__name__}"
    if not isinstance(spec, str):
        if not callable(spec):
            holds = isinstance(spec, Mapping) and any(isinstance(value, Tensor) for value in spec.values())
            raise ModelError(
                f"A {type(spec).__name__} {'of tensors ' if holds else ''}is not a model.",
                "Give the torch.nn.Module that these weights belong to, with the weights loaded."
                if holds
                else "Give a name, a torch.nn.Module or a callable that returns one.",
            )
        text = f"object:{getattr(spec, '__name__', type(spec).__name__)}"
        return from_code.origin_of_callable(spec, text, num_classes, input_size), text
    library, colon, name = spec.partition(":")
    if library == "timm" and colon:
        need("timm", "torchvision")  # timm itself imports torchvision
        from pipeline.models import from_timm

        return from_timm.origin(name, num_classes, input_size), spec
    if library == "hf" and colon:
        need("transformers")
        from pipeline.models import from_transformers

        return from_transformers.origin(name, num_classes, input_size, fed), spec
    if library == "onnx" and colon:
        from pipeline.models import from_onnx

        return from_onnx.origin(name, input_size), spec
    if colon:
        return from_code.origin_of_spec(spec, num_classes, input_size), spec
    if spec.endswith(".py"):
        raise ModelError(f"{spec} names a file, but not what in it.", f"Give {spec}:CALLABLE.")
    if spec.endswith(".onnx"):
        raise ModelError(f"{spec} names an ONNX file by its path alone.", f"Give onnx:{spec}.")
    if Path(spec).suffix in CHECKPOINTS:
        raise ModelError(f"{spec} is a checkpoint, not a model.", "Name the model, and give this file as its weights.")
    if not spec:
        raise ModelError(
            "No model was named.", "Give a torchvision name such as resnet50, timm:NAME, file.py:callable or onnx:PATH."
        )
    need("torchvision")
    from pipeline.models import from_torchvision

    try:
        return from_torchvision.origin(spec, num_classes, input_size), spec
    except ModelError as error:
        if not installed("timm"):
            raise
        from pipeline.models import from_timm

        if spec not in from_torchvision.names() and spec in from_timm.names():
            raise ModelError(f"torchvision has no model named {spec!r}.", f"timm has: timm:{spec}.") from error
        raise


def describe(
    spec: str, origin: Origin, num_classes: int | None, input_size: Shape | None, seed: int = 0
) -> ModelSource:
    """Build the model once, to be sure that it can be built, and describe it.

    Lazy modules get their shapes. Raises CaptureError where it is scripted or quantised.
    """
    given = origin
    origin = replace(given, make=lambda: materialised(given.make, given.inputs), fold=fold)
    model = build_module(spec, origin, seed)
    if origin.weigh_values:  # own code: what describes it is other people's, too
        with from_code.user_code(spec, ModelError):
            _ = structure(model), str(model), f"{model}"
    obstacle = unsupported(model)
    if obstacle is not None:
        raise CaptureError(*obstacle)
    digest = hashlib.sha256(repr((spec, num_classes, input_size, seed, origin.identity)).encode())
    digest.update(structure(model).encode())
    digest.update(own_code(model).encode())
    frozen = [name for name, value in model.named_parameters() if not value.requires_grad]
    if frozen:
        digest.update(f"frozen {frozen}".encode())
    if origin.weigh_values:
        for name, tensor in model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor_bytes(tensor))
    return ModelSource(spec, num_classes, input_size, seed, origin.inputs(model), digest.hexdigest(), origin)
