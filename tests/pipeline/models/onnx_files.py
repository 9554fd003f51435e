"""ONNX files by hand: the nodes in ONNX's own text form, weights drawn by seed."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def drawn(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of these shapes; a name that begins with "var" gets numbers above zero."""
    rng = np.random.default_rng(seed)
    made = {name: (rng.standard_normal(shape) * 0.5).astype(np.float32) for name, shape in shapes.items()}
    return {name: np.abs(value) + 0.5 if name.startswith("var") else value for name, value in made.items()}


def saved(
    folder: Path,
    body: str,
    *,
    opset: int,
    x: tuple[int | str, ...] = ("batch", 3, 8, 8),
    weights: dict[str, tuple[int, ...]] | None = None,
    values: dict[str, np.ndarray] | None = None,
    kind: int = TensorProto.FLOAT,
    outputs: tuple[str, ...] = ("y",),
    out: int = TensorProto.FLOAT,
    domains: tuple[str, ...] = (),
) -> Path:
    """A file whose graph is `body`: it reads `x` and gives `outputs`."""
    graph = onnx.parser.parse_graph(f"g (float x) => (float y) {{ {body} }}")
    del graph.input[:]
    del graph.output[:]
    graph.input.append(helper.make_tensor_value_info("x", kind, x))
    graph.output.extend(helper.make_tensor_value_info(name, out, None) for name in outputs)
    held = drawn(weights or {}) | (values or {})
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in held.items())
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=min(8 if opset < 20 else 10, 11)), path)
    return path
