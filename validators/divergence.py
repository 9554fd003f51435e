"""Where do two ONNX graphs that should compute the same part? The first layer that differs, found by bisecting.

Tensors of the same name in both graphs can be compared: an optimiser keeps the names of what it does not fuse away, and
two exports of one model share all of them. In the candidate's order, the first such tensor that differs is searched by
halves, each time running both graphs up to one tensor only. That supposes that a difference, once there, stays until
the output, which is what makes the output differ.

The graphs run as they are in the files, without onnxruntime's optimisations. Where they agree then, the difference is
made when onnxruntime loads the file.
"""

from __future__ import annotations

import io
import json
import platform
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper
from pydantic import BaseModel, ConfigDict

from foundation.errors import ValidationError, first_line
from foundation.links import load_whole
from foundation.rounding import allowance
from validators.feeds import Feed
from validators.runners import Array, run_unoptimized

REPRO = '''"""Run both subgraphs on the same inputs: `python repro.py` (needs numpy and onnxruntime)."""

import numpy as np
import onnxruntime as ort

options = ort.SessionOptions()
options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
found = []
for name in ("reference.onnx", "candidate.onnx"):
    session = ort.InferenceSession(name, options, providers=["CPUExecutionProvider"])
    with np.load("inputs.npz", allow_pickle=False) as arrays:
        feed = {value.name: arrays[value.name] for value in session.get_inputs()}
    found.append(session.run(None, feed)[0])
print("largest difference:", np.abs(found[0].astype(np.float64) - found[1].astype(np.float64)).max())
'''


class TensorStatistics(BaseModel):
    """One tensor in a few numbers; minimum, maximum, mean and standard deviation are those of its finite elements."""

    model_config = ConfigDict(frozen=True)

    shape: tuple[int, ...]
    dtype: str
    minimum: float | None
    maximum: float | None
    mean: float | None
    std: float | None
    nan: int
    infinite: int


class Divergence(BaseModel):
    """The first tensor that differs, which node makes it in each graph, and what it looks like in both.

    `agreed` is the last comparable tensor before it that agrees, None where there is none; `comparable` counts the
    tensors that both graphs have, `probes` the runs that it took.
    """

    model_config = ConfigDict(frozen=True)

    feed: str
    tensor: str
    reference_node: str
    candidate_node: str
    reference: TensorStatistics
    candidate: TensorStatistics
    max_abs: float | None
    tolerance: float
    agreed: str | None
    comparable: int
    probes: int

    @property
    def words(self) -> str:
        """One line."""
        after = f" (equal up to {self.agreed})" if self.agreed else ""
        before = f", in the reference by {self.reference_node}" if self.reference_node != self.candidate_node else ""
        size = "not comparable" if self.max_abs is None else f"{self.max_abs:.3g} apart"
        return (
            f"first differs at {self.tensor}, made by {self.candidate_node}{before}{after}: {size}, "
            f"mean {_shown(self.reference.mean)} and {_shown(self.candidate.mean)}"
        )


def first_divergence(reference: Path, candidate: Path, feed: Feed, *, atol: float) -> Divergence | None:
    """The first tensor on which two ONNX files differ by more than atol · max(1, max|reference|) on `feed`.

    None where all that can be compared agrees. Raises ValidationError when a graph cannot be run.
    """
    return _Search(reference, candidate, feed, atol).divergence()


def repro_pack(reference: Path, candidate: Path, feed: Feed, pack: Path, *, atol: float) -> Divergence | None:
    """Write the zip `pack`: both smallest subgraphs that differ, their inputs, what came out, versions, a script.

    Returns the divergence; where there is none, nothing is written. Raises ValidationError as `first_divergence` does.
    """
    search = _Search(reference, candidate, feed, atol)
    found = search.divergence()
    if found is None:
        return None
    edge = search.agreeing(found.tensor)
    inputs = {name: search.value(0, name) for name in edge}
    contents: dict[str, bytes] = {"repro.py": REPRO.encode()}
    for side, name in enumerate(("reference", "candidate")):
        contents[f"{name}.onnx"] = _cut(search.models[side], inputs, found.tensor).SerializeToString()
    outputs = {name: search.value(side, found.tensor) for side, name in enumerate(("reference", "candidate"))}
    contents["divergence.json"] = found.model_dump_json(indent=1).encode()
    contents["versions.json"] = json.dumps(versions(), indent=1).encode()
    write_pack(pack, contents, {"inputs": inputs, "outputs": outputs})
    return found


