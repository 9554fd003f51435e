"""Where the bytes of a checkpoint lie: one file, an index with its shards, a folder, and the part that is meant."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from foundation.errors import WeightsError
from foundation.files import sha256

INDEX = ".index.json"

IN_A_FOLDER = (
    f"model.safetensors{INDEX}",
    "model.safetensors",
    f"pytorch_model.bin{INDEX}",
    "pytorch_model.bin",
)
"""What a folder is searched for, in this order: safetensors first, as transformers does."""


def split(text: str) -> tuple[Path, str]:
    """`FILE#PART` as the file and the part of it that is meant; "" = choose by what fits.

    A file whose own name holds a `#` is taken whole.
    """
    file, mark, part = text.rpartition("#")
    return (Path(file), part) if mark and file and not Path(text).exists() else (Path(text), "")


def located(path: Path) -> Path:
    """The file to read: `path`, or the checkpoint in it if it is a folder. Raises WeightsError if there is none."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise WeightsError(f"{path}: no such file.", "Give a .safetensors or .pt file, 'pretrained' or 'train'.")
    for name in IN_A_FOLDER:
        if (path / name).is_file():
            return path / name
    raise WeightsError(f"{path} is a folder without a checkpoint.", f"Give a file, or have {', '.join(IN_A_FOLDER)}.")


def shards(index: Path) -> dict[str, list[str]]:
    """Shard's file name -> names of the tensors in it, as an index (`….index.json`) says.

    Raises WeightsError if the index is damaged, a shard is missing, or one is not named as a file beside the index.
    """
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{index} is damaged: it is no JSON.", "Download it again.") from error
    places = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(places, Mapping) or not places or not all(isinstance(file, str) for file in places.values()):
        raise WeightsError(f"{index} has no weight_map from tensor to file.", "Give the index of a sharded checkpoint.")
    found: dict[str, list[str]] = {}
    for name, file in places.items():
        found.setdefault(file, []).append(name)
    for file in found:
        if not file or file in (".", "..") or any(mark in file for mark in "/\\\0"):
            raise WeightsError(
                f"{index} names the shard {file[:80]!r}, which is no file beside it.", "Shards lie beside their index."
            )
    missing = [file for file in found if not (index.parent / file).is_file()]
    if missing:
        raise WeightsError(
            f"{index}: {len(missing)} of its {len(found)} shards are missing, first {missing[0]}.", "Download them all."
        )
    return found


def files(text: str) -> tuple[Path, ...]:
    """Every file that decides which weights `text` (a file or folder, with or without `#PART`) stands for.

    None where there is no such file. Raises WeightsError for a damaged index.
    """
    path, _ = split(text)
    if not path.exists():
        return ()
    file = located(path)
    return (file, *(file.parent / shard for shard in sorted(shards(file)))) if file.name.endswith(INDEX) else (file,)


def digests(text: str) -> dict[str, str]:
    """What `text` stands for -> sha256 of each of its files; another file under the same name is another model."""
    return {text if number == 0 else file.name: sha256(file) for number, file in enumerate(files(text))}
