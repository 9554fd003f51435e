"""A model in 8-bit integers: static, QDQ, per channel, calibrated on real batches; or dynamic, for MatMuls.

On x86 CPUs without VNNI the sum of two int8 products saturates in 16 bits, so weights that are to be right on any CPU
keep to 7 bits (`reduce_range`); onnxruntime's documentation on quantization says the same.
"""

from __future__ import annotations

import io
import itertools
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType
from onnxruntime.quantization import quantize_dynamic as quantize_dynamic_file
from onnxruntime.quantization.calibrate import create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import save_and_reload_model_with_shape_infer
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
from pydantic import BaseModel, ConfigDict

from exporters import host
from exporters.atomic import staged
from exporters.export import ONE_FILE_LIMIT
from exporters.quiet import quiet
from exporters.summary import OnnxSummary, describe
from exporters.to_ort import load, session_options
from foundation.errors import ExportError, first_line

Array = np.ndarray[Any, np.dtype[Any]]
Calibration = Literal["minmax", "entropy", "percentile"]

_METHODS: dict[Calibration, CalibrationMethod] = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}

# DequantizeLinear has an axis, and with it one scale per channel, since this opset.
OPSET_AT_LEAST = 13

# Bins of the histogram in which entropy looks for a range, and how far apart the ranges are that it tries. With
# onnxruntime's own 128 bins there is but one range to choose, the whole one, which is minmax by another name.
BINS = 2048
STRIDE = 16

# onnxruntime knew the integers' operators at this opset years before it knew them at 23 (1.23 does not yet).
OPSET_FOR_OLDER = 21

# Nodes with weights, whose quantisation can hurt; the others only pass integers on.
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")

# onnxruntime asks for a model that was simplified before, and reads this mark; `to_onnx` has simplified it.
_PREPARED = ("onnx.quant.pre_process", "onnxruntime.quant")


class QuantizedFile(BaseModel):
    """A quantised model: where it lies, how its ranges were found ("dynamic": while it runs), what the tool said."""

    model_config = ConfigDict(frozen=True)

    path: Path
    calibration: Calibration | Literal["dynamic"]
    batches: int
    reduce_range: bool
    isa: str
    bytes_before: int
    summary: OnnxSummary
    seconds: float
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Ranges:
    """The range of every activation of one model: how they were found, on how many batches, what the tool said."""

    calibration: Calibration
    batches: int
    tensors: Any
    warnings: tuple[str, ...]


def calibrate(
    src: Path,
    *,
    batches: Iterable[Mapping[str, Array]],
    calibration: Calibration = "minmax",
    operators: Sequence[str] | None = None,
) -> Ranges:
    """Find the ranges that `quantize` needs: they serve it as often as it is called for the same model.

    Arguments and errors as there.
    """
    src = Path(src)
    before = describe(src)
    reader = _Reader(batches, before)
    with quiet("") as said:
        tensors = _ranges(_prepared(src, before, ()), src, reader, calibration, operators)
    return Ranges(calibration, reader.count, tensors, tuple(dict.fromkeys(said)))


def quantize(
    src: Path,
    dst: Path,
    *,
    batches: Iterable[Mapping[str, Array]] | Ranges,
    calibration: Calibration = "minmax",
    reduce_range: bool = True,
    exclude: Sequence[str] = (),
    operators: Sequence[str] | None = None,
) -> QuantizedFile:
    """Write the float model `src` to `dst` with int8 weights per channel and 8-bit activations, whole or not at all.

    `batches` (input name -> array) calibrate the activations' ranges; never take the test set. Or they are the ranges
    that `calibrate` found for `src`, and `calibration` is theirs. `reduce_range` keeps the
    weights to 7 bits, which any CPU multiplies right; with all 8, x86 CPUs without VNNI do not. Nodes named in
    `exclude` stay float; `operators` ("Conv", "Gemm", ...) limits what is quantised, by default everything that
    onnxruntime can. Metadata is kept.

    Raises ExportError when there are no batches, they do not fit or hold NaN, a name in `exclude` is unknown,
    the opset is below 13, or nothing could be quantised.
    """
    start = time.perf_counter()
    src, dst = Path(src), Path(dst)
    before = describe(src)
    model = _prepared(src, before, exclude)
    if not isinstance(batches, Ranges):
        batches = calibrate(src, batches=batches, calibration=calibration, operators=operators)
    with quiet("") as said:
        made = _for_older(_with_ranges(model, src, batches.tensors, reduce_range, exclude=exclude, operators=operators))
    _write(made, src, dst, before, f"int8 qdq, {batches.calibration}", "DequantizeLinear")
    return QuantizedFile(
        path=dst,
        calibration=batches.calibration,
        batches=batches.batches,
        reduce_range=reduce_range,
        isa=host.isa(),
        bytes_before=before.bytes,
        summary=describe(dst),
        seconds=time.perf_counter() - start,
        warnings=tuple(dict.fromkeys((*batches.warnings, *said))),
    )


