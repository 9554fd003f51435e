"""What one model can be shipped as: a table of small functions, each of which turns the exported model into one file.

    opset18 ... opset25    exported again at that opset: torch's translation, onnxscript's optimiser, no onnxruntime
    basic, portable, host  optimised offline by onnxruntime at BASIC, EXTENDED, ALL; host runs well on this CPU only
    fused                  onnxruntime.transformers, head counts read from the graph layer by layer, since pruning makes
                           them differ
    int8-minmax, int8-entropy, int8-percentile, int8-dynamic
                           8-bit integers: static QDQ, its ranges found in three ways; dynamic for MatMuls
    ort-portable, ort-host the two in onnxruntime's own format, with the operators that a minimal build must have
    legacy                 onnxruntime-tools 1.7.0, in a process of its own

Nothing here judges: whether a candidate is right and which one is fastest is found out by whoever asked for them.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.export import ExportedProgram

from exporters import host
from exporters.export import to_onnx
from exporters.fusions import fuse
from exporters.quantize import Calibration, quantize, quantize_dynamic
from exporters.summary import describe
from exporters.to_ort import Level, optimize, required_operators, tag_session, to_ort_format
from foundation.errors import ExportError

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
    disabled: tuple[str, ...] = ()
    """Optimisers of onnxruntime that must not run, since they break this model."""
    exclude: tuple[str, ...] = ()
    """Nodes that int8 leaves in float."""


class Made(BaseModel):
    """One candidate as a file.

    `budget` says what it may change: no more than float32 rounding, or as much as the accuracy allows. A file that is
    not `portable` belongs on CPUs with the vector extension `isa`. `operators` is empty for the `.ort` format.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    path: Path
    technique: str
    budget: Budget
    portable: bool
    isa: str
    operators: dict[str, int]
    bytes: int
    notes: tuple[str, ...] = ()


Builder = Callable[[str, Source], Made]


def make(name: str, source: Source) -> Made:
    """Build the candidate called `name` into `source.folder`.

    Raises NotApplicable where this model or this installation has no such candidate, ExportError where it failed.
    """
    if name not in CANDIDATES:
        raise ExportError(f"There is no candidate {name}.", f"There are {', '.join(CANDIDATES)}.")
    made = CANDIDATES[name](name, source)
    if source.disabled and made.path.suffix == ".onnx":  # the optimisers that loading runs would break it again
        tag_session(made.path, source.disabled)
        made = made.model_copy(update={"bytes": describe(made.path).bytes})
    return made


def _at_opset(opset: int) -> Builder:
    def build(name: str, source: Source) -> Made:
        before = describe(source.onnx)
        if before.opset == opset:
            raise NotApplicable(f"the exported file has opset {opset} already")
        path = source.folder / f"model.{name}.onnx"
        to_onnx(
            source.program(),
            path,
            example=source.example,
            opset=opset,
            metadata=before.metadata,
            input_names=[spec.name for spec in before.inputs],
            output_names=[spec.name for spec in before.outputs],
        )
        return _onnx(name, path, f"opset {opset}, onnxscript's optimiser", "rounding")

    return build


def _at_level(level: Level) -> Builder:
    def build(name: str, source: Source) -> Made:
        path = source.folder / f"model.{name}.onnx"
        made = optimize(source.onnx, path, level=level, threads=1, disabled=source.disabled)
        words = f"onnxruntime {level.upper()}, offline"
        return _onnx(name, path, words, "rounding", portable=made.portable)

    return build


def _fused(name: str, source: Source) -> Made:
    path = source.folder / f"model.{name}.onnx"
    made = fuse(source.onnx, path)
    if not made.fused:
        for part in (path, path.with_name(f"{path.name}.data")):
            part.unlink(missing_ok=True)
        raise NotApplicable("onnxruntime.transformers finds nothing to fuse in this graph")
    words = ", ".join(f"{count} {operator}" for operator, count in made.fused.items())
    return _onnx(name, path, f"onnxruntime.transformers: {words}", "rounding", notes=made.notes)


def _static(calibration: Calibration) -> Builder:
    def build(name: str, source: Source) -> Made:
        path = source.folder / f"model.{name}.onnx"
        made = quantize(
            source.onnx, path, batches=source.calibration(), calibration=calibration, exclude=source.exclude
        )
        words = f"int8, static QDQ per channel, {calibration}, {'7' if made.reduce_range else '8'}-bit weights"
        # Seven-bit weights saturate nowhere; eight-bit ones do on x86 CPUs without VNNI.
        return _onnx(name, path, words, "accuracy", portable=made.reduce_range, notes=_kept_float(source))

    return build


def _dynamic(name: str, source: Source) -> Made:
    path = source.folder / f"model.{name}.onnx"
    made = quantize_dynamic(source.onnx, path, exclude=source.exclude)
    words = f"int8, dynamic, {'7' if made.reduce_range else '8'}-bit weights"
    return _onnx(name, path, words, "accuracy", portable=made.reduce_range, notes=_kept_float(source))


def _kept_float(source: Source) -> tuple[str, ...]:
    count = len(source.exclude)
    return (f"{count} {'node stays' if count == 1 else 'nodes stay'} in float for accuracy",) if count else ()


def _own_format(level: Level) -> Builder:
    def build(name: str, source: Source) -> Made:
        path = source.folder / f"model.{name}.ort"
        made = to_ort_format(source.onnx, path, level=level, threads=1, disabled=source.disabled)
        required_operators(path, path.with_suffix(".required_operators.config"))
        return Made(
            name=name,
            path=path,
            technique=f"onnxruntime {level.upper()}, .ort format",
            budget="rounding",
            portable=made.portable,
            isa="" if made.portable else made.isa,
            operators={},
            bytes=made.bytes,
        )

    return build


_LEGACY = """
import sys
from onnxruntime_tools import optimizer
made = optimizer.optimize_model(sys.argv[1], model_type="bert", num_heads=0, hidden_size=0)
made.save_model_to_file(sys.argv[2])
"""


def _legacy(name: str, source: Source) -> Made:
    """The old package has top-level module names that clash with its successor's, so it never enters this process."""
    if importlib.util.find_spec("onnxruntime_tools") is None:
        raise NotApplicable("the extra legacy-tools is not installed")
    path = source.folder / f"model.{name}.onnx"
    part = source.folder / f".{name}.partial.onnx"
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
    return _onnx(name, path, "onnxruntime-tools 1.7.0", "rounding")


def _onnx(
    name: str, path: Path, technique: str, budget: Budget, *, portable: bool = True, notes: Sequence[str] = ()
) -> Made:
    summary = describe(path)
    return Made(
        name=name,
        path=path,
        technique=technique,
        budget=budget,
        portable=portable,
        isa="" if portable else host.isa(),
        operators=summary.operators,
        bytes=summary.bytes,
        notes=tuple(notes),
    )


CANDIDATES: Mapping[str, Builder] = {
    "portable": _at_level("extended"),
    "basic": _at_level("basic"),
    "host": _at_level("all"),
    **{f"opset{number}": _at_opset(number) for number in range(18, 26)},
    "fused": _fused,
    "ort-portable": _own_format("extended"),
    "ort-host": _own_format("all"),
    "int8-minmax": _static("minmax"),
    "int8-entropy": _static("entropy"),
    "int8-percentile": _static("percentile"),
    "int8-dynamic": _dynamic,
    "legacy": _legacy,
}
"""Every candidate by name, the plainest first: of two that are equally fast the earlier one ships."""
