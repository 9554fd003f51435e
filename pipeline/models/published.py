"""What stands beside published weights: the names of the classes, and what images were normalised by."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Pixels = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and standard deviation of red, green and blue, of pixels from 0 to 1."""


def folder(model: object) -> Path | None:
    """The folder of a transformers model, `hf:FOLDER`, where its tokenizer lies, too."""
    library, _, name = model.partition(":") if isinstance(model, str) else ("", "", "")
    place = Path(name).expanduser()
    return place if library == "hf" and name and place.is_dir() else None


def class_names(model: object) -> tuple[str, ...]:
    """The classes of a transformers folder in the order of its outputs (`id2label`); () where it names none."""
    named = _json(folder(model), "config.json").get("id2label")
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
    said = _json(folder(model), "preprocessor_config.json")
    return _pixels(said.get("image_mean"), said.get("image_std")) if said.get("do_normalize", True) else None


def padding_of(folder: Path | None, config: Mapping[str, Any]) -> int:
    """`padding` by what lies in a folder, without the tokenizers library."""
    held = _json(folder, "tokenizer.json")

    def number(token: str) -> int | None:
        added, model = held.get("added_tokens"), held.get("model")
        for one in added if isinstance(added, list) else ():
            if isinstance(one, dict) and one.get("content") == token:
                return one.get("id")
        known = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(known, dict):
            return known.get(token)
        rows = known if isinstance(known, list) else ()  # of a unigram model: each token and its score
        return next((at for at, row in enumerate(rows) if isinstance(row, list) and row[:1] == [token]), None)

    return padding(_json(folder, "tokenizer_config.json"), config, number)


def padding(settings: Mapping[str, Any], config: Mapping[str, Any], number: Callable[[str], int | None]) -> int:
    """The token that fills texts up: the one that the tokenizer's `settings` name, by its `number`, else the one of the
    model's `config`, or that of the end where it names none.
    """
    named = settings.get("pad_token")
    token = named.get("content") if isinstance(named, dict) else named
    ends = config.get("eos_token_id")
    end = ends[0] if isinstance(ends, list | tuple) and ends else ends
    for found in (number(token) if isinstance(token, str) else None, config.get("pad_token_id"), end):
        if isinstance(found, int) and not isinstance(found, bool) and found >= 0:
            return found
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


def _json(place: Path | None, name: str) -> dict[str, Any]:
    """An object in a file of the folder; empty where there is none, which is said where the model is built."""
    try:
        found = json.loads((place / name).read_text(encoding="utf-8")) if place is not None else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
