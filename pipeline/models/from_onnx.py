"""Models from ONNX files: `onnx:PATH`. The weights are those of the file, and are kept.

What was read is run against onnxruntime on the file before anything else is done with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from foundation.errors import ModelError, ValidationError, first_line
from foundation.files import sha256
from foundation.links import beside
from pipeline.models.onnx_reading.graph import Graph, UnreadableError, read_file
from pipeline.models.onnx_reading.module import OnnxNet, traced
from pipeline.models.onnx_reading.node import NotReadError
from pipeline.models.onnx_reading.patterns import join
from pipeline.models.onnx_reading.weights import channels_first, free_batch, lay_out, untie
from pipeline.models.source import DEFAULT_SIZE, Input, Origin, Shape
from validators.domains import BINARY, integer_domains
from validators.runners import Array, InputSpec, OrtRunner
from validators.trials import suited

TOLERANCE = 1e-4
"""Of the largest number of an output: the most by which what was read may differ from the file in onnxruntime."""
BATCHES = (1, 3)
TOKENS = 16
"""Length of a sentence or series where the file leaves it free and none is given."""

_FREE = "Export it with a free batch: torch.onnx.export(..., dynamic_shapes=...)."
_TURNED = " (images go in as channels x height x width, which the file takes with the channels last)"
_ELSE = "Give the PyTorch model that it was made from (file.py:callable)."


def origin(name: str, input_size: Shape | None) -> Origin:
    """Describe the model in the ONNX file `name`. Raises ModelError where it cannot be read, or computes otherwise."""
    path = Path(name).expanduser()
    if not path.is_file():
        raise ModelError(f"onnx:{name}: no such file.", "Give the path of an .onnx file.")
    graph = _graph(name, path)
    fixed = [one.shape[0] for one in graph.inputs if isinstance(one.shape[0], int)]
    if any(size != 1 for size in fixed):
        raise ModelError(
            f"onnx:{name} fixes its batch to {next(size for size in fixed if size != 1)}.",
            _FREE,
        )
    try:
        runner = OrtRunner(path, threads=torch.get_num_threads(), optimize=False)
    except ValidationError as error:
        raise ModelError(f"onnx:{name}: {error.message}", error.hint) from error
    except ValueError as error:  # names and sizes that are no text
        raise ModelError(f"onnx:{name} cannot be read: {first_line(error)}.", _ELSE) from error
    inputs = _inputs(name, path, graph, runner, input_size)
    if fixed:
        graph, worst = _freed(name, graph, runner, inputs)
    else:
        worst = _compared(name, graph, runner, inputs)
    files = [path, *(path.parent / weights for weights in beside(path))]
    batches = " and ".join(map(str, BATCHES))
    return Origin(
        lambda: OnnxNet(graph),
        lambda _model: inputs,
        f"onnx {onnx.__version__} {' '.join(sha256(file) for file in files)}",
        initial=False,
        outputs=tuple(graph.outputs),
        note=f"those of {path.name}{_TURNED if any(one.turned for one in graph.inputs) else ''}; the net read from it "
        f"gives what onnxruntime gives on the file, to {worst:.1g} of the outputs' scale, on random inputs at batch "
        f"{batches}",
    )


def _graph(name: str, path: Path) -> Graph:
    try:
        graph = read_file(path)
        channels_first(graph)
        lay_out(graph)
        join(graph)
        untie(graph)
    except UnreadableError as error:
        raise ModelError(f"onnx:{name} {error}.", error.hint) from error
    except NotReadError as error:
        raise ModelError(f"onnx:{name} cannot be read: {error}.", _ELSE) from error
    except (OSError, ValueError, DecodeError, onnx.checker.ValidationError) as error:
        raise ModelError(
            f"onnx:{name} cannot be read: {first_line(error)}.", "Is it a whole ONNX file, its weights beside it?"
        ) from error
    half = next((key for key, value in graph.constants.items() if value.dtype in (torch.float16, torch.bfloat16)), None)
    if half is not None:
        raise ModelError(
            f"onnx:{name} is in half precision (first tensor {half}).",
            "Give the float32 file: training, proofs and the runtime's CPU kernels are float32.",
        )
    if not graph.inputs or not graph.outputs:
        raise ModelError(f"onnx:{name} has no {'outputs' if graph.inputs else 'inputs'}.", _ELSE)
    for one in graph.inputs:
        if not one.shape:
            raise ModelError(f"onnx:{name}: its input {one.name} is one number, without a batch.", _ELSE)
        if one.dtype.is_floating_point and one.dtype != torch.float32:
            kind = str(one.dtype).removeprefix("torch.")
            raise ModelError(f"onnx:{name}: its input {one.name} is {kind}.", "Give a file that takes float32.")
    return graph


def _inputs(name: str, path: Path, graph: Graph, runner: OrtRunner, input_size: Shape | None) -> tuple[Input, ...]:
    """What the file takes: sizes it leaves free are those that are given, or usual ones that it runs with."""
    wanted: dict[str, tuple[int, ...]] = {}
    specs = [
        one.model_copy(update={"shape": tuple(one.shape[axis] for axis in (0, 3, 1, 2))}) if held.turned else one
        for held, one in zip(graph.inputs, runner.inputs, strict=True)
    ]
    fitting = [one for one in specs if input_size is not None and len(one.shape) == len(input_size) + 1]
    if input_size is not None and not fitting and len(input_size) >= 3:
        raise ModelError(
            f"onnx:{name} takes {_listed(specs)}, not input of shape {_words(input_size)}.",
            "Set data.input_size to one that it takes.",
        )
    for one in specs:
        usual = _usual(one.shape[1:], one.dtype)
        given = input_size if one in fitting and input_size is not None else usual
        for size, here in zip(one.shape[1:], given, strict=True):
            if isinstance(size, str):
                wanted.setdefault(size, (here,))
            elif one in fitting and size != here:
                raise ModelError(
                    f"onnx:{name} takes {_listed(specs)}, not input of shape {_words(given)}.",
                    f"Set data.input_size to what it takes, such as {_words(one.shape[1:])}.",
                )
    try:
        domains = integer_domains(path)
        try:
            sizes, ranges = suited(runner, graph=path, batch=1, sizes=wanted, ranges={})
        except ValidationError:
            if input_size is not None:
                raise
            sizes, ranges = suited(runner, graph=path, batch=1, sizes={}, ranges={})
    except ValidationError as error:
        raise ModelError(f"onnx:{name}: {error.message}", "Set data.input_size to one that it takes.") from error
    found = []
    for held, spec in zip(graph.inputs, specs, strict=True):
        shape = tuple(size if isinstance(size, int) else sizes[size] for size in spec.shape[1:])
        domain = domains.get(held.name)
        if held.dtype.is_floating_point:
            found.append(Input(held.name, shape))
        elif domain is not None and domain.spans == (BINARY,) and domain.keeps in (1, "either"):
            found.append(Input(held.name, shape, "mask"))
        else:
            found.append(Input(held.name, shape, "tokens", max(1, ranges.get(held.name, (0, 2))[1])))
    return tuple(found)


def _usual(shape: tuple[int | str, ...], dtype: str) -> tuple[int, ...]:
    """Sizes for those of one sample that a file leaves free."""
    free = DEFAULT_SIZE if len(shape) == 3 and dtype == "float32" else (TOKENS,) * len(shape)
    return tuple(size if isinstance(size, int) else here for size, here in zip(shape, free, strict=True))


def _freed(name: str, graph: Graph, runner: OrtRunner, inputs: tuple[Input, ...]) -> tuple[Graph, float]:
    """A file of batch 1 with a free batch, and how far it is from the file run once for each sample."""
    sample = tuple(one.sample(1, torch.Generator().manual_seed(0)) for one in inputs)
    try:
        shapes = traced(OnnxNet(graph).eval(), sample)
    except NotReadError as error:
        raise ModelError(f"onnx:{name} cannot be read: {error}.", _ELSE) from error
    freed = free_batch(graph, shapes, every=False)
    try:
        return freed, _compared(name, freed, runner, inputs, fixed_batch=True)
    except ModelError:
        freed = free_batch(graph, shapes, every=True)
        return freed, _compared(name, freed, runner, inputs, fixed_batch=True)


def _compared(
    name: str, graph: Graph, runner: OrtRunner, inputs: tuple[Input, ...], fixed_batch: bool = False
) -> float:
    """The largest difference between what was read and the file, over the scale of the output.

    A file of batch 1 is run once for each sample. Raises ModelError where the two differ by more than `TOLERANCE`.
    """
    net = OnnxNet(graph).eval()
    worst = 0.0
    for batch in BATCHES:
        generator = torch.Generator().manual_seed(batch)
        sample = tuple(one.sample(batch, generator) for one in inputs)
        feed = {
            one.name: (x.permute(0, 2, 3, 1).contiguous() if one.turned else x).to(one.dtype).numpy()
            for one, x in zip(graph.inputs, sample, strict=True)
        }
        try:
            if fixed_batch:
                single = [runner.infer({key: value[at : at + 1] for key, value in feed.items()}) for at in range(batch)]
                expected = {key: np.concatenate([one[key] for one in single]) for key in graph.outputs}
            else:
                expected = runner.infer(feed)
        except (ValidationError, ValueError) as error:
            raise ModelError(
                f"onnx:{name}: onnxruntime cannot run the file at batch {batch}: {first_line(error)}.",
                _FREE if batch > 1 else "Does it run elsewhere? Set data.input_size to one that it takes.",
            ) from error
        try:
            traced(net, sample)
            with torch.no_grad():
                made = net(*sample)
        except NotReadError as error:
            if fixed_batch and batch > 1:
                raise ModelError(f"onnx:{name} fixes its batch to 1 ({error}).", _FREE) from error
            raise ModelError(f"onnx:{name} cannot be read: {error}.", _ELSE) from error
        answers = made if isinstance(made, tuple) else (made,)
        for key, answer in zip(graph.outputs, answers, strict=True):
            off = _difference(expected[key], answer.detach().numpy())
            if not off <= TOLERANCE:
                if fixed_batch and batch > 1:
                    raise ModelError(f"onnx:{name} fixes its batch to 1.", _FREE)
                raise ModelError(
                    f"onnx:{name}: read as torch operators, {key} differs from onnxruntime's by {off:.2g} of its scale "
                    f"at batch {batch}; {TOLERANCE:g} is allowed.",
                    _ELSE,
                )
            worst = max(worst, off)
    return worst


def _difference(expected: Array, found: Array) -> float:
    """The largest difference over the largest expected number; infinite where shapes or holes differ."""
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return math.inf
    if expected.dtype.kind != "f":
        return 0.0 if np.array_equal(expected, found) else math.inf
    finite = np.isfinite(expected)
    if not np.array_equal(expected[~finite], found[~finite], equal_nan=True):
        return math.inf
    if not finite.any():
        return 0.0
    error = np.abs(expected[finite].astype(np.float64) - found[finite].astype(np.float64)).max()
    scale = float(np.abs(expected[finite]).max())
    return float(error / scale) if scale else float(error)


def _listed(specs: Sequence[InputSpec]) -> str:
    return ", ".join(f"{one.name} {_words(one.shape[1:])}" for one in specs)


def _words(shape: tuple[int | str, ...]) -> str:
    return "x".join(map(str, shape))
