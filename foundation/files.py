"""Digests of files, files that appear whole or not at all, and tensors on disk as safetensors."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from foundation.errors import StoreError, WeightsError

if TYPE_CHECKING:  # torch is imported only where tensors are read or written
    from torch import Tensor

_ALIASES = "aliases"
TENSOR_NAME = re.compile(r"[\w.\-+:]*", re.ASCII)
"""What tensors of a stored program may be called: a name may end up in generated source."""


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Make sure that a file, or a folder's list of names, has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def storage_of(tensor: Tensor) -> str:
    """How a tensor keeps its values where they cannot be read off one by one: "meta", "nested", "quantised", "sparse";
    "" for one that lies plainly in memory.
    """
    import torch

    if tensor.is_meta:
        return "meta"
    if tensor.is_nested:
        return "nested"
    if tensor.is_quantized:
        return "quantised"
    return "" if tensor.layout == torch.strided else "sparse"


def make_folder(path: Path) -> None:
    """Make a folder, with those above it, where there is none. Raises StoreError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """Give a name to write to that becomes `path` when the block ends well, and vanishes when it does not.

    `durable` waits until the bytes are on the disk, so that not even a power cut leaves half a file. Raises StoreError
    on any error of the file system.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        if durable:
            sync(partial)
        partial.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> StoreError:
    return StoreError(
        f"{path} cannot be written: {error.strerror or error}.", "Free some space, or choose a folder that is writable."
    )


def memory_of(name: str, tensor: Tensor) -> Hashable:
    """What tied tensors have in common: address, type, sizes and strides. An empty one has no memory: its name."""
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()) if tensor.numel() else name


def read_tensors(path: Path | str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; tied names share one tensor again, as `save_tensors` found them."""
    import safetensors

    path = Path(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            # Cloned, because the tensors would otherwise be pages of the file itself.
            state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # no iteration
            metadata = file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(
            f"{path} cannot be read: {error}.", "The file is missing, damaged or not safetensors."
        ) from error
    return state | {alias: state[name] for alias, name in _aliases(metadata, state, path).items()}


def _aliases(metadata: Mapping[str, str], state: Mapping[str, Tensor], path: Path) -> dict[str, str]:
    try:
        aliases = json.loads(metadata.get(_ALIASES, "{}"))
    except (ValueError, RecursionError):
        aliases = None
    if not isinstance(aliases, dict) or not all(isinstance(name, str) and name in state for name in aliases.values()):
        raise WeightsError(
            f"{path}: its metadata '{_ALIASES}' is no map to tensors of the file.", "Save the weights again without it."
        )
    return aliases


def save_tensors(state: Mapping[str, Tensor], path: Path | str) -> None:
    """Write a safetensors file, complete or not at all; tied tensors are stored once.

    Raises StoreError if the disk is full or the folder cannot be written.
    """
    import safetensors
    import safetensors.torch

    path = Path(path)
    plain: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[Hashable, str] = {}
    for name, tensor in state.items():
        detached = tensor.detach().cpu()
        key = memory_of(name, detached)
        if key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        own = detached.contiguous()
        # safetensors refuses tensors that share memory, such as slices of one buffer.
        plain[name] = own if own.untyped_storage().nbytes() == own.nbytes else own.clone()
    with replacing(path) as partial:
        try:
            safetensors.torch.save_file(plain, partial, metadata={_ALIASES: json.dumps(aliases)} if aliases else None)
        except safetensors.SafetensorError as error:  # wraps the system's own errors
            raise OSError(str(error)) from error
