"""A module as a flat graph of ATen operations, every constant in the open: `torch.export` with a dynamic batch.

The training IR (no decompositions) is kept: it is the smallest graph, and ONNX export takes it as it is.
"""

from __future__ import annotations

import inspect
import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from foundation.editor import ProgramError, ShapeError, writes
from foundation.errors import CaptureError
from foundation.files import TENSOR_NAME, memory_of
from pipeline.channels.operators.strict import BUGS, strict
from pipeline.channels.program.execute import run_program
from pipeline.channels.program.written import without_writes_through_views
from pipeline.channels.program.zeros import masked

# An odd prime, so that no size of the model is taken for the batch when a view merges or splits dimensions.
EXAMPLE_BATCH = 5


@dataclass(frozen=True)
class Captured:
    """An exported program with what the analysis needs beside it.

    `program`: graph and signature. `state`: parameter and buffer values by their original names (the program's own, or
    folded ones). `example`: the inputs it was captured with (batch `EXAMPLE_BATCH` where the batch is dynamic).
    `dynamic_batch`: False where the model's own code fixes the batch.
    """

    program: ExportedProgram
    example: tuple[Any, ...]
    state: Mapping[str, Tensor]
    dynamic_batch: bool = True

    @property
    def targets(self) -> dict[str, str]:
        """Name of a placeholder -> name of the parameter, buffer or constant that it stands for; no inputs."""
        specs = self.program.graph_signature.input_specs
        return {spec.arg.name: spec.target for spec in specs if spec.target is not None}

    def of_batch(self, size: Any) -> bool:
        """Whether a size of the graph is symbolic and grows with the batch, not with another free dimension alone."""
        if isinstance(size, int) or not self.dynamic_batch:
            return False
        given = set(self.program.graph_signature.user_inputs)
        firsts = [
            node.meta["val"].shape[0]
            for node in self.program.graph.nodes
            if node.op == "placeholder" and node.name in given and getattr(node.meta.get("val"), "ndim", 0)
        ]
        batch = {symbol for first in firsts if not isinstance(first, int) for symbol in first.node.expr.free_symbols}
        return bool(batch & size.node.expr.free_symbols)

    def with_state(self, state: Mapping[str, Tensor]) -> Captured:
        """The same graph over other values (names and shapes unchanged; names not given keep theirs).

        A tied tensor given under one of its names is taken for all of them.
        """
        given = {memory_of(name, self.state[name]): value for name, value in state.items() if name in self.state}
        return replace(
            self,
            state={
                name: state.get(name, given.get(memory_of(name, value), value)) for name, value in self.state.items()
            },
        )

    def fold(self, masks: Mapping[str, Any]) -> Captured:
        """The same graph with `masks` (name -> bool array or tensor of the value's shape, True = kept)
        multiplied in.
        """
        folded: dict[str, Tensor] = {}
        for name, mask in masks.items():
            folded[name] = masked(self.state[name], np.asarray(mask))
        return self.with_state(folded)

    def __call__(self, *inputs: Any, dtype: torch.dtype | None = None) -> Any:
        """The outputs for `inputs`; one tensor where the graph has one output, else a tuple."""
        return run_program(self.program, inputs, self.state, dtype)


def capture(
    model: nn.Module,
    example: tuple[Any, ...],
    *,
    dynamic_batch: bool = True,
    free: Sequence[Sequence[int]] = (),
) -> Captured:
    """`model` in eval mode as an exported graph.

    `example`: input tensors, the batch in dimension 0; they are repeated to a batch of `EXAMPLE_BATCH`.
    `dynamic_batch=False` captures at that batch only, three times as fast. `free`: per input, its other dimensions that
    may have any size.
    Raises CaptureError(reason, line) where torch.export cannot follow the model (control flow that depends on data,
    scripted or quantised modules).
    """
    obstacle = unsupported(model)
    if obstacle is not None:
        raise CaptureError(*obstacle)
    was_training = model.training
    model.eval()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its fused operator hides q, k and v
    try:
        with torch.no_grad(), _silent(), _as_it_was(model), warnings.catch_warnings():
            # Recurrent layers keep their weights in a list besides, others what they made; nothing hangs on it.
            warnings.filterwarnings("ignore", message=".*(was|were) assigned during export.*")
            return _export(model, example, dynamic_batch, free)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        model.train(was_training)


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """A forward may keep what it made (anchors, a table of positions); what it keeps of a capture are stand-ins."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, held in before:
            for name in set(vars(module)) - set(held):
                del vars(module)[name]
            vars(module).update(held)


@contextmanager
def _silent() -> Iterator[None]:
    """torch.export logs a page about what it then raises as an error."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