def versions() -> dict[str, str]:
    """What the numbers of a repro pack depend on beside the models."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "onnxruntime": ort.__version__,
        "onnx": onnx.__version__,
        "numpy": np.__version__,
    }


def write_pack(pack: Path, contents: Mapping[str, bytes], arrays: Mapping[str, Mapping[str, Array]]) -> None:
    """Write the zip `pack`: `contents` by file name, and for each of `arrays` an .npz of that name."""
    with zipfile.ZipFile(pack, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in contents.items():
            file.writestr(name, data)
        for name, group in arrays.items():
            file.writestr(f"{name}.npz", _npz(group))


class _Search:
    """Both graphs, and the tensors that they share in the candidate's order."""

    def __init__(self, reference: Path, candidate: Path, feed: Feed, atol: float) -> None:
        self.models = tuple(_load(path) for path in (reference, candidate))
        self.makers = tuple(_makers(model) for model in self.models)
        self.shared = [name for name in self.makers[1] if name in self.makers[0]]
        self.feed, self.atol, self.probes = feed, atol, 0
        self._seen: dict[tuple[int, str], Array] = {}

    def divergence(self) -> Divergence | None:
        ends = [value.name for value in self.models[1].graph.output if value.name in self.shared]
        broken = next((name for name in ends if not self._agrees(name)), None)
        if broken is None:
            return None
        low, high = -1, self.shared.index(broken)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._agrees(self.shared[middle]) else (low, middle)
        name = self.shared[high]
        left, right = self.value(0, name), self.value(1, name)
        alike = left.shape == right.shape and np.isfinite(left).all() and np.isfinite(right).all()
        return Divergence(
            feed=self.feed.label,
            tensor=name,
            reference_node=_node(self.makers[0][name]),
            candidate_node=_node(self.makers[1][name]),
            reference=statistics(left),
            candidate=statistics(right),
            max_abs=float(np.abs(left.astype(np.float64) - right.astype(np.float64)).max()) if alike else None,
            tolerance=self._tolerance(left),
            agreed=self.shared[low] if low >= 0 else None,
            comparable=len(self.shared),
            probes=self.probes,
        )

    def agreeing(self, tensor: str) -> list[str]:
        """The nearest tensors before `tensor`, in both graphs, that are shared and agree; else the graphs' inputs."""
        before = set(self.shared[: self.shared.index(tensor)])
        edges: set[str] = set()
        for model, makers in zip(self.models, self.makers, strict=True):
            given = {value.name for value in model.graph.input}
            edges |= _walk(tensor, makers, self._stops(given, before))[1]
        return sorted(edges)

    def _stops(self, given: set[str], before: set[str]) -> Callable[[str], bool]:
        return lambda name: name in given or (name in before and self._agrees(name))

    def _agrees(self, name: str) -> bool:
        left, right = self.value(0, name), self.value(1, name)
        if left.shape != right.shape or left.dtype != right.dtype:
            return False
        if not np.issubdtype(left.dtype, np.floating):
            return bool(np.array_equal(left, right))
        finite = np.isfinite(left)
        if not np.array_equal(left[~finite], right[~finite], equal_nan=True) or not np.isfinite(right[finite]).all():
            return False
        gap = np.abs(left[finite].astype(np.float64) - right[finite].astype(np.float64))
        return bool((gap <= self._tolerance(left)).all())

    def _tolerance(self, reference: Array) -> float:
        finite = reference[np.isfinite(reference)]
        return allowance(self.atol, float(np.abs(finite).max()) if finite.size else 0.0)

    def value(self, side: int, name: str) -> Array:
        """One tensor of one graph on the feed."""
        if name in self.feed.arrays:
            return self.feed.arrays[name]
        if (side, name) not in self._seen:
            self.probes += 1
            self._seen[side, name] = _run(self.models[side], name, self.feed.arrays)
        return self._seen[side, name]


