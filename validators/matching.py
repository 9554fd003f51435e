"""Where do a PyTorch program and what was made from it part? The first tensor that has no twin.

Names do not survive an export, and a cut changes shapes, so `divergence` cannot bisect here. Instead both sides run
once on the feed, keeping every tensor. A tensor of the candidate has a twin where the reference holds one of the same
shape and the same numbers, whatever its name; where channels were cut (`cut`), where the reference's tensor of the same
name holds its numbers, in however many slices more. From an output that differs, the graph is walked back through
tensors without a twin; the first of them is where the two part. What only one side computes on the way, such as a
transposition, has no twin either, so the node that is named may lie a step before the one to blame.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from foundation.errors import ValidationError, first_line
from foundation.links import plain_files
from foundation.rounding import allowance
from validators.divergence import Divergence, statistics, versions, write_pack
from validators.feeds import Feed
from validators.runners import Array, run_unoptimized

REPRO = '''"""What both sides read and made where they part: `python repro.py` (needs numpy)."""

import numpy as np

for side in ("reference", "candidate"):
    with np.load(f"{side}.npz", allow_pickle=False) as arrays:
        for name, array in arrays.items():
            print(f"{side:10} {name:40} {array.shape} mean {array.mean():.6g}, {array.min():.6g} to {array.max():.6g}")
'''


@dataclass(frozen=True)
class Step:
    """One tensor of a run: its name, the node that made it in words, what that node read, and its value."""

    tensor: str
    node: str
    reads: tuple[str, ...]
    value: Array


@dataclass(frozen=True)
class Trail:
    """Every tensor of one run in the order of the graph, and which of them are the outputs."""

    steps: Mapping[str, Step]
    outputs: Mapping[str, str]


def torch_trail(
    program: ExportedProgram,
    feed: Feed,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    state: Mapping[str, Tensor] | None = None,
) -> Trail:
    """Run `program` on `feed`, on `state` where that is not its own; `inputs` and `outputs` are names, in its order.

    Raises ValidationError where it cannot be run.
    """
    held = {**program.constants, **program.state_dict, **(state or {})}
    given = iter(torch.tensor(feed.arrays[name]) for name in inputs)
    try:
        arguments = [
            held[spec.target] if spec.target is not None else next(given)
            for spec in program.graph_signature.input_specs
        ]
        run = _Keeping(program.graph_module)
        with torch.no_grad():
            run.run(*arguments)
    except Exception as error:  # the model's own code may raise anything
        raise ValidationError(f"The program cannot be run node by node: {first_line(error)}") from error
    steps = {
        node.name: Step(node.name, _torch_node(node), _sources(node, run.values), value)
        for node, value in run.values.items()
    }
    made = [spec.arg.name for spec in program.graph_signature.output_specs if hasattr(spec.arg, "name")]
    return Trail(steps, dict(zip(outputs, made, strict=False)))


def onnx_trail(path: Path, feed: Feed) -> Trail:
    """Run the ONNX file at `path` on `feed`, as it is, keeping every tensor. Raises ValidationError."""
    try:
        model = onnx.load(path, load_external_data=False)
        names = [name for node in model.graph.node for name in node.output if name]
        ends = [value.name for value in model.graph.output]
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        with plain_files(path) as plain:
            made = run_unoptimized(model, names, feed.arrays, folder=plain.parent)
        values = dict(zip(names, made, strict=True))
    except Exception as error:  # the classes of onnx and onnxruntime share no base of their own
        raise ValidationError(f"{path} cannot be run node by node: {first_line(error)}") from error
    steps = {
        name: Step(
            name, f"{node.op_type} {node.name}".strip(), tuple(n for n in node.input if n in values), values[name]
        )
        for node in model.graph.node
        for name in node.output
        if name and isinstance(values[name], np.ndarray)
    }
    return Trail(steps, {name: name for name in ends})


def first_unmatched(
    reference: Trail, candidate: Trail, feed: Feed, *, atol: float, cut: bool = False, pack: Path | None = None
) -> Divergence | None:
    """The first tensor of `candidate` without a twin in `reference`, within atol · max(1, max|reference|).

    None where every output agrees. With `pack`, a zip is written with what both sides read and made there.
    """
    search = _Search(reference, candidate, atol, cut)
    broken = next((name for name in candidate.outputs if not search.agree(name)), None)
    if broken is None:
        return None
    step = search.first(candidate, candidate.outputs[broken], search.twins)
    blamed = search.first(reference, reference.outputs[broken], search.found)
    if cut and step.tensor in reference.steps:
        blamed = reference.steps[step.tensor]
    left, right = blamed.value, step.value
    alike = left.shape == right.shape and np.isfinite(left).all() and np.isfinite(right).all()
    agreed = [name for name in step.reads if name in search.twins]
    found = Divergence(
        feed=feed.label,
        tensor=step.tensor,
        reference_node=blamed.node,
        candidate_node=step.node,
        reference=statistics(left),
        candidate=statistics(right),
        max_abs=float(np.abs(left.astype(np.float64) - right.astype(np.float64)).max()) if alike else None,
        tolerance=search.tolerance(left),
        agreed=agreed[-1] if agreed else None,
        comparable=len(search.twins),
        probes=2,
    )
    if pack is not None:
        sides = (("reference", reference, blamed), ("candidate", candidate, step))
        write_pack(
            pack,
            {"repro.py": REPRO.encode(), "divergence.json": found.model_dump_json(indent=1).encode()}
            | {"versions.json": json.dumps(versions() | {"torch": torch.__version__}, indent=1).encode()},
            {name: _around(trail, made, feed) for name, trail, made in sides},
        )
    return found


def _around(trail: Trail, step: Step, feed: Feed) -> dict[str, Array]:
    """What the node of `step` read, as far as nodes or the feed made it, and what it made."""
    read = {name: trail.steps[name].value for name in step.reads if name in trail.steps}
    return {**(read or dict(feed.arrays)), step.tensor: step.value}


class _Search:
    """Which tensors of either side have a twin: `twins` of the candidate, `found` of the reference."""

    def __init__(self, reference: Trail, candidate: Trail, atol: float, cut: bool) -> None:
        self.reference, self.candidate, self.atol = reference, candidate, atol
        self.twins: dict[str, str] = {}
        by_shape: dict[tuple[int, ...], list[Step]] = {}
        for step in reference.steps.values():
            by_shape.setdefault(step.value.shape, []).append(step)
        for step in candidate.steps.values():
            if cut:
                other = reference.steps.get(step.tensor)
                options = [other] if other is not None else []
            else:
                options = by_shape.get(step.value.shape, [])
            twin = next((o for o in options if self._same(o.value, step.value, cut)), None)
            if twin is not None:
                self.twins[step.tensor] = twin.tensor
        self.found = set(self.twins.values())

    def agree(self, output: str) -> bool:
        """Whether both sides' output of that name is the same."""
        left = self.reference.steps.get(self.reference.outputs.get(output, ""))
        right = self.candidate.steps.get(self.candidate.outputs[output])
        if left is None or right is None:
            raise ValidationError(f"{output} is no tensor that both sides compute.")
        return self._same(left.value, right.value, False)

    def first(self, trail: Trail, output: str, known: Container[str]) -> Step:
        """The first tensor in the order of the graph on the way to `output` that leads there through others without
        a twin.
        """
        reached: set[str] = set()
        waiting = [output]
        while waiting:
            name = waiting.pop()
            if name in reached or name not in trail.steps or (name in known and name != output):
                continue
            reached.add(name)
            waiting += trail.steps[name].reads
        return next(step for name, step in trail.steps.items() if name in reached)

    def tolerance(self, reference: Array) -> float:
        numbers = np.abs(reference[np.isfinite(reference)]) if reference.size else reference
        return allowance(self.atol, float(numbers.max()) if numbers.size else 0.0)

    def _same(self, reference: Array, candidate: Array, cut: bool) -> bool:
        if not all(np.issubdtype(array.dtype, np.floating) for array in (reference, candidate)):
            return bool(np.array_equal(reference, candidate))
        if reference.shape == candidate.shape:
            with np.errstate(invalid="ignore"):  # infinity minus infinity
                near = np.abs(reference.astype(np.float64) - candidate) <= self.tolerance(reference)
            return bool((near | (reference == candidate) | (np.isnan(reference) & np.isnan(candidate))).all())
        if not cut or reference.ndim != candidate.ndim or not reference.size or not candidate.size:
            return False
        # Slices are gone: every number that stayed must still be among those that there were.
        pool = np.sort(reference, axis=None).astype(np.float64)
        wanted = candidate.astype(np.float64).ravel()
        at = np.searchsorted(pool, wanted).clip(1, max(1, len(pool) - 1))
        gap = np.minimum(np.abs(pool[at.clip(max=len(pool) - 1)] - wanted), np.abs(pool[at - 1] - wanted))
        return bool((gap <= self.tolerance(reference)).all())


class _Keeping(fx.Interpreter):
    """Keeps a copy of every tensor as it is computed: a later operator may write into it."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[fx.Node, Array] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        made = super().run_node(n)
        if n.op == "call_function" and isinstance(made, Tensor):
            self.values[n] = made.numpy(force=True).copy()
        return made


def _torch_node(node: fx.Node) -> str:
    """The operator, and the module whose code called it: "conv2d (layer1.0.conv1)"."""
    name = str(node.target).removeprefix("aten.").partition(".")[0]
    stack = node.meta.get("nn_module_stack") or {}
    path = next((entry[0] for entry in reversed(list(stack.values())) if entry[0]), "")
    return f"{name} ({path.removeprefix('L__self___')})" if path else f"{name} {node.name}"


def _sources(node: fx.Node, values: Mapping[fx.Node, Array]) -> tuple[str, ...]:
    """The tensors that a node depends on: those it reads, and through numbers (sizes), what they were read off."""
    found: dict[str, None] = {}
    waiting = list(node.all_input_nodes)
    while waiting:
        source = waiting.pop(0)
        if source in values:
            found[source.name] = None
        else:
            waiting += source.all_input_nodes
    return tuple(found)
