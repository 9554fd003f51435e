"""A model in 8-bit integers: static, QDQ, per channel, calibrated on real batches.

On x86 CPUs without VNNI the product of two int8 pairs saturates in 16 bits, so weights keep to 7 bits there
(`reduce_range`); onnxruntime's documentation on quantization says the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from pydantic import BaseModel, ConfigDict

from exporters import host
from exporters.atomic import staged
from exporters.errors import ExportError, first_line
from exporters.quiet import quiet
from exporters.summary import OnnxSummary, describe
from exporters.to_ort import load, session_options

Array = np.ndarray[Any, np.dtype[Any]]
Calibration = Literal["minmax", "entropy", "percentile"]

_METHODS: dict[Calibration, CalibrationMethod] = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}

# DequantizeLinear has an axis, and with it one scale per channel, since this opset.
OPSET_AT_LEAST = 13

# onnxruntime asks for a model that was simplified before, and reads this mark; `to_onnx` has simplified it.
_PREPARED = ("onnx.quant.pre_process", "onnxruntime.quant")


class QuantizedFile(BaseModel):
    """A quantised model: where it lies, how its ranges were found, and what the tool had to say."""

    model_config = ConfigDict(frozen=True)

    path: Path
    calibration: Calibration
    batches: int
    reduce_range: bool
    isa: str
    bytes_before: int
    summary: OnnxSummary
    seconds: float
    warnings: tuple[str, ...]


def quantize(
    src: Path,
    dst: Path,
    *,
    batches: Iterable[Mapping[str, Array]],
    calibration: Calibration = "minmax",
    reduce_range: bool | None = None,
    exclude: Sequence[str] = (),
    operators: Sequence[str] | None = None,
) -> QuantizedFile:
    """Write the float model `src` to `dst` with int8 weights per channel and uint8 activations, whole or not at all.

    `batches` (input name -> array) calibrate the activations' ranges; never take the test set. `reduce_range` keeps the
    weights to 7 bits; by default where this CPU lacks VNNI. Nodes named in `exclude` stay float; `operators` ("Conv",
    "Gemm", ...) limits what is quantised, by default everything that onnxruntime can. Metadata is kept.

    Raises ExportError when there are no batches, they do not fit or hold NaN, a name in `exclude` is unknown,
    the opset is below 13, or nothing could be quantised.
    """
    start = time.perf_counter()
    src, dst = Path(src), Path(dst)
    before = describe(src)
    reduced = not host.has_vnni() if reduce_range is None else reduce_range
    model = onnx.load(src)
    unknown = set(exclude) - {node.name for node in model.graph.node}
    if unknown:
        raise ExportError(f"{src.name} has no node {', '.join(sorted(unknown))}.", "Use the node names of the file.")
    onnx.helper.set_model_props(model, {**before.metadata, _PREPARED[0]: _PREPARED[1]})
    if before.opset < OPSET_AT_LEAST:
        raise ExportError(
            f"{src.name} has opset {before.opset}; int8 per channel needs {OPSET_AT_LEAST}.",
            "Export with a higher one.",
        )
    reader = _Reader(batches)
    with staged(dst) as folder, quiet("") as said:
        part = folder / dst.name
        try:
            quantize_static(
                model,
                part,
                reader,
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(operators) if operators else None,
                per_channel=True,
                reduce_range=reduced,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=list(exclude),
                calibrate_method=_METHODS[calibration],
            )
        except (ExportError, OSError):
            raise
        except Exception as error:  # the calibration runs the model, which may raise anything
            raise ExportError(
                f"onnxruntime cannot quantise {src.name}: {first_line(error)}",
                "Check that the calibration batches fit the model's inputs.",
            ) from error
        made = onnx.load(part)
        if not any(node.op_type == "DequantizeLinear" for node in made.graph.node):
            raise ExportError(f"Nothing in {src.name} can be quantised.", "Give a model with Conv, Gemm or MatMul.")
        onnx.helper.set_model_props(made, {**before.metadata, "quantization": f"int8 qdq, {calibration}"})
        part.write_bytes(made.SerializeToString(deterministic=True))
        load(part, session_options(threads=1))
    return QuantizedFile(
        path=dst,
        calibration=calibration,
        batches=reader.count,
        reduce_range=reduced,
        isa=host.isa(),
        bytes_before=before.bytes,
        summary=describe(dst),
        seconds=time.perf_counter() - start,
        warnings=tuple(dict.fromkeys(said)),
    )


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no type information
    """Hands batches to onnxruntime, one by one, and counts them."""

    def __init__(self, batches: Iterable[Mapping[str, Array]]) -> None:
        self.batches: Iterator[Mapping[str, Array]] = iter(batches)
        self.count = 0

    def get_next(self) -> dict[str, Array] | None:
        """The next batch, or None after the last."""
        batch = next(self.batches, None)
        if batch is None:
            if not self.count:
                raise ExportError("There are no calibration batches.", "Give at least one.")
            return None
        for name, array in batch.items():
            if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
                raise ExportError(f"Calibration batch {self.count} holds NaN or infinity in {name}.", "Clean the data.")
        self.count += 1
        return dict(batch)
