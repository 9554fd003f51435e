"""What one model can be shipped as: a table with one row per candidate, and how each is built from the exported model.

    opset18 ... opset25    exported again at that opset: torch's translation, onnxscript's optimiser, no onnxruntime
    basic, portable, host  optimised offline by onnxruntime at BASIC, EXTENDED, ALL; host runs well on this CPU only
    fused                  onnxruntime.transformers, head counts read from the graph layer by layer, since pruning makes
                           them differ
    int8-minmax, int8-entropy, int8-percentile, int8-dynamic
                           8-bit integers: static QDQ, its ranges found in three ways; dynamic for MatMuls; weights keep
                           to 7 bits, which is right on any CPU
    int8-...-host          the same with weights of 8 bits, which saturate on x86 CPUs without VNNI
    fp16                   weights and arithmetic in 16-bit floats, inputs and outputs as they are
    ort-portable, ort-host the two in onnxruntime's own format, with the operators that a minimal build must have
    legacy                 onnxruntime-tools 1.7.0, in a process of its own

A new candidate is one more row. Nothing here judges: whether a candidate is right and which one is fastest is found out
by whoever asked for them. Nothing here is heavy either, so that a name can be checked for nothing: what builds a
candidate is imported when it does.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from exporters import host
from foundation.errors import ExportError, first_line

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

    from exporters.quantize import Calibration, Ranges
    from exporters.to_ort import Level

Array = np.ndarray[Any, np.dtype[Any]]
Budget = Literal["rounding", "accuracy"]

LEGACY_SECONDS = 120.0


class NotApplicable(Exception):  # noqa: N818  # an answer, not an error: this model has no such candidate
    """Why this model has no such candidate."""


@dataclass(frozen=True)
class Source:
    """What candidates are made from: the exported file, the program behind it, and batches of the calibration part."""

    onnx: Path
    program: Callable[[], ExportedProgram]
    example: tuple[Tensor, ...]
    calibration: Callable[[], Iterable[Mapping[str, Array]]]
    folder: Path
    free: Sequence[Mapping[int, str]] = ()
    """Per input, the dimensions beside the first that may have any size, and what they are called."""
    disabled: tuple[str, ...] = ()
    """Optimisers of onnxruntime that must not run, since they break this model."""
    exclude: tuple[str, ...] = ()
    """Nodes that reduced precision leaves in float."""
    ranges: dict[Calibration, Ranges] = field(default_factory=dict, compare=False)
    """The activations' ranges, by how they were found: kept from the first candidate that needs them."""


@dataclass(frozen=True)
class Built:
    """How a file was made, in words, and what its maker had to say."""

    technique: str
    notes: tuple[str, ...] = ()


# Writes the candidate to the path, whole or not at all.
Builder = Callable[[Source, Path], Built]


@dataclass(frozen=True)
class CandidateSpec:
    """A row of the table: what a candidate is, whatever the model.

    `budget` says what it may change: no more than float32 rounding, or as much as the accuracy allows. One that is not
    `portable` belongs on CPUs like the one that made it. `bundled`: whether a bundle may hold it beside the file that
    ships. `optimizers`: whether onnxruntime's optimisers make it, so that it is another file without one of them.
    `races`: by default, where int8 is asked for, or only where the recipe names it.
    """

    name: str
    build: Builder
    budget: Budget = "rounding"
    portable: bool = True
    bundled: bool = False
    optimizers: bool = False
    suffix: Literal[".onnx", ".ort"] = ".onnx"
    races: Literal["by default", "with int8", "when named"] = "by default"


@dataclass(frozen=True)
class Made:
    """A candidate as a file. `isa` is the vector extension that it needs, "" for any; `operators` is {} for `.ort`."""

    spec: CandidateSpec
    path: Path
    technique: str
    isa: str
    operators: dict[str, int]
    bytes: int
    notes: tuple[str, ...] = ()