def quantize_dynamic(src: Path, dst: Path, *, reduce_range: bool = True, exclude: Sequence[str] = ()) -> QuantizedFile:
    """Write the float model `src` to `dst` with int8 weights in its MatMuls and Gemms, whole or not at all.

    The activations' ranges are found while it runs, so nothing is calibrated; that pays where the matrices are large,
    as in transformers. Arguments and errors as in `quantize`.
    """
    start = time.perf_counter()
    src, dst = Path(src), Path(dst)
    before = describe(src)
    model = _prepared(src, before, exclude)
    del model.graph.value_info[:]  # the tool transposes a Gemm's weight, and then trips over its old shape
    with tempfile.TemporaryDirectory() as scratch, quiet("") as said:
        part = Path(scratch) / dst.name
        with _explained(src, "Give a model whose weights are float32."):
            quantize_dynamic_file(
                model,
                part,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                reduce_range=reduce_range,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=list(exclude),
                extra_options={"MatMulConstBOnly": True},
            )
        made = onnx.load(part)
    _write(made, src, dst, before, "int8, dynamic", "DynamicQuantizeLinear")
    return QuantizedFile(
        path=dst,
        calibration="dynamic",
        batches=0,
        reduce_range=reduce_range,
        isa=host.isa(),
        bytes_before=before.bytes,
        summary=describe(dst),
        seconds=time.perf_counter() - start,
        warnings=tuple(dict.fromkeys(said)),
    )


