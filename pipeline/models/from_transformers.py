"""Models from transformers: `hf:FOLDER`, `hf:config.json`, `hf:MODEL_TYPE` (its default config), `hf:OWNER/NAME`.

Only classes that transformers itself ships are built: code that lies beside a config is never run.
"""

from __future__ import annotations

from pipeline.models import torchvision_operators  # noqa: F401  # first, since what follows may import torchvision

# isort: split
import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_BACKBONE_MAPPING_NAMES,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from foundation import checkpoints
from foundation.errors import ModelError, WeightsError, first_line, nearest
from foundation.files import sha256
from pipeline.models import published
from pipeline.models.named_inputs import NamedInputs
from pipeline.models.network import reachable
from pipeline.models.source import DEFAULT_SIZE, Input, Origin, Pretrained, Shape, Size
from pipeline.models.weights import load_weights

TOKENS = 16
"""Length of an example sentence in tokens, where none is given."""
AUDIO_SAMPLES = 16_000
"""Length of an example recording: one second at 16 kHz, the rate of transformers' speech models."""
AUDIO_FRAMES = 100
"""Length of an example spectrogram: one second in the usual steps of 10 ms."""
DEFAULT_FRAMES = 16
"""Length of an example clip where the config names none."""

_HUB = "huggingface.co"


def wanted_inputs(net: nn.Module, config: Any, input_size: Sequence[int] | None) -> tuple[Input, ...]:
    """What `net` is fed: tokens with their mask, tokens of a decoder, images, clips, sound or series, as far as its
    forward names them. Empty where it takes none of these.

    `input_size`: of an image or a clip; one number is the length of a sentence or recording, two are a spectrogram.
    """
    takes = inspect.signature(net.forward).parameters
    main = str(net.main_input_name)
    text = config.get_text_config()
    vocabulary = getattr(text, "vocab_size", None) or getattr(config, "vocab_size", None) or 2
    length = input_size[0] if input_size is not None and len(input_size) == 1 else TOKENS
    size = input_size if input_size is not None and len(input_size) > 2 else None
    found: list[Input] = []
    if "input_ids" in takes:
        found.append(Input("input_ids", (length,), "tokens", vocabulary))
        if "attention_mask" in takes:
            found.append(Input("attention_mask", (length,), "mask"))
    if "bbox" in takes:  # boxes of words on a page, in thousandths of it: left, top <= right, bottom
        found.append(Input("bbox", (length, 4), "mask"))
    for name in ("pixel_values", "pixel_values_videos"):
        if name in takes and (name == main or "pixel_values_videos" not in takes):
            found.append(Input(name, _picture(config, size, video=name.endswith("videos"))))
    if main in ("input_values", "input_features", "past_values") and main in takes:
        given = tuple(input_size) if input_size is not None and len(input_size) < 3 else None
        found.append(Input(main, given or _signal(config, main)))
    if config.is_encoder_decoder and "decoder_input_ids" in takes:
        found.append(Input("decoder_input_ids", (length,), "tokens", vocabulary))
    return tuple(found)


def ended(inputs: tuple[Input, ...], config: Any) -> tuple[Input, ...]:
    """`inputs`, sentences of an encoder-decoder with the token that ends them at their end alone: its classifiers read
    what the network gives there, and fail where sentences hold different numbers of it.
    """
    end = _end_token(config)
    if end is None or not config.is_encoder_decoder:
        return inputs
    return tuple(
        replace(one, last=end) if one.name == "input_ids" and one.kind == "tokens" and 0 <= end < one.high else one
        for one in inputs
    )


def _end_token(config: Any) -> int | None:
    """The token that ends a sentence, the first where there are several, as chat models have them."""
    found = getattr(config, "eos_token_id", None)
    first = found[0] if isinstance(found, (list, tuple)) and found else found
    return first if isinstance(first, int) else None


def _picture(config: Any, input_size: Sequence[int] | None, *, video: bool) -> tuple[int, ...]:
    """Shape of an image (channels, height, width), or of a clip (frames, channels, height, width)."""
    if input_size is not None and len(input_size) == 4:
        return (input_size[1], input_size[0], *input_size[2:])
    size = tuple(input_size) if input_size is not None else _image_size(config)
    if not video and config.model_type not in MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES:
        return size
    frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
    return (frames or DEFAULT_FRAMES, *size)


def _signal(config: Any, main: str) -> tuple[int, ...]:
    """Shape of a recording, of its spectrogram in the order that the model takes it, or of a series."""
    bins = getattr(config, "num_mel_bins", None)
    if main == "past_values":
        return config.context_length, config.num_input_channels
    if main == "input_values":
        if bins and hasattr(config, "max_length"):  # a spectrogram of fixed length
            return config.max_length, bins
        return (1, AUDIO_SAMPLES) if hasattr(config, "audio_channels") else (AUDIO_SAMPLES,)
    if bins and hasattr(config, "max_source_positions") and not hasattr(config, "input_feat_per_channel"):
        return bins, 2 * config.max_source_positions  # whisper: a convolution of stride two comes first
    width = getattr(config, "input_feat_per_channel", None) or getattr(config, "feature_projection_input_dim", None)
    return AUDIO_FRAMES, width or bins or 80


