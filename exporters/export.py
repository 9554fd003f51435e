"""A PyTorch model as an ONNX file.

    capture -> translate -> name -> write -> check

The translation is PyTorch's own (`torch.onnx.export(dynamo=True)` with onnxscript's optimiser, which folds BatchNorm
into the convolution before it). A BatchNorm that has no convolution before it, as in a DenseNet, stays one: onnxruntime
runs it as it is, or as a depthwise convolution at ORT_ENABLE_ALL.
"""

from __future__ import annotations

import functools
import importlib
import io
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from exporters.atomic import staged
from exporters.quiet import quiet
from exporters.summary import OnnxSummary, describe
from exporters.translatable import translatable
from foundation.errors import ExportError, first_line

if TYPE_CHECKING:  # half a second to import, so only where a model is translated
    import onnx_ir as ir

# A protobuf message ends at 2 GiB; what is left covers the graph around the weights.
ONE_FILE_LIMIT = 2**31 - 2**26
BATCH = "batch"


class OnnxFile(BaseModel):
    """An exported model: where it lies, what it holds, how long it took, and what the exporter had to say."""

    model_config = ConfigDict(frozen=True)

    path: Path
    summary: OnnxSummary
    seconds: float
    warnings: tuple[str, ...]


def to_onnx(
    program: ExportedProgram | nn.Module,
    path: Path,
    *,
    example: tuple[Tensor, ...],
    opset: int,
    metadata: Mapping[str, str],
    input_names: Sequence[str] = ("input",),
    output_names: Sequence[str] | None = None,
    dynamic_batch: bool = True,
    free: Sequence[Mapping[int, str]] = (),
    one_file_limit: int = ONE_FILE_LIMIT,
) -> OnnxFile:
    """Write `program` to `path` as ONNX, whole or not at all, and check it with shape inference.

    A module is captured first with `example`, one tensor per input, batch first; with `dynamic_batch` the first
    dimension of every input is free. An exported program brings its own shapes, which must agree with `dynamic_batch`.
    `free`: per input, its other dimensions that may have any size, and what they are called. Outputs are named
    "output", or "output_0", "output_1", ... when there are several. `metadata` is kept in the file. Weights of more
    than `one_file_limit` bytes go to `<path>.data` beside it.

    Raises ExportError when the model is in training mode, cannot be captured or translated, has other inputs or outputs
    than named, or the file cannot be written or does not pass the check. Nothing is printed: warnings are returned.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    start = time.perf_counter()
    path = Path(path)
    # torch.export prints the code that it could not capture to stderr; its exception says the same.
    with quiet("torch", "onnxscript", "onnx_ir") as said, redirect_stderr(io.StringIO()):
        exported = program if isinstance(program, ExportedProgram) else _capture(program, example, dynamic_batch, free)
        if (name := _half(exported)) is not None:
            raise ExportError(
                f"'{name}' is in bfloat16, for which onnxruntime has no CPU kernels.", "Export model.float()."
            )
        model = _translate(exported, opset)
    _name(model, input_names, output_names)
    _name_sizes(model, dynamic_batch, free)
    # Node metadata holds the author's source lines and folders, which are nobody else's business.
    ClearMetadataAndDocStringPass()(model)
    model.metadata_props.update(metadata)
    summary = _write(model, path, one_file_limit)
    return OnnxFile(
        path=path, summary=summary, seconds=time.perf_counter() - start, warnings=tuple(dict.fromkeys(said))
    )


def _capture(
    module: nn.Module, example: tuple[Tensor, ...], dynamic_batch: bool, free: Sequence[Mapping[int, str]]
) -> ExportedProgram:
    if module.training:
        raise ExportError("The model is in training mode.", "Call model.eval() first.")
    shapes: tuple[dict[int, Any] | None, ...] | None = None
    if dynamic_batch:
        batch = Dim(BATCH, min=1)
        # torch.export takes a dimension of 1 for a constant, so the example needs at least two samples.
        example = tuple(torch.cat([x, x]) if x.dim() and len(x) == 1 else x for x in example)
        shapes = tuple(
            {0: batch, **dict.fromkeys(free[number] if free else (), Dim.DYNAMIC)} if x.dim() else None
            for number, x in enumerate(example)
        )
    try:
        return torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export lets errors of any kind through
        hint = "The batch may be fixed in the code: pass dynamic_batch=False." if BATCH in str(error) else ""
        raise ExportError(f"torch.export cannot capture the model: {first_line(error)}", hint) from error


def _translate(program: ExportedProgram, opset: int) -> ir.Model:
    try:
        with _translations_read_once():
            made = torch.onnx.export(translatable(program), dynamo=True, opset_version=opset, verbose=False)
    except Exception as error:  # translation runs third-party code for every operator
        raise ExportError(*_explain(_root(error))) from error
    assert made is not None
    model: ir.Model = made.model
    if model.opset_imports.get("") != opset:
        raise ExportError(f"torch.onnx cannot write opset {opset} for this model.", "Use opset 18 or above.")
    return model


@contextmanager
def _translations_read_once() -> Iterator[None]:
    """For every export torch.onnx asks onnxscript for its 500 translations, which parses the source of each again: half
    the time that a small model takes. They never change, so they are asked for once. Another version of torch or
    onnxscript may do this elsewhere; then nothing is kept.
    """
    try:
        apis = importlib.import_module("torch.onnx._internal.exporter._registration").onnxscript_apis
        asked = apis.get_torchlib_ops
    except (ImportError, AttributeError):
        yield
        return
    apis.get_torchlib_ops = _kept(asked)
    try:
        yield
    finally:
        apis.get_torchlib_ops = asked


@functools.cache
def _kept(asked: Callable[[], Sequence[Any]]) -> Callable[[], Sequence[Any]]:
    return functools.cache(asked)


def _explain(error: BaseException) -> tuple[str, str]:
    """What stopped a translation, and what to do about it."""
    text = first_line(error)
    missing = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)', overload='([^']+)'\)>", text)
    if missing is None:
        return f"torch.onnx cannot translate the model: {text}", "Rewrite that part of the model, or report the model."
    kind = " of complex numbers" if "complex-valued" in text else ""
    return (
        f"torch.onnx has no translation of {missing[1]}{kind}.",
        "Write it in the model with other operators, or move it out of the model, before or behind it.",
    )


def _half(program: ExportedProgram) -> str | None:
    """The name of a tensor in bfloat16, in which onnxruntime has next to no kernels."""
    return next((name for name, value in program.state_dict.items() if value.dtype == torch.bfloat16), None)


def _root(error: BaseException) -> BaseException:
    """The error that started the chain: the outer ones only say how far the exporter came."""
    while (cause := error.__cause__) is not None:
        error = cause
    return error


def _name(model: ir.Model, input_names: Sequence[str], output_names: Sequence[str] | None) -> None:
    graph = model.graph
    if output_names is None:
        count = len(graph.outputs)
        output_names = ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
    for kind, values, names in (("input", graph.inputs, input_names), ("output", graph.outputs, output_names)):
        if len(values) != len(names) or len(set(names)) != len(names):
            found = ", ".join(str(value.name) for value in values)
            raise ExportError(
                f"The model has {len(values)} {kind}s ({found}), the given names are {', '.join(names)}.",
                f"Pass {kind}_names with {len(values)} distinct names.",
            )
    wanted = dict(zip([*graph.inputs, *graph.outputs], [*input_names, *output_names], strict=True))
    taken = set(wanted.values())
    for value in _values(graph):
        if value not in wanted and value.name in taken:
            value.name = f"{value.name}_inner"
    # In two steps, since a name may be on its way from one value to another.
    for index, value in enumerate(wanted):
        value.name = f"_renamed_{index}"
    for value, name in wanted.items():
        value.name = name


def _values(graph: ir.Graph) -> list[ir.Value]:
    made = [value for node in graph.all_nodes() for value in node.outputs]
    return [*graph.initializers.values(), *made]


def _name_sizes(model: ir.Model, dynamic_batch: bool, free: Sequence[Mapping[int, str]]) -> None:
    """Call the free first dimension "batch" everywhere, and other free ones by their names, whatever symbols
    torch.export gave them.
    """
    import onnx_ir as ir

    symbols: dict[str, str] = {}
    for number, value in enumerate(model.graph.inputs):
        if value.shape is None or not len(value.shape):
            continue
        size = value.shape[0]
        if isinstance(size, ir.SymbolicDim) != dynamic_batch:
            given, advice = ("fixed", "free") if dynamic_batch else ("free", "fixed")
            raise ExportError(
                f"The batch of input {value.name} is {given} ({size}).",
                f"Export the program with a {advice} batch, or pass dynamic_batch={not dynamic_batch}.",
            )
        named = {**({0: BATCH} if dynamic_batch else {}), **(free[number] if free else {})}
        for place, name in named.items():
            size = value.shape[place]
            if not isinstance(size, ir.SymbolicDim):
                raise ExportError(
                    f"Dimension {place} of input {value.name} ({name}) is fixed at {size} by the model's own code.",
                    "Leave it out of the free dimensions.",
                )
            symbols.setdefault(str(size.value), name)
    if not symbols:
        return
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, symbols))})\b")
    for value in [*model.graph.inputs, *_values(model.graph)]:
        if value.shape is not None:
            value.shape = ir.Shape(
                pattern.sub(lambda found: symbols[found[0]], str(dim.value))
                if isinstance(dim, ir.SymbolicDim) and dim.value
                else dim
                for dim in value.shape
            )


def _write(model: ir.Model, path: Path, one_file_limit: int) -> OnnxSummary:
    import onnx_ir as ir

    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    data_name = f"{path.name}.data"
    with staged(path) as folder:
        part = folder / path.name
        if weights > one_file_limit:
            ir.save(model, part, external_data=data_name)
        else:
            ir.save(model, part)
        try:
            onnx.checker.check_model(os.fspath(part), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(
                f"onnx.checker refuses the exported model: {first_line(error)}",
                "Report the model: what torch.onnx wrote does not hold together.",
            ) from error
    if weights <= one_file_limit:
        (path.parent / data_name).unlink(missing_ok=True)
    return describe(path)