def make(name: str, source: Source) -> Made:
    """Build the candidate called `name` into `source.folder`.

    Raises NotApplicable where this model or this installation has no such candidate, ExportError where it failed.
    """
    if name not in CANDIDATES:
        raise ExportError(f"There is no candidate {name}.", f"There are {', '.join(CANDIDATES)}.")
    spec = CANDIDATES[name]
    path = source.folder / f"model.{name}{spec.suffix}"
    built = spec.build(source, path)
    operators, size = {}, path.stat().st_size
    if spec.suffix == ".onnx":
        from exporters.summary import describe
        from exporters.to_ort import tag_session

        if source.disabled:  # the optimisers that loading runs would break it again
            tag_session(path, source.disabled)
        summary = describe(path)
        operators, size = summary.operators, summary.bytes
    isa = "" if spec.portable else host.isa()
    return Made(spec, path, built.technique, isa, operators, size, built.notes)


# --- How each is built ------------------------------------------------------------------------------------------------


def _at_opset(opset: int) -> Builder:
    def build(source: Source, path: Path) -> Built:
        from exporters.export import to_onnx
        from exporters.summary import describe

        before = describe(source.onnx)
        if not before.opset:
            raise NotApplicable("the exported file has no operator of ONNX's own")
        if before.opset == opset:
            raise NotApplicable(f"the exported file has opset {opset} already")
        to_onnx(
            source.program(),
            path,
            example=source.example,
            opset=opset,
            metadata=before.metadata,
            input_names=[spec.name for spec in before.inputs],
            output_names=[spec.name for spec in before.outputs],
            free=source.free,
        )
        return Built(f"opset {opset}, onnxscript's optimiser")

    return build


def _at_level(level: Level) -> Builder:
    def build(source: Source, path: Path) -> Built:
        from exporters.to_ort import optimize

        optimize(source.onnx, path, level=level, threads=1, disabled=source.disabled)
        return Built(f"onnxruntime {level.upper()}, offline")

    return build


def _fused(source: Source, path: Path) -> Built:
    from exporters.fusions import fuse

    made = fuse(source.onnx, path)
    if not made.fused:
        for part in (path, path.with_name(f"{path.name}.data")):
            part.unlink(missing_ok=True)
        raise NotApplicable("onnxruntime.transformers finds nothing to fuse in this graph")
    words = ", ".join(f"{count} {operator}" for operator, count in made.fused.items())
    return Built(f"onnxruntime.transformers: {words}", made.notes)


def _static(calibration: Calibration, *, bits: int) -> Builder:
    def build(source: Source, path: Path) -> Built:
        from exporters.quantize import calibrate, quantize

        _saturates_nowhere(bits)
        if calibration not in source.ranges:
            source.ranges[calibration] = calibrate(source.onnx, batches=source.calibration(), calibration=calibration)
        ranges = source.ranges[calibration]
        quantize(source.onnx, path, batches=ranges, reduce_range=bits < 8, exclude=source.exclude)
        return Built(f"int8, static QDQ per channel, {calibration}, {bits}-bit weights", _kept_float(source))

    return build


def _dynamic(*, bits: int) -> Builder:
    def build(source: Source, path: Path) -> Built:
        from exporters.quantize import quantize_dynamic

        _saturates_nowhere(bits)
        quantize_dynamic(source.onnx, path, reduce_range=bits < 8, exclude=source.exclude)
        return Built(f"int8, dynamic, {bits}-bit weights", _kept_float(source))

    return build


def _saturates_nowhere(bits: int) -> None:
    """Weights of 7 bits are right on any CPU; those of 8 are wrong on x86 without VNNI."""
    if bits == 8 and not host.has_vnni():
        raise NotApplicable("this CPU has no VNNI, without which products with 8-bit weights saturate")


def _kept_float(source: Source) -> tuple[str, ...]:
    count = len(source.exclude)
    return (f"{count} {'node stays' if count == 1 else 'nodes stay'} in float for accuracy",) if count else ()


def _float16(source: Source, path: Path) -> Built:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    from exporters.atomic import staged
    from exporters.export import ONE_FILE_LIMIT
    from exporters.quiet import quiet
    from exporters.to_ort import load, session_options

    before = onnx.load(source.onnx)
    if not any(tensor.data_type == onnx.TensorProto.FLOAT for tensor in before.graph.initializer):
        raise NotApplicable("it has no weights in float32")
    with quiet("onnxruntime") as said:
        try:
            made = convert_float_to_float16(before, keep_io_types=True, node_block_list=list(source.exclude))
            OnnxModel(made).topological_sort()  # the casts at the inputs come last
        except Exception as error:  # the tool walks whatever graph it is given
            raise ExportError(f"onnxruntime cannot make float16 of {source.onnx.name}: {first_line(error)}") from error
    with staged(path) as folder:
        part = folder / path.name
        if made.ByteSize() > ONE_FILE_LIMIT:
            onnx.save(made, part, save_as_external_data=True, location=f"{path.name}.data")
        else:
            part.write_bytes(made.SerializeToString(deterministic=True))
        load(part, session_options(threads=1))
    return Built("float16, inputs and outputs in float32", (*dict.fromkeys(said), *_kept_float(source)))