def sensitivity(
    src: Path,
    *,
    batches: Iterable[Mapping[str, Array]],
    probe: Mapping[str, Array],
    calibration: Calibration = "minmax",
    reduce_range: bool = True,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """How much each node's quantisation alone changes the outputs: node name -> relative error, the worst first.

    One node after the other is quantised while all others stay float, and the model answers `probe`; the error is
    ‖found − float‖ / ‖float‖ over all outputs. Raises ExportError as `quantize` does.
    """
    src = Path(src)
    before = describe(src)
    model = _prepared(src, before, ())
    with quiet(""):
        ranges = _ranges(model, src, _Reader(batches, before), calibration, None)
        names = [node.name for node in model.graph.node if node.op_type in WEIGHTED and node.name]
        wanted = _answers(model, src, probe)
        scale = float(np.linalg.norm(wanted)) or 1.0
        errors = {}
        for number, name in enumerate(names, start=1):
            alone = _with_ranges(model, src, ranges, reduce_range, only=[name])
            error = float(np.linalg.norm(_answers(alone, src, probe) - wanted)) / scale
            errors[name] = error if np.isfinite(error) else float("inf")
            step(number, len(names))
    return dict(sorted(errors.items(), key=lambda item: -item[1]))


def _for_older(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model at the opset that older runtimes know too, where every operator in it exists there; else as it is."""
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if opsets.keys() != {""} or opsets[""] <= OPSET_FOR_OLDER or model.ByteSize() > ONE_FILE_LIMIT:
        return model
    try:
        for node in model.graph.node:
            onnx.defs.get_schema(node.op_type, OPSET_FOR_OLDER, node.domain)
        older = onnx.version_converter.convert_version(model, OPSET_FOR_OLDER)
        onnx.checker.check_model(older)
    except (onnx.defs.SchemaError, onnx.checker.ValidationError, RuntimeError):  # such as Attention, new in 23
        return model
    return older


def _answers(model: onnx.ModelProto, src: Path, probe: Mapping[str, Array]) -> Array:
    """All outputs of a model for one feed, flattened into one vector."""
    with tempfile.TemporaryDirectory() as scratch:
        part = Path(scratch) / "part.onnx"
        _save(model, part)
        session = load(part, session_options(threads=1))
        with _explained(src, "Check that the calibration batches fit the model's inputs."):
            outputs = session.run(None, dict(probe))
    flat: Array = np.concatenate([np.asarray(array, np.float64).ravel() for array in outputs])
    return flat


def _prepared(src: Path, before: OnnxSummary, exclude: Sequence[str]) -> onnx.ModelProto:
    if before.opset < OPSET_AT_LEAST:
        raise ExportError(
            f"{src.name} has opset {before.opset}; int8 per channel needs {OPSET_AT_LEAST}.",
            "Export with a higher one.",
        )
    model = onnx.load(src)
    unknown = set(exclude) - {node.name for node in model.graph.node}
    if unknown:
        raise ExportError(f"{src.name} has no node {', '.join(sorted(unknown))}.", "Use the node names of the file.")
    onnx.helper.set_model_props(model, {**before.metadata, _PREPARED[0]: _PREPARED[1]})
    return model


def _types() -> tuple[QuantType, QuantType]:
    """Activations and weights: uint8 × int8 is what x86 multiplies, int8 × int8 what NEON does."""
    return (QuantType.QInt8 if host.isa() == "neon" else QuantType.QUInt8), QuantType.QInt8


def _operators(operators: Sequence[str] | None) -> list[str]:
    """The operators to quantise; by default all that onnxruntime can, as `quantize_static` has it."""
    return sorted(operators or {*QLinearOpsRegistry, *QDQRegistry})


def _ranges(
    model: onnx.ModelProto, src: Path, reader: _Reader, calibration: Calibration, operators: Sequence[str] | None
) -> Any:
    """The range of every activation over the calibration batches, as onnxruntime's `TensorsData`."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        _explained(src, "Check that the calibration batches fit the model's inputs."),
    ):
        part = Path(scratch) / "model.onnx"
        _save(model, part)
        calibrator = create_calibrator(
            part,
            _operators(operators),
            augmented_model_path=str(Path(scratch) / "augmented.onnx"),
            calibrate_method=_METHODS[calibration],
            extra_options={"num_bins": BINS},
        )
        with redirect_stdout(io.StringIO()):  # the histogram methods print their progress
            calibrator.collect_data(reader)
            if calibration == "entropy":  # its own takes minutes over this many bins
                calibrator.collector.get_entropy_threshold = _entropy_range
            return calibrator.compute_data()


def _entropy_range(histogram: tuple[Array, Array, Any, Any, Any], _bins: int) -> tuple[Any, Any]:
    """The range whose 8-bit version tells least apart from the values as they fell (Migacz, GTC 2017, s7310).

    `histogram`: counts and edges, symmetric around 0, then the smallest and the largest value. What lies outside a
    range is counted at its end. Values of one sign have all 256 levels for themselves, others half of them each side.
    """
    counts, edges, lowest, highest = histogram[:4]
    half = len(counts) // 2
    sizes = (counts[half:] + counts[:half][::-1]).astype(np.float64)  # how many are how far from 0
    sizes[0] = sizes[1]  # zeros, exact in any range; all those of a ReLU would hide what happens to the rest
    levels = 256 if lowest >= 0 or highest <= 0 else 128
    best, bins = np.inf, half
    for upto in range(half, levels - 1, -STRIDE):
        kept = sizes[:upto]
        held = kept.copy()
        held[-1] += sizes[upto:].sum()
        starts = np.arange(levels) * upto // levels
        filled = kept > 0
        level = np.repeat(np.arange(levels), np.diff(starts, append=upto))
        share = np.add.reduceat(kept, starts) / np.maximum(np.add.reduceat(filled.astype(np.float64), starts), 1)
        found = np.where(filled, share[level], 0)
        divergence = _divergence(held, found)
        if divergence < best:
            best, bins = divergence, upto
    limit = edges[half + bins]
    return max(lowest, -limit), min(highest, limit)


def _divergence(held: Array, found: Array) -> float:
    """Kullback and Leibler's, of two histograms; where `found` is empty and `held` is not, as of one ten-thousandth."""
    if not found.sum():
        return float("inf")
    p, q = held / held.sum(), np.maximum(found / found.sum(), 1e-4 / len(found))
    there = p > 0
    return float((p[there] * np.log(p[there] / q[there])).sum())


class _Quantizer(QDQQuantizer):  # type: ignore[misc]  # onnxruntime's tools have no types
    """onnxruntime's, whose copies of a bias that several nodes share never take the name of something else.

    It numbers them after the other weights alone: the copy of `pad_1` may be `pad_17`, which some node computes.
    """

    def _dup_initializer(self, initializer: onnx.TensorProto) -> onnx.TensorProto:
        graph = self.model.model.graph
        taken = {name for node in graph.node for name in (*node.input, *node.output)}
        taken |= {one.name for one in (*graph.input, *graph.initializer)}
        copy = onnx.TensorProto()
        copy.CopyFrom(initializer)
        numbered = (f"{initializer.name}_copy_{number}" for number in itertools.count(1))
        copy.name = next(name for name in numbered if name not in taken)
        self.model.add_initializer(copy)
        return copy


def _with_ranges(
    model: onnx.ModelProto,
    src: Path,
    ranges: Any,
    reduced: bool,
    *,
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    operators: Sequence[str] | None = None,
) -> onnx.ModelProto:
    """A quantised copy of `model`: what `quantize_static` does once the ranges are known.

    The quantiser narrows ranges in place, so it gets a copy: the next call is to find them as they were.
    """
    with _explained(src, "Give a float32 model."):
        inferred = save_and_reload_model_with_shape_infer(model)
        activation, weight = _types()
        quantizer = _Quantizer(
            inferred,
            True,
            reduced,
            weight,
            activation,
            deepcopy(ranges),
            list(only),
            list(exclude),
            _operators(operators),
            {},
        )
        quantizer.quantize_model()
        _leave_outputs_float(quantizer.model.model.graph, model.graph)
        quantizer.model.topological_sort()  # as ONNX asks for, and onnxruntime does without
        made: onnx.ModelProto = quantizer.model.model
        return made


def _leave_outputs_float(graph: onnx.GraphProto, before: onnx.GraphProto) -> None:
    """Take away the rounding of what leaves the model: it saves no time, and a few hundred levels tie close logits.

    `before` is the float graph. Where the rounding stands in for an operator of it, as for a last Relu, it stays.
    """
    operators = {name: node.op_type for node in before.node for name in node.output}
    makers = {name: node for node in graph.node for name in node.output}
    users = Counter(name for node in graph.node for name in node.input)
    for output in graph.output:
        back = makers.get(output.name)
        if back is None or back.op_type != "DequantizeLinear" or users[output.name]:
            continue
        there = makers.get(back.input[0])
        if there is None or there.op_type != "QuantizeLinear" or users[back.input[0]] > 1:
            continue
        exact = there.input[0]
        if exact not in makers or users[exact] > 1:  # an input of the model, or used elsewhere too
            continue
        if makers[exact].op_type != operators.get(output.name):
            continue
        outputs = makers[exact].output
        outputs[list(outputs).index(exact)] = output.name
        graph.node.remove(there)
        graph.node.remove(back)
        spare = {*there.input[1:], *back.input[1:]} - {name for node in graph.node for name in node.input}
        for tensor in [tensor for tensor in graph.initializer if tensor.name in spare]:
            graph.initializer.remove(tensor)  # onnxruntime warns of each that nothing uses


def _write(made: onnx.ModelProto, src: Path, dst: Path, before: OnnxSummary, technique: str, mark: str) -> None:
    """Save the quantised model, unless it lacks the operator `mark`, without which nothing was quantised."""
    if not any(node.op_type == mark for node in made.graph.node):
        raise ExportError(f"Nothing in {src.name} can be quantised.", "Give a model with Conv, Gemm or MatMul.")
    onnx.helper.set_model_props(made, {**before.metadata, "quantization": technique})
    with staged(dst) as folder:
        part = folder / dst.name
        _save(made, part)
        load(part, session_options(threads=1))


def _save(model: onnx.ModelProto, path: Path) -> None:
    """Save a model; only what is too large for one file gets external weights, since that changes `model` itself."""
    if model.ByteSize() > ONE_FILE_LIMIT:
        onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data")
    else:
        path.write_bytes(model.SerializeToString(deterministic=True))


@contextmanager
def _explained(src: Path, hint: str) -> Iterator[None]:
    """Turn whatever onnxruntime's tools raise into one line; they run the model, which may raise anything."""
    try:
        yield
    except (ExportError, OSError):
        raise
    except Exception as error:
        raise ExportError(f"onnxruntime cannot quantise {src.name}: {first_line(error)}", hint) from error


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no type information
    """Hands batches to onnxruntime, one by one, checks that they fit the model's inputs, and counts them."""

    def __init__(self, batches: Iterable[Mapping[str, Array]], model: OnnxSummary) -> None:
        self.batches: Iterator[Mapping[str, Array]] = iter(batches)
        self.shapes = {spec.name: spec.shape for spec in model.inputs}
        self.count = 0

    def get_next(self) -> dict[str, Array] | None:
        """The next batch, or None after the last."""
        batch = next(self.batches, None)
        if batch is None:
            if not self.count:
                raise ExportError("There are no calibration batches.", "Give at least one.")
            return None
        if set(batch) != set(self.shapes):
            raise ExportError(
                f"Calibration batch {self.count} holds {', '.join(batch) or 'nothing'}; the model takes "
                f"{', '.join(self.shapes)}.",
                "Give one array per input.",
            )
        for name, array in batch.items():
            shape = self.shapes[name]
            fits = len(shape) == array.ndim and all(
                isinstance(size, str) or size == given for size, given in zip(shape, array.shape, strict=True)
            )
            if not fits:
                raise ExportError(
                    f"Calibration batch {self.count} has shape {array.shape} for {name}, which takes {shape}.",
                    "Resize the calibration data to the model's input.",
                )
            if not array.size:
                raise ExportError(f"Calibration batch {self.count} holds no samples for {name}.", "Leave it out.")
            if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
                raise ExportError(f"Calibration batch {self.count} holds NaN or infinity in {name}.", "Clean the data.")
        self.count += 1
        return dict(batch)
