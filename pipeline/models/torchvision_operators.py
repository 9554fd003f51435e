"""Makes `import torchvision` work beside a CPU build of torch, for whoever imports it after `pipeline.models`.

The wheel on the package index is compiled against CUDA. Beside a CPU torch its operator library cannot be loaded, and
`import torchvision` dies with "operator torchvision::nms does not exist", because two fake kernels are registered for
operators that were never declared. Declaring those two schemas is all that is missing. Where the library does load
(a matching torchvision, CPU or CUDA), nothing is declared and nothing changes.
"""

from __future__ import annotations

import importlib.util
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from pipeline.models.extras import installed

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _operator_library() -> Path | None:
    """Path of torchvision's compiled operators, found without importing torchvision."""
    spec = importlib.util.find_spec("torchvision")
    folders = spec.submodule_search_locations if spec is not None else None
    files = (Path(folder) / f"_C{suffix}" for folder in folders or () for suffix in EXTENSION_SUFFIXES)
    return next((file for file in files if file.exists()), None)


def _declare_missing_operators() -> torch.library.Library | None:
    """Declare `nms` and `qnms` if torchvision's own library cannot; the returned handle keeps them declared."""
    if not installed("torchvision") or hasattr(torch.ops.torchvision, "nms"):
        return None
    path = _operator_library()
    if path is not None:
        try:
            # torchvision loads the same file again, which is harmless.
            torch.ops.load_library(path)  # type: ignore[no-untyped-call]
        except OSError:
            pass  # built against another torch
        else:
            return None
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        library.define(f"{operator}{_SCHEMA}")  # type: ignore[no-untyped-call]
    return library


_DECLARED = _declare_missing_operators()
