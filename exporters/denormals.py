"""Weights so small that a float32 holds them as denormals, which x86 CPUs multiply ten to a hundred times slower.

Pruning, weight decay and BatchNorm folding make them. Setting them to zero changes an output by about 1e-38 times what
they are multiplied with, which is nothing unless that is huge: whoever flushes compares the outputs before and after.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from pydantic import BaseModel, ConfigDict

from exporters.atomic import staged
from exporters.summary import describe
from foundation.errors import ExportError

Array = np.ndarray[Any, np.dtype[Any]]

_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16}


class Denormals(BaseModel):
    """Denormal elements of a file's initialisers: per tensor and in all, beside how many elements there are."""

    model_config = ConfigDict(frozen=True)

    tensors: dict[str, int]
    elements: int

    @property
    def count(self) -> int:
        """All denormal elements."""
        return sum(self.tensors.values())


def count_denormals(path: Path) -> Denormals:
    """Count the denormals among the weights and folded constants of the ONNX file at `path`.

    Raises ExportError when it cannot be read.
    """
    describe(path)
    return _count(onnx.load(path))


def flush_denormals(src: Path, dst: Path, *, only: frozenset[str] | None = None) -> Denormals:
    """Write the ONNX file `src` to `dst` with the denormals of its initialisers set to zero; returns what was flushed.

    `only` limits it to the initialisers of these names. External weights stay external, in `<dst>.data`.
    Raises ExportError when `src` cannot be read or `dst` not be written.
    """
    src, dst = Path(src), Path(dst)
    before = describe(src)
    model = onnx.load(src)
    found = _count(model)
    chosen = {name: count for name, count in found.tensors.items() if only is None or name in only}
    if only is not None and only - found.tensors.keys():
        raise ExportError(f"{src.name} has no denormals in {', '.join(sorted(only - found.tensors.keys()))}.")
    for tensor in model.graph.initializer:
        if tensor.name in chosen:
            array = onnx.numpy_helper.to_array(tensor).copy()
            array[_denormal(array)] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    with staged(dst) as folder:
        part = folder / dst.name
        if before.external_files:
            onnx.save(model, part, save_as_external_data=True, location=f"{dst.name}.data")
        else:
            part.write_bytes(model.SerializeToString(deterministic=True))
    return Denormals(tensors=chosen, elements=found.elements)


def _count(model: onnx.ModelProto) -> Denormals:
    tensors, elements = {}, 0
    for tensor in model.graph.initializer:
        if tensor.data_type in _FLOATS:
            array = onnx.numpy_helper.to_array(tensor)
            elements += array.size
            if count := int(_denormal(array).sum()):
                tensors[tensor.name] = count
    return Denormals(tensors=tensors, elements=elements)


def _denormal(array: Array) -> Array:
    small: Array = (array != 0) & (np.abs(array) < np.finfo(array.dtype).tiny)
    return small
