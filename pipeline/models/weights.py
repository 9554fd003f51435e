"""Weights on disk: reading anybody's checkpoint without running its code, and writing our own as safetensors.

A checkpoint is `.safetensors`, or `.pt`, `.pth`, `.bin`, `.ckpt` read with `torch.load(weights_only=True)`: only
tensors and plain containers are accepted, so a pickle that wants to run code is refused before it can.
"""

from __future__ import annotations

import argparse
import itertools
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foundation.errors import WeightsError
from foundation.files import read_tensors, sha256
from pipeline.models.source import ModelSource

PICKLED = (".pt", ".pth", ".bin", ".ckpt")

WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "state_dict_ema", "model_ema", "weights")
"""Keys under which training scripts keep the state dict, most usual first."""

PREFIXES = ("module.", "model.", "net.")
"""Put before every name by DataParallel, Lightning and wrapper modules."""

NAMED = 10
"""How many names a message lists before it only counts."""


@dataclass(frozen=True)
class Loaded:
    """What was loaded into a model: from where, and what the model kept of its own."""

    origin: str
    sha256: str
    """Hash of the file; "" for a library's own download."""
    tensors: int
    stripped: str = ""
    """Prefix that was taken off every name."""
    fresh: tuple[str, ...] = ()
    """Names that stay at their initial values, such as a classifier for another number of classes."""

    def __str__(self) -> str:
        stripped = f", prefix {self.stripped!r} taken off" if self.stripped else ""
        fresh = f", untrained: {_list(list(self.fresh))}" if self.fresh else ""
        return f"{self.tensors} tensors from {self.origin}{stripped}{fresh}"


def load_weights(model: nn.Module, path: Path | str) -> Loaded:
    """Fill `model` in place from a checkpoint; every name and shape must agree.

    The common wrappers (`{"state_dict": …}`) and prefixes (`module.`, `model.`, `_orig_mod.`) are seen through.
    Raises WeightsError, and leaves the model untouched, if the file is missing, unreadable, wants to run code, does not
    fit (each name is given), or holds NaN or infinity.
    """
    path = Path(path)
    state, stripped = _aligned(read_checkpoint(path), model.state_dict())
    _fill(model, state, str(path))
    return Loaded(str(path), sha256(path), len(state), stripped)


def load_pretrained(model: nn.Module, source: ModelSource) -> Loaded:
    """Fill `model` in place with the library's own weights, downloading them if need be.

    Raises WeightsError if the library has none for this model or cannot be reached.
    """
    found = source.pretrained()
    _fill(model, found.state, found.origin)
    return Loaded(found.origin, "", len(found.state) - len(found.fresh), fresh=found.fresh)


def read_checkpoint(path: Path | str) -> dict[str, Tensor]:
    """Return the state dict in anybody's checkpoint, names as they are in the file; never runs code from it."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file.", "Give a .safetensors or .pt file, 'pretrained' or 'train'.")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    if path.suffix not in PICKLED:
        raise WeightsError(f"{path}: not a checkpoint by its name.", f"Give .safetensors or {', '.join(PICKLED)}.")
    return _state_in(_unpickle(path), path)


def check_finite(state: Mapping[str, Tensor], origin: str) -> None:
    """Raise WeightsError, naming the tensors, if any value is NaN or infinite."""
    bad = [name for name, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if bad:
        raise WeightsError(
            f"{origin} holds NaN or infinity in {_list(bad)}.", "Use a checkpoint from before it diverged."
        )


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
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        if "TorchScript" in str(error):
            raise WeightsError(f"{path} is a TorchScript archive.", "Save its state_dict() with torch.save.") from error
        raise WeightsError(f"{path} is damaged, or no checkpoint at all.", "Save it again with torch.save.") from error


def _state_in(content: object, path: Path) -> dict[str, Tensor]:
    """The state dict inside what a training script saved."""
    if isinstance(content, Mapping):
        for key in WRAPPERS:
            if isinstance(content.get(key), Mapping):
                return _state_in(content[key], path)
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        if tensors:
            return tensors
    keys = f" (its keys: {', '.join(map(str, list(content)[:NAMED]))})" if isinstance(content, Mapping) else ""
    raise WeightsError(f"{path} holds no state dict{keys}.", "Save it with torch.save(model.state_dict(), …).")


def _aligned(state: dict[str, Tensor], expected: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """Rename to the model's names by the prefix, taken off or put on, under which most of them agree."""
    compiled = any("_orig_mod." in name for name in expected)
    plain = {name if compiled else name.replace("_orig_mod.", ""): value for name, value in state.items()}
    chains = ["", *PREFIXES, *("".join(pair) for pair in itertools.product(PREFIXES, repeat=2))]

    def hits(strip: str, add: str) -> int:
        return sum(name.startswith(strip) and add + name[len(strip) :] in expected for name in plain)

    # max() keeps the first of equals: nothing stripped or added, if that is as good.
    options = [*((chain, "") for chain in chains), *(("", prefix) for prefix in PREFIXES)]
    strip, add = max(options, key=lambda option: hits(*option))
    renamed = {add + name[len(strip) :] if name.startswith(strip) else name: value for name, value in plain.items()}
    return renamed, strip


def _fill(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    expected = model.state_dict()
    tied = {value.data_ptr() for name, value in expected.items() if name in state and value.numel()}
    missing = [
        name
        for name, value in expected.items()
        # Old checkpoints do not count batches, and tied weights are often stored once.
        if name not in state and not name.endswith("num_batches_tracked") and value.data_ptr() not in tied
    ]
    unexpected = [name for name in state if name not in expected]
    other = [
        f"{name} {_kind(state[name])} instead of {_kind(value)}"
        for name, value in expected.items()
        if name in state
        and (state[name].shape != value.shape or state[name].is_floating_point() != value.is_floating_point())
    ]
    parts = [
        f"{len(names)} {what}: {_list(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", other))
        if names
    ]
    if parts:
        raise WeightsError(
            f"{origin} does not fit the model: {'; '.join(parts)}.",
            "Is it a checkpoint of this very model, with the same number of classes and input size?",
        )
    check_finite(state, origin)
    model.load_state_dict(state, strict=False)


def _kind(tensor: Tensor) -> str:
    return f"{'x'.join(map(str, tensor.shape)) or 'scalar'} {str(tensor.dtype).removeprefix('torch.')}"


def _list(names: list[str]) -> str:
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")
