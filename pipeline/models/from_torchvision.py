"""Models by their torchvision name: `resnet50`, `vit_b_16`, `fcn_resnet50`, `r3d_18`, …"""

from __future__ import annotations

from pipeline.models import torchvision_operators  # noqa: F401  # first, since what follows may import torchvision

# isort: split
import inspect
from collections.abc import Callable
from typing import Any
from urllib.error import URLError

import torchvision
from torch import Tensor, nn

from foundation.errors import ModelError, WeightsError, first_line, nearest
from pipeline.models.source import DEFAULT_SIZE, Input, Origin, Pretrained, Shape

CLIP_FRAMES = 16
"""Frames of the example clip for video models: what mvit is built for, and the training length of the others."""


def names() -> list[str]:
    """Every torchvision model name."""
    return list(torchvision.models.list_models())


def origin(name: str, num_classes: int | None, input_size: Shape | None) -> Origin:
    """Describe the torchvision model `name`; raises ModelError with near names if there is none."""
    if name not in names():
        raise ModelError(
            f"torchvision has no model named {name!r}.",
            nearest(name, names())
            or "See torchvision.models.list_models(); or timm:NAME, hf:…, file.py:callable, onnx:PATH.",
        )
    is_video = name in torchvision.models.list_models(module=torchvision.models.video)
    if input_size is not None and len(input_size) != 3 and not (is_video and len(input_size) == 4):
        raise ModelError(f"{name} takes images, not input of shape {input_size}.", "Give channels, height and width.")
    size = input_size or DEFAULT_SIZE

    def make() -> nn.Module:
        return _build(name, num_classes, input_size)

    def inputs(_model: nn.Module) -> tuple[Input, ...]:
        if is_video:
            return (Input("input", size if len(size) == 4 else (size[0], CLIP_FRAMES, *size[1:])),)
        if name.startswith("raft"):  # optical flow compares two frames
            return Input("image1", size), Input("image2", size)
        return (Input("input", size),)

    return Origin(
        make,
        inputs,
        f"torchvision {torchvision.__version__}",
        pretrained=lambda: _pretrained(name, make),
    )


def _build(name: str, num_classes: int | None, input_size: Shape | None) -> nn.Module:
    builder: Callable[..., nn.Module] = torchvision.models.get_model_builder(name)
    options = _options(name, builder, input_size)
    if num_classes is not None:
        options["num_classes"] = num_classes
    try:
        return builder(**options)
    except TypeError as error:
        if "num_classes" not in str(error):  # optical flow (raft) has no classes to count
            raise
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise ModelError(
            f"{name} cannot be built for input size {input_size}: {reason}", "Set data.input_size."
        ) from error
    del options["num_classes"]
    return builder(**options)


def _options(name: str, builder: Callable[..., nn.Module], input_size: Shape | None) -> dict[str, Any]:
    """Arguments that give a plain, untrained, offline, quiet model with one output."""
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None  # segmentation and detection would download a backbone
    if name.removeprefix("quantized_") in ("inception_v3", "googlenet"):
        # The auxiliary classifiers only serve training; a stated init_weights silences a FutureWarning.
        options |= {"aux_logits": False, "init_weights": True}
    if input_size is not None and name.startswith("vit_"):
        height, width = input_size[-2:]
        if height != width:
            raise ModelError(f"{name} takes square images only, not {height}x{width}.", "Set a square input_size.")
        options["image_size"] = height
    if input_size is not None and name == "maxvit_t":
        options["input_size"] = input_size[1:]
    return options


def _pretrained(name: str, make: Callable[[], nn.Module]) -> Pretrained:
    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        # weights_only: torch.hub would otherwise unpickle whatever the server sends.
        state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (URLError, OSError) as error:
        raise WeightsError(
            f"torchvision's weights for {name} could not be downloaded: {error}.",
            "Without a network give a checkpoint file, or let the model be trained here.",
        ) from error
    model = make()
    if "encoder.pos_embedding" in state and hasattr(model, "image_size"):
        state = dict(
            torchvision.models.vision_transformer.interpolate_embeddings(model.image_size, model.patch_size, state)
        )
    own = model.state_dict()
    fresh = tuple(key for key, value in own.items() if key not in state or state[key].shape != value.shape)
    known = {key: state[key] for key in own if key not in fresh}
    return Pretrained({**own, **known}, fresh, f"torchvision {weights}")
