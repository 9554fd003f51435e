"""What stands beside published weights: the names of the classes, and what images were normalised by."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Pixels = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and standard deviation of red, green and blue, of pixels from 0 to 1."""


def folder_of(model: object) -> Path | None:
    """The folder of a transformers model, `hf:FOLDER`, where its tokenizer lies, too."""
    library, _, name = model.partition(":") if isinstance(model, str) else ("", "", "")
    folder = Path(name).expanduser()
    return folder if library == "hf" and name and folder.is_dir() else None


def class_names(model: object) -> tuple[str, ...]:
    """The classes of a transformers folder in the order of its outputs (`id2label`); () where it names none."""
    named = _json(folder_of(model), "config.json").get("id2label")
    if not isinstance(named, dict) or not all(str(number).isdecimal() for number in named):
        return ()
    names = [str(named[number]) for number in sorted(named, key=int)]
    generic = [f"LABEL_{number}" for number in range(len(names))]  # what transformers writes where nobody named them
    whole = sorted(map(int, named)) == list(range(len(names))) and len({one.casefold() for one in names}) == len(names)
    return tuple(names) if whole and names != generic else ()


def pixels(model: object) -> Pixels | None:
    """What images of three channels are normalised by where the weights were published: timm's own config of a name,
    or a transformers folder's preprocessor_config.json. None where neither says.
    """
    if isinstance(model, str) and model.startswith("timm:"):
        try:
            import timm
        except ImportError:  # said where the model is built
            return None
        config = timm.get_pretrained_cfg(model.partition(":")[2])
        return None if config is None else _pixels(config.mean, config.std)
    said = _json(folder_of(model), "preprocessor_config.json")
    return _pixels(said.get("image_mean"), said.get("image_std")) if said.get("do_normalize", True) else None


def padding(folder: Path | None, config: Mapping[str, Any]) -> int:
    """The token that fills texts up: the tokenizer's own in `folder`, else the one of the model's `config`, or that of
    the end where it names none.
    """
    named = _json(folder, "tokenizer_config.json").get("pad_token")
    content = named.get("content") if isinstance(named, dict) else named
    added = _json(folder, "tokenizer.json").get("added_tokens") if content is not None else None
    for one in added if isinstance(added, list) else ():
        if isinstance(one, dict) and one.get("content") == content and isinstance(one.get("id"), int):
            return int(one["id"])
    for key in ("pad_token_id", "eos_token_id"):
        found = config.get(key)
        first = found[0] if isinstance(found, list | tuple) and found else found
        if isinstance(first, int) and not isinstance(first, bool) and first >= 0:
            return first
    return 0


def _pixels(mean: Any, std: Any) -> Pixels | None:
    for numbers in (mean, std):
        if not isinstance(numbers, list | tuple) or len(numbers) != 3:
            return None
        if not all(isinstance(one, int | float) and math.isfinite(one) for one in numbers):
            return None
    if min(std) <= 0:
        return None
    red, green, blue = map(float, mean)
    wide, wider, widest = map(float, std)
    return (red, green, blue), (wide, wider, widest)


def _json(folder: Path | None, name: str) -> dict[str, Any]:
    """An object in a file of the folder; empty where there is none, which is said where the model is built."""
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8")) if folder is not None else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