def origin(name: str, num_classes: int | None, input_size: Shape | None, fed: tuple[Input, ...] = ()) -> Origin:
    """Describe the transformers model `name`, fed with `fed` or with what its config asks for; raises ModelError if its
    config is missing or needs code of its own."""
    config, path = _config(name), Path(name)
    if num_classes is not None:
        config.num_labels = num_classes
    if input_size is not None and len(input_size) > 2:
        _set_size(config, input_size)
    if getattr(config, "use_cache", False):
        config.use_cache = False  # keys and values for the next token: nobody asks for one here
    if getattr(config, "pad_token_id", 0) is None:
        # Decoders classify the last token that is none of these: the ones that texts are filled up with.
        config.pad_token_id = published.padding_of(path if path.is_dir() else None, config.to_dict())
    architecture = _architecture(name, config)
    content = sha256(path / "config.json" if path.is_dir() else path) if path.exists() else ""
    held = _weights_in(path)
    content = " ".join([content, *(sha256(file) for file in held)])

    def make() -> nn.Module:
        own = type(config).from_dict(config.to_dict())
        own._experts_implementation = "batched_mm"  # the other forms loop over data or use operators that ONNX lacks
        try:
            net = architecture(own)
        except ImportError as error:  # transformers checks for optional packages when a model is built
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"hf:{name}: {reason}", "Install the package that it names.") from error
        taken = fed or wanted_inputs(net, config, input_size)
        if not taken:
            raise ModelError(
                f"hf:{name} takes {net.main_input_name}, which nothing here feeds.",
                "Wrap the model in a file of your own and give file.py:callable.",
            )
        return NamedInputs(net, tuple(one.name for one in taken))

    def inputs(model: nn.Module) -> tuple[Input, ...]:
        assert isinstance(model, NamedInputs), "as `make` gives it"
        return ended(fed or wanted_inputs(model.net, config, input_size), config)

    return Origin(
        make,
        inputs,
        f"transformers {transformers.__version__} {architecture.__name__} {content}",
        pretrained=lambda: _pretrained(name, architecture, config, make),
        brings=bool(held),
    )


def _weights_in(path: Path) -> list[Path]:
    """The files of the weights in a model's folder: safetensors, else what older versions of transformers wrote."""
    if not path.is_dir():
        return []
    older = [name for name in checkpoints.IN_A_FOLDER if name.startswith("pytorch_model.bin")]
    files = sorted(path.glob("*.safetensors"))
    return files or next((list(checkpoints.files(str(path / name))) for name in older if (path / name).is_file()), [])


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
        reason = first_line(error)
        if "custom code" in reason:
            raise ModelError(
                f"hf:{name} needs Python code from its own folder, which is never run.",
                "Wrap the model in a file of your own and give file.py:callable.",
            ) from error
        hint = "Check the config.json." if path.exists() else "Without a network, give a local folder or config.json."
        raise ModelError(f"hf:{name} cannot be read: {reason}", hint) from error


def _architecture(name: str, config: Any) -> Any:
    """The class to build: the one the config names, else a classifier for its kind of input, else one that gives
    logits over the vocabulary, else the bare model.

    Encoder-decoders classify by looking for the end-of-sentence token, which cannot be exported.
    """
    named = (getattr(config, "architectures", None) or [None])[0]
    both = config.is_encoder_decoder
    text = {} if both else MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    tables: tuple[Any, ...] = (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
        text,
        MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES if both else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES if both else {},
        MODEL_MAPPING_NAMES,
        MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
        MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES,
        MODEL_FOR_BACKBONE_MAPPING_NAMES,
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
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


def _vision(config: Any) -> Any:
    """The part of a config that says what images look like: its own `vision_config` where it has one."""
    return getattr(config, "vision_config", None) or config


def _set_size(config: Any, input_size: Sequence[int]) -> None:
    """Write the size of an image (channels, height, width) or clip (channels, frames, height, width) in the config."""
    vision = _vision(config)
    channels, *frames, height, width = input_size
    if hasattr(vision, "image_size"):
        vision.image_size = height if height == width else [height, width]
    if hasattr(vision, "num_channels"):
        vision.num_channels = channels
    if frames and hasattr(vision, "num_frames"):
        vision.num_frames = frames[0]


def _image_size(config: Any) -> Size:
    vision = _vision(config)
    size = getattr(vision, "image_size", None) or getattr(vision, "crop_size", None) or DEFAULT_SIZE[1:]
    height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
    return getattr(vision, "num_channels", None) or 3, height, width


def _pretrained(name: str, architecture: Any, config: Any, make: Any) -> Pretrained:
    path = Path(name)
    if path.is_file() or name in transformers.CONFIG_MAPPING:
        raise WeightsError(f"hf:{name} names a config, which brings no weights.", "Give a folder with weights.")
    model: nn.Module = make()
    held = _weights_in(path)
    if held and not any(file.suffix == ".safetensors" for file in held):
        load_weights(model, path)
        return Pretrained(dict(model.state_dict()), (), f"hf:{name}")
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
        raise WeightsError(f"hf:{name}: no weights: {first_line(error)}", hint) from error
    mismatched = {entry[0] for entry in report["mismatched_keys"]}
    fresh = tuple(f"net.{key}" for key in sorted(mismatched | set(report["missing_keys"])))
    model.get_submodule("net").load_state_dict(net.state_dict())
    return Pretrained(dict(model.state_dict()), fresh, f"hf:{name}")