# Float stand-ins of torch.ao that a model written for quantisation holds; they quantise nothing by themselves.
_FLOAT_STAND_INS = ("FloatFunctional", "FXFloatFunctional", "QuantStub", "DeQuantStub", "QuantWrapper")


def unsupported(model: object) -> tuple[str, str] | None:
    """Why `model` is of a kind that no exported graph of float weights can be made of, and what to do; else None."""
    if not isinstance(model, nn.Module):
        return f"The model is a {type(model).__name__}, not a torch.nn.Module.", "Give an nn.Module."
    for name, module in model.named_modules():
        place, kind = type(module).__module__, type(module).__name__
        where = f"module '{name}', a {kind}" if name else kind
        if isinstance(module, torch.jit.ScriptModule):
            return f"The model is a TorchScript module ({where}).", "Give the eager nn.Module it was scripted from."
        if place.startswith("torch.ao.") and "quanti" in place and kind not in _FLOAT_STAND_INS:
            return (
                f"The model is quantised already, or prepared for it ({where}).",
                "Prune the float model, then quantise.",
            )
    return _half_precision(model) or _oddly_named(model)


def _oddly_named(model: nn.Module) -> tuple[str, str] | None:
    """A tensor whose name no stored program may have."""
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    odd = next((name for name in names if not TENSOR_NAME.fullmatch(name)), None)
    if odd is None:
        return None
    return (
        f"The model calls a tensor {odd!r}, and stored programs know letters of ASCII, digits, _ . - + : alone.",
        "Name that module otherwise, such as the key of a ModuleDict.",
    )


def _half_precision(model: nn.Module) -> tuple[str, str] | None:
    """Weights of 16 bits: what is proven here is proven in float32, and they round a thousand times more coarsely."""
    held = [*model.named_parameters(), *model.named_buffers()]
    half = [(name, value.dtype) for name, value in held if value.dtype in (torch.float16, torch.bfloat16)]
    if not half:
        return None
    name, dtype = half[0]
    kind = str(dtype).removeprefix("torch.")
    return (
        f"The model is in half precision ({len(half)} of its {len(held)} tensors, first '{name}' in {kind}).",
        "Return model.float(), which changes no weight: training, proofs and the runtime's CPU kernels are float32.",
    )


def _export(model: nn.Module, example: tuple[Any, ...], dynamic_batch: bool, free: Sequence[Sequence[int]]) -> Captured:
    batched = tuple(_repeat(x) for x in example)
    shapes = tuple(
        dict.fromkeys((0, *(free[number] if free else ())), Dim.DYNAMIC)
        if isinstance(x, Tensor) and x.dim() > 0
        else None
        for number, x in enumerate(batched)
    )
    dynamic = ((shapes,) if _is_variadic(model) else shapes) if dynamic_batch else None
    try:
        inlined, taken = inline_contexts(torch.export.export(model, batched, dynamic_shapes=dynamic)), batched
    except Exception as dynamic_error:
        if any(free):
            reason, hint = _explain(dynamic_error)
            raise CaptureError(
                f"{reason} With free dimensions beside the batch: see data.dims.", hint
            ) from dynamic_error
        try:
            inlined, taken, dynamic_batch = inline_contexts(torch.export.export(model, example)), example, False
        except Exception as error:
            raise CaptureError(*_explain(error)) from dynamic_error
    return _plain(Captured(inlined, taken, inlined.state_dict, dynamic_batch))


def _plain(captured: Captured) -> Captured:
    """`captured` without writes through views; as it is where that gives something else (the walk pins them then)."""
    try:
        plain = replace(captured, program=without_writes_through_views(captured.program))
        if plain.program is captured.program or _agree(captured, plain):
            return plain
    except (*BUGS, ShapeError, ProgramError):
        if strict():
            raise
        return captured
    if strict():
        raise RuntimeError("The program without writes through views gives something else.")
    return captured


