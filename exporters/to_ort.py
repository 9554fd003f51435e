"""The graph optimisations of onnxruntime, done once and kept in a file.

"basic" leaves standard ONNX; "extended" adds fused operators that any onnxruntime runs on any CPU; "all" adds the
blocked memory layout of this host's CPU, so the file is fast, or runs at all, only where it was made.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import onnx
import onnxruntime as ort
from onnxruntime.tools.ort_format_model.utils import create_config_from_models
from pydantic import BaseModel, ConfigDict

from exporters import host
from exporters.atomic import staged
from exporters.quiet import quiet
from exporters.summary import OnnxSummary, describe, domains, read_graph
from foundation.errors import ExportError, first_line
from foundation.links import plain_files

Level = Literal["basic", "extended", "all"]

# onnxruntime's session configuration key, names separated by ";" (onnxruntime_session_options_config_keys.h).
DISABLE = "optimization.disable_specified_optimizers"

# Metadata of a file that is to be loaded without these optimisers; names as above.
DISABLED = "onnxruntime.disabled_optimizers"

LEVELS: dict[Level, ort.GraphOptimizationLevel] = {
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


class OptimizedFile(BaseModel):
    """An optimised model: where it lies, what was done to it by what, and where it may run.

    `portable` is False for a file that is fast, or runs at all, only on CPUs with the vector extension `isa`.
    """

    model_config = ConfigDict(frozen=True)

    path: Path
    level: Level
    portable: bool
    isa: str
    onnxruntime: str
    operators_before: dict[str, int]
    operators_after: dict[str, int]
    summary: OnnxSummary
    seconds: float


class OrtFormatFile(BaseModel):
    """A model in onnxruntime's own file format: where it lies, at what level it was optimised, where it may run."""

    model_config = ConfigDict(frozen=True)

    path: Path
    level: Level
    portable: bool
    isa: str
    onnxruntime: str
    bytes: int
    seconds: float


def optimize(src: Path, dst: Path, *, level: Level, threads: int, disabled: Sequence[str] = ()) -> OptimizedFile:
    """Write the ONNX model `src` to `dst` as onnxruntime optimises it for the CPU, whole or not at all.

    The optimisers named in `disabled` do not run. The source's metadata is kept, and `onnxruntime.version`,
    `onnxruntime.level` and, when not portable, `onnxruntime.isa` are added. External weights stay external, in
    `<dst>.data`. The written file is loaded once to see that it can be.

    Raises ExportError when `src` is no ONNX model or onnxruntime cannot load or write it.
    """
    start = time.perf_counter()
    src, dst = Path(src), Path(dst)
    before = describe(src)
    portable = level != "all"
    tags = {"onnxruntime.version": ort.__version__, "onnxruntime.level": level}
    if not portable:
        tags["onnxruntime.isa"] = host.isa()
    with staged(dst) as folder:
        part = folder / dst.name
        options = session_options(threads, disabled)
        options.graph_optimization_level = LEVELS[level]
        options.optimized_model_filepath = str(part)
        if before.external_files:
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", f"{dst.name}.data"
            )
        load(src, options)
        _tag(part, {**before.metadata, **tags})
        load(part, session_options(threads, disabled))
    if not before.external_files:
        (dst.parent / f"{dst.name}.data").unlink(missing_ok=True)
    after = describe(dst)
    return OptimizedFile(
        path=dst,
        level=level,
        portable=portable,
        isa=host.isa(),
        onnxruntime=ort.__version__,
        operators_before=before.operators,
        operators_after=after.operators,
        summary=after,
        seconds=time.perf_counter() - start,
    )


