"""Models from transformers: `hf:FOLDER`, `hf:config.json`, `hf:MODEL_TYPE` (its default config), `hf:OWNER/NAME`.

Only classes that transformers itself ships are built: code that lies beside a config is never run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from pipeline.errors import ModelError, WeightsError, nearest
from pipeline.models.network import reachable
from pipeline.models.source import DEFAULT_SIZE, Input, Origin, Pretrained, Size, file_hash

TOKENS = 16
"""Length of an example sentence, in tokens."""
AUDIO_SAMPLES = 16_000
"""Length of an example recording: one second at 16 kHz, the rate of transformers' speech models."""

_HUB = "huggingface.co"


class _Logits(nn.Module):
    """Runs a transformers model and returns the logits, or else its output tensors as a tuple."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def _run(self, **inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        out = self.net(**inputs, return_dict=True)
        if isinstance(getattr(out, "logits", None), Tensor):
            return out.logits  # type: ignore[no-any-return]
        return tuple(value for value in out.to_tuple() if isinstance(value, Tensor))


class ImageModel(_Logits):
    """Takes images (batch, channels, height, width)."""

    def forward(self, pixel_values: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return logits (batch, classes), or the model's output tensors."""
        return self._run(pixel_values=pixel_values)


class TextModel(_Logits):
    """Takes token numbers and their mask, both (batch, tokens) int64."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return logits (batch, classes), or the model's output tensors."""
        return self._run(input_ids=input_ids, attention_mask=attention_mask)


class AudioModel(_Logits):
    """Takes recordings (batch, samples)."""

    def forward(self, input_values: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return logits (batch, classes), or the model's output tensors."""
        return self._run(input_values=input_values)


_WRAPPERS: dict[str, type[_Logits]] = {
    "pixel_values": ImageModel,
    "input_ids": TextModel,
    "input_values": AudioModel,
}


def origin(name: str, num_classes: int | None, input_size: Size | None) -> Origin:
    """Describe the transformers model `name`; raises ModelError if its config is missing or needs code of its own."""
    config = _config(name)
    if num_classes is not None:
        config.num_labels = num_classes
    if input_size is not None and hasattr(config, "image_size"):
        _, height, width = input_size
        config.image_size = height if height == width else [height, width]
        config.num_channels = input_size[0]
    if getattr(config, "pad_token_id", 0) is None:
        config.pad_token_id = getattr(config, "eos_token_id", None) or 0  # decoders classify the last unpadded token
    architecture = _architecture(name, config)
    path = Path(name)
    content = file_hash(path / "config.json" if path.is_dir() else path) if path.exists() else ""

    def make() -> nn.Module:
        net = architecture(type(config).from_dict(config.to_dict()))
        wrapper = _WRAPPERS.get(net.main_input_name)
        if wrapper is None:
            raise ModelError(
                f"hf:{name} takes {net.main_input_name}, which no wrapper here feeds.",
                "Wrap the model in a file of your own and give file.py:callable.",
            )
        return wrapper(net)

    def inputs(model: nn.Module) -> tuple[Input, ...]:
        if isinstance(model, TextModel):
            text = getattr(config, "vocab_size", 2)
            return (Input("input_ids", (TOKENS,), "tokens", text), Input("attention_mask", (TOKENS,), "mask"))
        if isinstance(model, AudioModel):
            return (Input("input_values", (AUDIO_SAMPLES,)),)
        return (Input("pixel_values", input_size or _image_size(config)),)

    return Origin(
        make,
        inputs,
        f"transformers {transformers.__version__} {architecture.__name__} {content}",
        pretrained=lambda: _pretrained(name, architecture, config, make),
    )


def _config(name: str) -> Any:
    if name in transformers.CONFIG_MAPPING:
        return transformers.AutoConfig.for_model(name)
    path = Path(name)
    looks_local = path.exists() or path.suffix == ".json" or path.is_absolute() or name.startswith(".")
    if looks_local and not path.exists():
        raise ModelError(f"hf:{name}: no such folder or file.", "Give a folder with a config.json, or the file itself.")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"hf:{name}: the folder holds no config.json.", "Give a folder saved by save_pretrained().")
    if not looks_local and "/" not in name:
        raise ModelError(
            f"transformers has no model type {name!r}, and there is no such folder.",
            nearest(name, transformers.CONFIG_MAPPING.keys())
            or "Give a folder, a config.json, or a model type such as bert.",
        )
    try:
        return transformers.AutoConfig.from_pretrained(
            name, trust_remote_code=False, local_files_only=path.exists() or not reachable(_HUB)
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        if "custom code" in reason:
            raise ModelError(
                f"hf:{name} needs Python code from its own folder, which is never run.",
                "Wrap the model in a file of your own and give file.py:callable.",
            ) from error
        hint = "Check the config.json." if path.exists() else "Without a network, give a local folder or config.json."
        raise ModelError(f"hf:{name} cannot be read: {reason}", hint) from error


def _architecture(name: str, config: Any) -> Any:
    """The class to build: the one the config names, else a classifier for its kind of input, else the bare model."""
    named = (getattr(config, "architectures", None) or [None])[0]
    tables = (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
        MODEL_MAPPING_NAMES,
    )
    chosen: Any = named or next((table[config.model_type] for table in tables if config.model_type in table), None)
    chosen = chosen[0] if isinstance(chosen, list | tuple) else chosen
    architecture = getattr(transformers, chosen, None) if chosen else None
    if not (isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)):
        raise ModelError(
            f"hf:{name}: transformers {transformers.__version__} has no model class {chosen or config.model_type!r}.",
            "Set `architectures` in the config.json to a class that transformers ships.",
        )
    return architecture


def _image_size(config: Any) -> Size:
    size = getattr(config, "image_size", None) or DEFAULT_SIZE[1:]
    height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
    return getattr(config, "num_channels", 3), height, width


def _pretrained(name: str, architecture: Any, config: Any, make: Any) -> Pretrained:
    path = Path(name)
    if path.is_file() or name in transformers.CONFIG_MAPPING:
        raise WeightsError(f"hf:{name} names a config, which brings no weights.", "Give a folder with weights.")
    try:
        net, report = architecture.from_pretrained(
            name,
            config=config,
            trust_remote_code=False,
            use_safetensors=True,  # never a pickle
            ignore_mismatched_sizes=True,
            local_files_only=path.exists() or not reachable(_HUB),
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        hint = "Save it with save_pretrained()." if path.exists() else "Without a network, give a local folder."
        raise WeightsError(f"hf:{name}: no weights: {str(error).strip().splitlines()[0]}", hint) from error
    mismatched = {entry[0] for entry in report["mismatched_keys"]}
    fresh = tuple(f"net.{key}" for key in sorted(mismatched | set(report["missing_keys"])))
    model: nn.Module = make()
    model.get_submodule("net").load_state_dict(net.state_dict())
    return Pretrained(dict(model.state_dict()), fresh, f"hf:{name}")