def _load(path: Path) -> onnx.ModelProto:
    try:
        return load_whole(path)
    except Exception as error:  # protobuf's and onnx's own classes share no base
        raise ValidationError(f"{path} cannot be read: {first_line(error)}") from error


def _makers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Tensor -> the node that makes it, in the order of the graph; what lies inside subgraphs is left out."""
    return {name: node for node in model.graph.node for name in node.output if name}


def _node(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {node.name}".strip()


def _run(model: onnx.ModelProto, name: str, arrays: Mapping[str, Array]) -> Array:
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.append(onnx.ValueInfoProto(name=name))
    try:
        found: Array = run_unoptimized(probe, [name], arrays)[0]
    except Exception as error:  # onnxruntime's exception classes share no base of their own
        raise ValidationError(f"{name} cannot be computed: {first_line(error)}") from error
    return found


def _walk(tensor: str, makers: Mapping[str, onnx.NodeProto], stops: Callable[[str], bool]) -> tuple[set[int], set[str]]:
    """The nodes (by id) that `tensor` needs, and the tensors at which the walk back stopped."""
    nodes: set[int] = set()
    edge: set[str] = set()
    waiting = list(_needs(makers[tensor]))
    nodes.add(id(makers[tensor]))
    while waiting:
        name = waiting.pop()
        if name in edge:
            continue
        if stops(name):
            edge.add(name)
        elif name in makers and id(makers[name]) not in nodes:
            nodes.add(id(makers[name]))
            waiting += _needs(makers[name])
    return nodes, edge


def _needs(node: onnx.NodeProto) -> list[str]:
    """What a node reads, subgraphs included."""
    inner = [
        name
        for attribute in node.attribute
        if attribute.type == onnx.AttributeProto.GRAPH
        for child in attribute.g.node
        for name in _needs(child)
    ]
    return [name for name in (*node.input, *inner) if name]


def _cut(model: onnx.ModelProto, inputs: Mapping[str, Array], tensor: str) -> onnx.ModelProto:
    """The part of the graph between `inputs` and `tensor`."""
    makers = _makers(model)
    nodes, _ = _walk(tensor, makers, lambda name: name in inputs)
    kept = [node for node in model.graph.node if id(node) in nodes]
    used = {name for node in kept for name in _needs(node)}
    graph = helper.make_graph(
        kept,
        "repro",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in inputs.items()
            if name in used
        ],
        [onnx.ValueInfoProto(name=tensor)],
        [tensor_ for tensor_ in model.graph.initializer if tensor_.name in used],
    )
    return helper.make_model(
        graph, opset_imports=model.opset_import, ir_version=model.ir_version, functions=model.functions
    )


def statistics(array: Array) -> TensorStatistics:
    """A tensor in a few numbers."""
    numbers = array.astype(np.float64) if np.issubdtype(array.dtype, np.number) or array.dtype == bool else None
    finite = numbers[np.isfinite(numbers)] if numbers is not None else np.empty(0)
    made: Sequence[Any] = [finite.min(), finite.max(), finite.mean(), finite.std()] if finite.size else [None] * 4
    low, high, mean, std = (None if value is None else float(value) for value in made)
    return TensorStatistics(
        shape=array.shape,
        dtype=str(array.dtype),
        minimum=low,
        maximum=high,
        mean=mean,
        std=std,
        nan=int(np.isnan(numbers).sum()) if numbers is not None else 0,
        infinite=int(np.isinf(numbers).sum()) if numbers is not None else 0,
    )


def _npz(arrays: Mapping[str, Array]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]  # the names are not savez's own
    return file.getvalue()


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"
