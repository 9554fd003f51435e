"""Models by name, by file or as objects, each a `ModelSource` that builds the same module every time.

resnet50                        torchvision
timm:resnet18                   timm
hf:FOLDER | config.json | bert  transformers
path/to/file.py:callable        own code
package.module:callable         own code
"""

from __future__ import annotations

from foundation.errors import first_line
from pipeline.models import torchvision_import  # noqa: F401  # first, since timm and transformers import torchvision

# isort: split
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.errors import ModelError
from pipeline.models import from_code, from_timm, from_torchvision, from_transformers
from pipeline.models.source import Input, ModelSource, Origin, Pretrained, Shape, Size

__all__ = ["Input", "ModelSource", "Pretrained", "Shape", "Size", "check", "example", "load"]

CHECKPOINTS = (".pt", ".pth", ".bin", ".safetensors", ".ckpt", ".onnx")


def load(
    spec: str | nn.Module | Callable[..., nn.Module] | ModelSource,
    *,
    num_classes: int | None = None,
    input_size: Shape | None = None,
    seed: int = 0,
) -> ModelSource:
    """Find a model and describe it; nothing is downloaded.

    `num_classes` and `input_size` (see `Shape`) are handed to the library or the callable where it takes them; None
    leaves its own default. The weights are the initial ones, decided
    by `seed`. Raises ModelError, with the near names if there is no such model.
    """
    if isinstance(spec, ModelSource):
        return spec
    origin, text = _origin(spec, num_classes, input_size)
    return ModelSource.of(text, origin, num_classes, input_size, seed)


def _origin(
    spec: str | nn.Module | Callable[..., nn.Module], num_classes: int | None, input_size: Shape | None
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
        return from_timm.origin(name, num_classes, input_size), spec
    if library == "hf" and colon:
        return from_transformers.origin(name, num_classes, input_size), spec
    if colon:
        return from_code.origin_of_spec(spec, num_classes, input_size), spec
    if spec.endswith(".py"):
        raise ModelError(f"{spec} names a file, but not what in it.", f"Give {spec}:CALLABLE.")
    if Path(spec).suffix in CHECKPOINTS:
        raise ModelError(f"{spec} is a checkpoint, not a model.", "Name the model, and give this file as its weights.")
    if not spec:
        raise ModelError(
            "No model was named.", "Give a torchvision name such as resnet50, timm:NAME or file.py:callable."
        )
    try:
        return from_torchvision.origin(spec, num_classes, input_size), spec
    except ModelError as error:
        if spec not in from_torchvision.names() and spec in from_timm.names():
            raise ModelError(f"torchvision has no model named {spec!r}.", f"timm has: timm:{spec}.") from error
        raise


def example(source: ModelSource | Size, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    """Return seeded random inputs for one forward call, each with `batch` rows.

    Floats are standard normal, tokens uniform over the vocabulary. A plain (channels, height, width) stands for one
    image input.
    """
    inputs = source.inputs if isinstance(source, ModelSource) else (Input("input", tuple(source)),)
    generator = torch.Generator().manual_seed(seed)
    return tuple(one.sample(batch, generator) for one in inputs)


def check(model: nn.Module, inputs: tuple[Tensor, ...], classes: int | None = None, name: str = "The model") -> Tensor:
    """Run `model` once and return its first output; `classes` is how many the data has.

    Raises ModelError, naming the shape, if the model does not take these inputs, gives no tensor, or has fewer outputs
    than the data has classes.
    """
    shapes = ", ".join("x".join(map(str, tensor.shape)) for tensor in inputs)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            out = model(*inputs)
    except Exception as error:
        reason = first_line(error)
        raise ModelError(
            f"{name} does not take input of shape {shapes}: {reason[:200]}", "Set data.input_size to one that it takes."
        ) from error
    finally:
        model.train(was_training)
    if isinstance(out, list) and out and isinstance(out[0], dict):
        raise ModelError(
            f"{name} returns one dict per sample, as detectors do: how many results it gives depends on the data.",
            "Give a model whose output is one tensor of logits (batch, classes), such as the detector's backbone.",
        )
    while not isinstance(out, Tensor):
        if not out or not isinstance(out, dict | tuple | list):
            raise ModelError(f"{name} returns {type(out).__name__}, not a tensor.", "Return logits (batch, classes).")
        out = next(iter(out.values())) if isinstance(out, dict) else out[0]
    if classes is not None and (out.ndim != 2 or out.shape[1] < classes):
        raise ModelError(
            f"{name} gives outputs of shape {'x'.join(map(str, out.shape))} but the data has {classes} classes.",
            f"Use a model with {classes} outputs, or data whose labels fit it.",
        )
    return out
