"""Anybody's checkpoint as one flat map from dotted names to tensors, read without running its code.

A checkpoint is `.safetensors`, or `.pt`, `.pth`, `.bin`, `.ckpt` read with `torch.load(weights_only=True)`: only
tensors and plain containers are accepted, so a pickle that wants to run code is refused before it can. It may be cut
into shards beside an index, or be the folder of either.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from foundation import checkpoints
from foundation.errors import WeightsError
from foundation.files import read_tensors, storage_of

PICKLED = (".pt", ".pth", ".bin", ".ckpt")

NO_WEIGHTS = re.compile(r"(optim|lr_sched|scheduler|scaler|grad_scaler|callbacks|loops|rng)", re.IGNORECASE)
"""Keys, by their beginning, under which training scripts keep tensors that are no weights."""

INSIDE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Put into names, at any depth, by torch.compile, FSDP and activation checkpointing."""

DEEPEST = 16
"""Containers within containers are followed so far."""

NAMED = 10
"""How many names a message lists before it only counts."""

PLAIN = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
)
"""What a weight may be stored as."""


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    `tensors`: by dotted name, containers' keys and all. `homes`: the same names -> the keys of the container, dotted
    and with a dot at the end, or "" for the outermost. `keys`: the outermost ones, for messages.
    """

    tensors: Mapping[str, Tensor]
    homes: Mapping[str, str]
    keys: tuple[str, ...]

    def part(self, wanted: str, path: Path) -> Checkpoint:
        """Only what stands under `wanted`, without that beginning. Raises WeightsError where nothing does."""
        start = wanted.rstrip(".") + "."
        found = {name: name.removeprefix(start) for name in self.tensors if name.startswith(start)}
        if not found:
            raise WeightsError(f"{path} has no weights under {wanted!r}.", f"Its keys: {', '.join(self.keys[:NAMED])}.")
        return Checkpoint(
            {short: self.tensors[name] for name, short in found.items()},
            {short: self.homes[name].removeprefix(start) for name, short in found.items()},
            self.keys,
        )

    def without(self, inside: Sequence[str]) -> Checkpoint:
        """The same without the given parts of names."""

        def cut(name: str) -> str:
            for part in inside:
                name = name.replace(part, "")
            return name

        return Checkpoint(
            {cut(name): value for name, value in self.tensors.items()},
            {cut(name): cut(home) for name, home in self.homes.items()},
            self.keys,
        )


def read(path: Path) -> Checkpoint:
    """Read a file, an index and its shards, or what a folder has of them.

    Raises WeightsError if it is missing, damaged, no checkpoint, wants to run code, or holds no tensors.
    """
    file = checkpoints.located(path)
    if file.name.endswith(checkpoints.INDEX):
        return _flat(_sharded(file), file)
    if file.suffix == ".safetensors":
        return _flat(read_tensors(file), file)
    if file.suffix not in PICKLED:
        raise WeightsError(f"{file}: not a checkpoint by its name.", f"Give .safetensors or {', '.join(PICKLED)}.")
    return _flat(_unpickle(file), file)


def oddity(tensor: Tensor) -> str:
    """Why the values of a stored tensor cannot be taken as weights; "" where they can."""
    if stored := storage_of(tensor):
        return "on the meta device, without values" if stored == "meta" else stored
    return "" if tensor.dtype in PLAIN else f"in {str(tensor.dtype).removeprefix('torch.')}"


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _sharded(index: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file, names in checkpoints.shards(index).items():
        shard = index.parent / file
        found = read(shard).tensors
        lost = [name for name in names if name not in found]
        if lost:
            raise WeightsError(f"{shard} lacks {listed(lost)}, which {index.name} promises.", "Download it again.")
        state |= found
    return state


def _unpickle(path: Path) -> object:
    try:
        # timm's training script stores its arguments beside the weights; a Namespace runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with the file is said below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted is None:
            raise WeightsError(
                f"{path} is damaged, or no checkpoint at all.", "Save it again with torch.save."
            ) from error
        raise WeightsError(
            f"{path} is a pickle that wants to run code ({wanted[1]}), which is never done.",
            "Save only the tensors: torch.save(model.state_dict(), …), or safetensors.",
        ) from error
    except Exception as error:  # a damaged file can make the reader fail in any way
        if "TorchScript" in str(error):
            raise WeightsError(f"{path} is a TorchScript archive.", "Save its state_dict() with torch.save.") from error
        raise WeightsError(f"{path} is damaged, or no checkpoint at all.", "Save it again with torch.save.") from error


def _flat(content: object, path: Path) -> Checkpoint:
    tensors: dict[str, Tensor] = {}
    homes: dict[str, str] = {}
    for home, name, value in _walk(content, "", frozenset()):
        tensors[home + name], homes[home + name] = value, home
    keys = tuple(map(str, content)) if isinstance(content, Mapping) else ()
    if not tensors:
        held = f" (its keys: {', '.join(keys[:NAMED])})" if keys else ""
        raise WeightsError(f"{path} holds no state dict{held}.", "Save it with torch.save(model.state_dict(), …).")
    return Checkpoint(tensors, homes, keys)


def _walk(content: object, home: str, above: frozenset[int]) -> Iterator[tuple[str, str, Tensor]]:
    """Container's dotted keys, name, tensor; a container that holds itself is entered once."""
    if not isinstance(content, Mapping) or id(content) in above or len(above) > DEEPEST:
        return
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield home, str(key), value
        elif isinstance(key, str) and not NO_WEIGHTS.match(key):
            yield from _walk(value, f"{home}{key}.", above | {id(content)})
