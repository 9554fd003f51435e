"""Model files that compute something else in one place, and files that were only written anew."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from benchmarks.faults.outcome import Outcome, crashed, leanort


def run(folder: Path, tries: int, chance: random.Random) -> Outcome:
    """`leanort check A B` for a model and a changed copy of it, or one that is the same function."""
    outcome = Outcome()
    for number in range(tries):
        kind = chance.choice(list(MODELS))
        model = MODELS[kind](np.random.default_rng(chance.randrange(2**31)))
        first, second = folder / f"a{number}.onnx", folder / f"b{number}.onnx"
        onnx.save(model, first)
        changes = [change for change in CHANGES if kind in CHANGES[change]]
        change = chance.choice(changes) if chance.random() < 0.75 else None
        if change is None:
            _optimised(first, second)
        else:
            changed = onnx.load(first)
            change(changed, chance)
            onnx.save(changed, second)
        words = ["--seconds", "0.1", "--policy", _policy(folder)]
        done = leanort("check", first, second, *words)
        same = change is None
        what = f"{number}, {kind}, {'the same function' if same else change.__name__}: exit {done.returncode}"
        right = (done.returncode == 0) is same and not crashed(done)
        outcome.expect(
            right, done.returncode == 0, what if same else f"{what} {done.stdout[-300:] if not right else ''}"
        )
    return outcome


def _policy(folder: Path) -> Path:
    """Parity alone decides: a rewritten file may be slower or larger."""
    path = folder / "policy.toml"
    path.write_text("max_latency_ratio = inf\nmax_size_ratio = inf\nmax_accuracy_drop_points = inf\n", encoding="utf-8")
    return path


def _weight(rng: np.random.Generator, name: str, *shape: int) -> onnx.TensorProto:
    return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32) / shape[-1] ** 0.5, name)


def _model(
    inputs: list[onnx.ValueInfoProto], nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto]
) -> onnx.ModelProto:
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", inputs, [output], weights)
    return onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    )


def _images(rng: np.random.Generator) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8])
    nodes = [
        helper.make_node("Conv", ["x", "w", "c"], ["h"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "v", "d"], ["y"]),
    ]
    weights = [_weight(rng, "w", 6, 3, 3, 3), _weight(rng, "c", 6), _weight(rng, "v", 6, 5), _weight(rng, "d", 5)]
    return _model([x], nodes, weights)


def _bytes(rng: np.random.Generator) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, ["batch", 3, 6, 6])
    model = _images(rng)
    model.graph.input[0].CopyFrom(x)
    del model.graph.value_info[:]  # of another size
    model.graph.node[0].input[0] = "scaled"
    cast = helper.make_node("Cast", ["x"], ["cast"], to=TensorProto.FLOAT)
    scale = helper.make_node("Div", ["cast", "whole"], ["scaled"])
    model.graph.initializer.append(numpy_helper.from_array(np.float32(255), "whole"))
    model.graph.node.insert(0, cast)
    model.graph.node.insert(1, scale)
    return model


def _words(rng: np.random.Generator) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.INT64, ["batch", "length"])
    nodes = [
        helper.make_node("Gather", ["w", "x"], ["h"]),
        helper.make_node("MatMul", ["h", "v"], ["m"]),
        helper.make_node("ReduceMean", ["m", "axis"], ["y"], keepdims=0),
    ]
    weights = [_weight(rng, "w", 500, 8), _weight(rng, "v", 8, 4), numpy_helper.from_array(np.array([1]), "axis")]
    return _model([x], nodes, weights)


MODELS = {"images": _images, "bytes": _bytes, "words": _words}


def a_weight(model: onnx.ModelProto, chance: random.Random) -> None:
    """One element of one weight moved by a tenth of the largest."""
    tensor = chance.choice([t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims)])
    value = numpy_helper.to_array(tensor).copy()
    value.flat[chance.randrange(value.size)] += 0.5 * float(np.abs(value).max())
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


def at_one_batch_size(model: onnx.ModelProto, chance: random.Random) -> None:
    """Another answer at one batch size and no other."""
    size = chance.choice([2, 4, 5, 7, 16, 23, 40, 64])
    last = model.graph.node[-1]
    last.output[0] = "before"
    for name, value in (("size", np.array([size])), ("first", np.array([0])), ("last", np.array([1]))):
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    model.graph.node.extend(
        [
            helper.make_node("Shape", ["x"], ["shape"]),
            helper.make_node("Slice", ["shape", "first", "last"], ["batch_size"]),
            helper.make_node("Equal", ["batch_size", "size"], ["hit"]),
            helper.make_node("Cast", ["hit"], ["wrong"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["before", "wrong"], ["y"]),
        ]
    )


def a_fixed_batch(model: onnx.ModelProto, chance: random.Random) -> None:
    """A batch of one and no other."""
    model.graph.input[0].type.tensor_type.shape.dim[0].Clear()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")


def a_clip(model: onnx.ModelProto, chance: random.Random) -> None:
    """Every byte above a small value cut off."""
    model.graph.initializer.append(numpy_helper.from_array(np.float32(chance.choice([2, 30, 200])), "most"))
    node = model.graph.node[1]
    model.graph.node.insert(1, helper.make_node("Min", [node.input[0], "most"], ["cut"]))
    node.input[0] = "cut"
    model.graph.node[2].input[0] = "cut"


def a_row(model: onnx.ModelProto, chance: random.Random) -> None:
    """Another vector for one word."""
    tensor = next(t for t in model.graph.initializer if t.name == "w")
    value = numpy_helper.to_array(tensor).copy()
    value[chance.randrange(len(value))] += 1
    tensor.CopyFrom(numpy_helper.from_array(value, "w"))


CHANGES = {
    a_weight: ("images", "bytes"),
    at_one_batch_size: ("images", "bytes", "words"),
    a_fixed_batch: ("images", "bytes", "words"),
    a_clip: ("bytes",),
    a_row: ("words",),
}


def _optimised(source: Path, target: Path) -> None:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