def to_ort_format(src: Path, dst: Path, *, level: Level, threads: int, disabled: Sequence[str] = ()) -> OrtFormatFile:
    """Write the ONNX model `src` to `dst`, whose name ends in .ort, for builds of onnxruntime without an ONNX parser.

    A portable `.ort` file can be much slower than the ONNX file that it came from (29 % were measured on a ResNet-50),
    since onnxruntime no longer changes the memory layout when it loads one: race it before shipping it. Metadata is
    kept. Raises ExportError as `optimize` does, or when `dst` is not called `.ort`.
    """
    start = time.perf_counter()
    src, dst = Path(src), Path(dst)
    if dst.suffix != ".ort":
        raise ExportError(f"{dst.name} does not end in .ort, by which onnxruntime tells the format.", "Rename it.")
    describe(src)
    with staged(dst) as folder:
        part = folder / dst.name
        options = session_options(threads, disabled)
        options.graph_optimization_level = LEVELS[level]
        options.optimized_model_filepath = str(part)
        options.add_session_config_entry("session.save_model_format", "ORT")
        load(src, options)
        load(part, session_options(threads, disabled))
    return OrtFormatFile(
        path=dst,
        level=level,
        portable=level != "all",
        isa=host.isa(),
        onnxruntime=ort.__version__,
        bytes=dst.stat().st_size,
        seconds=time.perf_counter() - start,
    )


def required_operators(model: Path, path: Path) -> None:
    """Write to `path` which operators and types the `.ort` file `model` needs, for a custom build of onnxruntime.

    The build's option is `--include_ops_by_config PATH --enable_reduced_operator_type_support`. Raises ExportError when
    `model` is not in the `.ort` format.
    """
    with staged(path) as folder, quiet("ort_format_model"):
        part = folder / path.name
        try:
            create_config_from_models([model], part, enable_type_reduction=True)
        except (RuntimeError, ValueError) as error:
            raise ExportError(
                f"{model.name} cannot be read as .ort: {first_line(error)}", "Give a .ort file."
            ) from error
        lines = part.read_text(encoding="utf-8").replace(f"{model}", model.name)  # no folder of this machine
        part.write_text(lines, encoding="utf-8")


def session_config(disabled: Sequence[str]) -> dict[str, str]:
    """The session configuration entries under which the optimisers named in `disabled` do not run."""
    return {DISABLE: ";".join(disabled)} if disabled else {}


def tag_session(path: Path, disabled: Sequence[str]) -> None:
    """Write into the ONNX file at `path` without which optimisers it is to be loaded; `session_of` reads it."""
    model = read_graph(path)
    known = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, {**known, DISABLED: ";".join(disabled)})
    path.write_bytes(model.SerializeToString(deterministic=True))


def session_of(path: Path) -> dict[str, str]:
    """The session configuration entries that the file at `path` asks for, if it is ONNX and asks for any.

    Nothing else is taken over from a file that may come from anywhere. What cannot be read asks for nothing: whoever
    loads it will say why.
    """
    try:
        disabled = describe(Path(path)).metadata.get(DISABLED, "") if Path(path).suffix == ".onnx" else ""
    except ExportError:
        return {}
    return session_config([name for name in disabled.split(";") if name])


def session_options(threads: int, disabled: Sequence[str] = ()) -> ort.SessionOptions:
    """Options for a quiet session with `threads` threads inside an operator and one operator at a time."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only; they arrive as exceptions too
    for key, value in session_config(disabled).items():
        options.add_session_config_entry(key, value)
    return options


def load(path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    """A CPU session of the model at `path`. Raises ExportError with onnxruntime's reason when it cannot load it."""
    try:
        with plain_files(path) as plain:
            return ort.InferenceSession(plain, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exception classes share no base of their own
        raise ExportError(
            f"onnxruntime {ort.__version__} cannot load {path.name}: {first_line(error)}",
            "Export with a lower opset, or install a newer onnxruntime.",
        ) from error


def _tag(path: Path, metadata: dict[str, str]) -> None:
    """Set the file's metadata, and drop the operator domains that onnxruntime declares without using them.

    The nodes that onnxruntime put in are named anew, in their order: it names them in the order of its memory, so that
    two runs would not give the same bytes.
    """
    model = read_graph(path)
    for number, node in enumerate(model.graph.node):
        if "_token_" in node.name or node.op_type.startswith("Reorder"):
            node.name = f"{node.op_type}_{number}"
    used = domains(model) | {""}
    kept = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    onnx.helper.set_model_props(model, metadata)
    path.write_bytes(model.SerializeToString(deterministic=True))