def _own_format(level: Level) -> Builder:
    def build(source: Source, path: Path) -> Built:
        from exporters.to_ort import required_operators, to_ort_format

        to_ort_format(source.onnx, path, level=level, threads=1, disabled=source.disabled)
        required_operators(path, path.with_suffix(".required_operators.config"))
        return Built(f"onnxruntime {level.upper()}, .ort format")

    return build


_LEGACY = """
import sys
from onnxruntime_tools import optimizer
made = optimizer.optimize_model(sys.argv[1], model_type="bert", num_heads=0, hidden_size=0)
made.save_model_to_file(sys.argv[2])
"""


def _legacy(source: Source, path: Path) -> Built:
    """The old package has top-level module names that clash with its successor's, so it never enters this process."""
    if importlib.util.find_spec("onnxruntime_tools") is None:
        raise NotApplicable("the extra legacy-tools is not installed")
    part = source.folder / ".legacy.partial.onnx"
    command = [sys.executable, "-W", "ignore", "-c", _LEGACY, str(source.onnx.resolve()), str(part.resolve())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LEGACY_SECONDS, check=False)
        if done.returncode or not part.is_file():
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise ExportError(f"onnxruntime-tools fails: {last}")
        shutil.move(part, path)
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"onnxruntime-tools did not end within {LEGACY_SECONDS:g} s.") from error
    finally:
        part.unlink(missing_ok=True)
    return Built("onnxruntime-tools 1.7.0")


# --- The table --------------------------------------------------------------------------------------------------------


def _opset(number: int, *, by_default: bool = False) -> CandidateSpec:
    return CandidateSpec(f"opset{number}", _at_opset(number), races="by default" if by_default else "when named")


def _int8(name: str, build: Builder, *, portable: bool = True) -> CandidateSpec:
    return CandidateSpec(name, build, budget="accuracy", portable=portable, bundled=True, races="with int8")


_ROWS = (
    CandidateSpec("portable", _at_level("extended"), bundled=True, optimizers=True),
    CandidateSpec("basic", _at_level("basic"), optimizers=True),
    CandidateSpec("host", _at_level("all"), portable=False, bundled=True, optimizers=True),
    _opset(18, by_default=True),
    _opset(19),
    _opset(20),
    _opset(21),
    _opset(22),
    _opset(23, by_default=True),
    _opset(24),
    _opset(25),
    CandidateSpec("fused", _fused),
    # On CPUs without arithmetic in float16 mostly a smaller file: where onnxruntime has no kernel it casts.
    CandidateSpec("fp16", _float16, budget="accuracy", bundled=True, races="when named"),
    CandidateSpec("ort-portable", _own_format("extended"), bundled=True, optimizers=True, suffix=".ort"),
    CandidateSpec("ort-host", _own_format("all"), portable=False, bundled=True, optimizers=True, suffix=".ort"),
    _int8("int8-minmax", _static("minmax", bits=7)),
    _int8("int8-entropy", _static("entropy", bits=7)),
    _int8("int8-percentile", _static("percentile", bits=7)),
    _int8("int8-dynamic", _dynamic(bits=7)),
    _int8("int8-minmax-host", _static("minmax", bits=8), portable=False),
    _int8("int8-entropy-host", _static("entropy", bits=8), portable=False),
    _int8("int8-percentile-host", _static("percentile", bits=8), portable=False),
    _int8("int8-dynamic-host", _dynamic(bits=8), portable=False),
    CandidateSpec("legacy", _legacy),
)

CANDIDATES: Mapping[str, CandidateSpec] = {spec.name: spec for spec in _ROWS}
"""Every candidate by name, the plainest first: of two that are equally fast the earlier one ships."""