def _agree(a: Captured, b: Captured) -> bool:
    """Whether both give the same for two samples, up to rounding."""
    inputs = small(a)
    outputs = [run(*(x.clone() if isinstance(x, Tensor) else x for x in inputs)) for run in (a, b)]
    left, right = ([y for y in torch.utils._pytree.tree_leaves(out) if isinstance(y, Tensor)] for out in outputs)
    return all(torch.allclose(x, y, rtol=1e-5, atol=1e-5, equal_nan=True) for x, y in zip(left, right, strict=True))


def _is_variadic(model: nn.Module) -> bool:
    """torch.export wants the shapes of `*args` as one tuple."""
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    return bool(kinds) and kinds[0] is inspect.Parameter.VAR_POSITIONAL


def _repeat(x: Any) -> Any:
    if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[0] == EXAMPLE_BATCH:
        return x
    times = -(-EXAMPLE_BATCH // x.shape[0])
    return x.repeat(times, *([1] * (x.dim() - 1)))[:EXAMPLE_BATCH].clone()


def small(captured: Captured, batch: int = 2, seed: int = 0) -> tuple[Any, ...]:
    """Random inputs like the example's (integers: the example's own), of `batch` samples where the batch is dynamic."""
    draw = torch.Generator().manual_seed(seed)

    def like(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        part = x[:batch] if captured.dynamic_batch and x.dim() else x
        if not part.dtype.is_floating_point:
            return part
        return torch.randn(part.shape, generator=draw, dtype=torch.float32).to(part.dtype)

    return tuple(like(x) for x in captured.example)


def _explain(error: Exception) -> tuple[str, str]:
    text = str(error).strip() or type(error).__name__
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    lines = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', text) + _frames(error)
    own = [m for m in lines if "site-packages/torch/" not in m[0] and m[0] != __file__]
    where = f"{own[-1][0].rsplit('/', 1)[-1]}:{own[-1][1]} in {own[-1][2]}" if own else "the model's forward"
    reason = f"torch.export cannot capture the model ({type(error).__name__}: {first[:300].rstrip('.')})."
    if type(error).__module__.split(".")[0] == "torch":  # export's own: a size or a branch that hangs on numbers
        return reason, f"Look at {where}: control flow that depends on tensor values cannot be exported."
    return reason, f"Look at {where}, where the model itself fails on its example input."


def _frames(error: Exception) -> list[tuple[str, str, str]]:
    """(file, line, function) of the Python code that ran into the error; only calls of a forward and what it calls."""
    frames = [(f.filename, str(f.lineno), f.name) for f in traceback.extract_tb(error.__traceback__)]
    first = next((k for k, (_, _, name) in enumerate(frames) if name == "forward"), len(frames))
    return frames[first:]


def inline_contexts(program: ExportedProgram) -> ExportedProgram:
    """`program` with the bodies of no-grad and disabled-autocast blocks put in line, and without what nobody uses.

    Both are wrappers without effect on an inference graph; any other higher-order operator stays, and is pinned.
    """
    module = program.graph_module
    changed = False
    for node in list(module.graph.nodes):
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name == "wrap_with_set_grad_enabled":
            body, operands = node.args[1], node.args[2:]
        elif name == "wrap_with_autocast" and node.args[2] is False:
            body, operands = node.args[4], node.args[5:]
        else:
            continue
        _inline(module.graph, node, getattr(module, body.target).graph, operands)
        changed = True
    module.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output") or writes(n))
    if not changed:
        module.recompile()
        return program
    module.graph.lint()
    module.recompile()
    return inline_contexts(program)


def _inline(graph: fx.Graph, node: fx.Node, body: fx.Graph, operands: tuple[Any, ...]) -> None:
    mapping: dict[fx.Node, Any] = {}
    inputs = iter(operands)
    with graph.inserting_before(node):
        for inner in body.nodes:
            if inner.op == "placeholder":
                mapping[inner] = next(inputs)
            elif inner.op == "output":
                results = fx.node.map_arg(inner.args[0], mapping.__getitem__)
            else:
                mapping[inner] = graph.node_copy(inner, mapping.__getitem__)
    for user in list(node.users):
        if user.op == "call_function" and getattr(user.target, "__name__", "") == "getitem":
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(results if isinstance(results, fx.Node) else results[0])
    graph.erase_node(node)
