"""Models by their timm name: `timm:resnet18`, `timm:vit_tiny_patch16_224`, …"""

from __future__ import annotations

from pipeline.models import torchvision_operators  # noqa: F401  # first, since what follows may import torchvision

# isort: split
from typing import Any

import huggingface_hub
import timm
from torch import nn

from foundation.errors import ModelError, WeightsError, first_line, nearest
from pipeline.models.network import reachable
from pipeline.models.source import DEFAULT_SIZE, Input, Origin, Pretrained, Shape


def names() -> list[str]:
    """Every timm model name."""
    return list(timm.list_models())


def origin(name: str, num_classes: int | None, input_size: Shape | None) -> Origin:
    """Describe the timm model `name`; raises ModelError with near names if there is none."""
    if not timm.is_model(name):
        raise ModelError(f"timm has no model named {name!r}.", nearest(name, names()) or "See timm.list_models().")
    if input_size is not None and len(input_size) != 3:
        raise ModelError(f"timm:{name} takes images, not input of shape {input_size}.", "Give channels, height, width.")

    def inputs(model: nn.Module) -> tuple[Input, ...]:
        own_size = getattr(model, "default_cfg", {}).get("input_size", DEFAULT_SIZE)
        return (Input("input", input_size or tuple(own_size)),)

    return Origin(
        lambda: _create(name, num_classes, input_size),
        inputs,
        f"timm {timm.__version__}",
        pretrained=lambda: _pretrained(name, num_classes, input_size),
    )


def _create(name: str, num_classes: int | None, input_size: Shape | None, pretrained: bool = False) -> nn.Module:
    options: dict[str, Any] = {"pretrained": pretrained}
    if num_classes is not None:
        options["num_classes"] = num_classes
    if input_size is not None and input_size[0] != 3:
        options["in_chans"] = input_size[0]
    if input_size is None:
        return _checked(name, options)
    try:
        return _checked(name, options | {"img_size": input_size[1:]})
    except TypeError as error:
        if "img_size" not in str(error):
            raise
    return _checked(name, options)  # convolutional models take any size and have no such argument


def _checked(name: str, options: dict[str, Any]) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, **options)
    except (AssertionError, RuntimeError, ValueError, ZeroDivisionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"timm:{name} cannot be built with {options}: {reason}", "Set data.input_size.") from error
    return model


def _pretrained(name: str, num_classes: int | None, input_size: Shape | None) -> Pretrained:
    config = timm.get_pretrained_cfg(name)
    repository = config.hf_hub_id if config else None
    if config is None or not (repository or config.url):
        raise WeightsError(f"timm publishes no weights for {name}.", "Give a checkpoint file, or train.")
    cached = any(
        isinstance(huggingface_hub.try_to_load_from_cache(repository, file), str)
        for file in ("model.safetensors", "pytorch_model.bin")
        if repository
    )
    offline = f"timm's weights for {name} could not be downloaded"
    hint = "Without a network give a checkpoint file, or let the model be trained here."
    if not cached and not reachable("huggingface.co"):
        raise WeightsError(f"{offline}: huggingface.co cannot be reached.", hint)
    try:
        model = _create(name, num_classes, input_size, pretrained=True)
    except OSError as error:
        raise WeightsError(f"{offline}: {first_line(error)}.", hint) from error
    other_head = num_classes is not None and num_classes != config.num_classes
    prefixes = config.classifier if isinstance(config.classifier, tuple) else (config.classifier,)
    fresh = [key for key in model.state_dict() for prefix in prefixes if prefix and key.startswith(f"{prefix}.")]
    return Pretrained(dict(model.state_dict()), tuple(fresh) if other_head else (), f"timm {repository or config.url}")
