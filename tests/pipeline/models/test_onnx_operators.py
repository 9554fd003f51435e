"""Each family of operators, in the forms that old and new opsets have: what is read gives what onnxruntime gives."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from pipeline import models
from pipeline.channels.program.capture import capture
from tests.pipeline.models.onnx_files import saved
from validators.runners import OrtRunner

IMAGE, ROWS, SERIES = ("batch", 3, 8, 8), ("batch", 6), ("batch", 5, 6)


def ints(*numbers: int) -> np.ndarray:
    return np.asarray(numbers, np.int64)


def same_as_onnxruntime(path: Path, input_size: Any = None) -> torch.nn.Module:
    """Read the file; compare it at batches that reading itself does not look at, eager and captured."""
    source = models.load(f"onnx:{path}", input_size=input_size)
    net = source.build()
    runner = OrtRunner(path, threads=1, optimize=False)
    captured = capture(net, models.example(source, 2))
    assert captured.dynamic_batch
    for batch in (2, 7):
        sample = models.example(source, batch, seed=5)
        feed = {spec.name: one.numpy().astype(spec.dtype) for spec, one in zip(runner.inputs, sample, strict=True)}
        wanted = list(runner.infer(feed).values())
        for run in (net, captured):
            with torch.no_grad():
                made = run(*sample)
            made = made if isinstance(made, tuple) else (made,)
            assert len(made) == len(wanted)
            for one, expected in zip(made, wanted, strict=True):
                assert one.shape == expected.shape
                np.testing.assert_allclose(one.detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    return net


CONVOLUTIONS = {
    "plain": ("y = Conv <pads=[1,1,1,1], strides=[2,2]> (x, w, b)", {"w": (4, 3, 3, 3), "b": (4,)}),
    "no bias": ("y = Conv <dilations=[2,2]> (x, w)", {"w": (4, 3, 3, 3)}),
    "one side": ("y = Conv <pads=[0,1,2,0]> (x, w, b)", {"w": (4, 3, 3, 3), "b": (4,)}),
    "same upper": ('y = Conv <auto_pad="SAME_UPPER", strides=[2,2]> (x, w)', {"w": (4, 3, 3, 3)}),
    "same lower": ('y = Conv <auto_pad="SAME_LOWER", strides=[3,2]> (x, w)', {"w": (4, 3, 4, 2)}),
    "valid": ('y = Conv <auto_pad="VALID"> (x, w)', {"w": (4, 3, 3, 3)}),
    "depthwise": ("y = Conv <group=3, pads=[1,1,1,1]> (x, w)", {"w": (6, 1, 3, 3)}),
    "transposed": ("y = ConvTranspose <strides=[2,2], output_padding=[1,1], pads=[1,1,1,1]> (x, w, b)",
                   {"w": (3, 4, 3, 3), "b": (4,)}),
    "transposed, one side": ("y = ConvTranspose <strides=[2,2], pads=[0,1,1,0]> (x, w)", {"w": (3, 4, 3, 3)}),
    "transposed, same": ('y = ConvTranspose <strides=[2,2], auto_pad="SAME_UPPER"> (x, w)', {"w": (3, 4, 3, 3)}),
    "transposed, size": ("y = ConvTranspose <strides=[2,2], output_shape=[17,16]> (x, w)", {"w": (3, 4, 3, 3)}),
    "transposed, groups": ("y = ConvTranspose <group=3, dilations=[2,1]> (x, w)", {"w": (3, 2, 3, 3)}),
}  # fmt: skip


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("opset", [8, 11, 18])
def test_convolutions(tmp_path, case, opset):
    body, weights = CONVOLUTIONS[case]
    net = same_as_onnxruntime(saved(tmp_path, body, opset=opset, weights=weights))
    assert {name for name, _ in net.named_parameters()} == set(weights)


@pytest.mark.parametrize("shape", [("batch", 3, 9), ("batch", 3, 5, 6, 7)])
def test_convolutions_over_one_and_three_axes(tmp_path, shape):
    weights = {"w": (4, 3, *[3] * (len(shape) - 2)), "b": (4,)}
    same_as_onnxruntime(saved(tmp_path, "y = Conv (x, w, b)", opset=11, x=shape, weights=weights))


PRODUCTS = {
    "gemm": (ROWS, "y = Gemm (x, w, b)", {"w": (6, 4), "b": (4,)}),
    "gemm turned": (ROWS, "y = Gemm <transB=1> (x, w, b)", {"w": (4, 6), "b": (4,)}),
    "gemm scaled": (ROWS, "y = Gemm <transB=1, alpha=0.5, beta=2.0> (x, w, b)", {"w": (4, 6), "b": (4,)}),
    "gemm, one bias": (ROWS, "y = Gemm (x, w, b)", {"w": (6, 4), "b": (1,)}),
    "gemm, bias of a row": (ROWS, "y = Gemm (x, w, b)", {"w": (6, 4), "b": (1, 4)}),
    "gemm without bias": (ROWS, "y = Gemm (x, w)", {"w": (6, 4)}),
    "gemm of values": (ROWS, "h = Gemm(x, w) y = Gemm <transB=1, alpha=0.1> (h, v, b)",
                       {"w": (6, 4), "v": (3, 4), "b": (3,)}),
    "matmul": (SERIES, "y = MatMul (x, w)", {"w": (6, 4)}),
    "matmul and bias": (SERIES, "h = MatMul (x, w) y = Add (b, h)", {"w": (6, 4), "b": (4,)}),
    "matmul from the left": (SERIES, "y = MatMul (w, x)", {"w": (4, 5)}),
    "matmul of vectors": (SERIES, "y = MatMul (x, w)", {"w": (6,)}),
    "matmul of stacks": (SERIES, "y = MatMul (x, w)", {"w": (1, 6, 4)}),
    "matmul of values": (SERIES, "t = Transpose <perm=[0,2,1]> (x) y = MatMul (x, t)", {}),
    "a turned weight": (SERIES, "t = Transpose <perm=[1,0]> (w) y = MatMul (x, t)", {"w": (4, 6)}),
    "einsum": (SERIES, 'y = Einsum <equation="b i j , j k -> b i k"> (x, w)', {"w": (6, 4)}),
}  # fmt: skip


@pytest.mark.parametrize("case", PRODUCTS)
def test_products(tmp_path, case):
    shape, body, weights = PRODUCTS[case]
    net = same_as_onnxruntime(saved(tmp_path, body, opset=13, x=shape, weights=weights))
    assert all(value.requires_grad for value in net.parameters())
    assert len(list(net.parameters())) == len(weights)


def test_a_matrix_and_its_transpose_stay_one_weight(tmp_path):
    body = "e = Gather (w, x) t = Transpose <perm=[1,0]> (w) y = MatMul (e, t)"
    path = saved(tmp_path, body, opset=13, x=("batch", 4), weights={"w": (11, 6)}, kind=TensorProto.INT64)
    net = same_as_onnxruntime(path)
    assert [tuple(value.shape) for value in net.parameters()] == [(11, 6)]


NORM = {"w": (3,), "b": (3,)}
NORMS = {
    "batch norm, 9": (
        9,
        IMAGE,
        "y = BatchNormalization <epsilon=0.01> (x, w, b, m, var)",
        NORM | {"m": (3,), "var": (3,)},
    ),
    "batch norm, 15": (15, IMAGE, "y = BatchNormalization (x, w, b, m, var)", NORM | {"m": (3,), "var": (3,)}),
    "instance norm": (11, IMAGE, "y = InstanceNormalization <epsilon=0.01> (x, w, b)", NORM),
    "layer norm": (17, SERIES, "y = LayerNormalization <axis=-1> (x, w, b)", {"w": (6,), "b": (6,)}),
    "layer norm over two axes": (17, SERIES, "y = LayerNormalization <axis=1> (x, w)", {"w": (5, 6)}),
    "rms norm": (23, SERIES, "y = RMSNormalization (x, w)", {"w": (6,)}),
    "group norm": (21, ("batch", 6, 4, 4), "y = GroupNormalization <num_groups=2> (x, w, b)", {"w": (6,), "b": (6,)}),
    "local response": (13, IMAGE, "y = LRN <size=3, alpha=0.1> (x)", {}),
    "unit length": (13, SERIES, "y = LpNormalization <axis=-1, p=2> (x)", {}),
}


@pytest.mark.parametrize("case", NORMS)
def test_norms(tmp_path, case):
    opset, shape, body, weights = NORMS[case]
    net = same_as_onnxruntime(saved(tmp_path, body, opset=opset, x=shape, weights=weights))
    assert {name for name, _ in net.named_parameters()} == set(weights) - {"m", "var"}
    assert {name for name, _ in net.named_buffers()} == set(weights) & {"m", "var"}


def test_a_batch_norm_moves_its_statistics_while_it_is_trained(tmp_path):
    weights = NORM | {"m": (3,), "var": (3,)}
    body = "y = BatchNormalization (x, w, b, m, var)"
    net = models.load(f"onnx:{saved(tmp_path, body, opset=15, weights=weights)}").build().train()
    before = net.m.clone()
    x = torch.randn(4, 3, 8, 8) + 2
    assert torch.allclose(net(x).mean((0, 2, 3)), net.b, atol=1e-5)
    assert torch.allclose(net.m, 0.9 * before + 0.1 * x.mean((0, 2, 3)), atol=1e-5)


LAYER_NORMS = {
    "torch": """m = ReduceMean <axes=[-1]> (x) d = Sub (x, m) q = Pow (d, two) v = ReduceMean <axes=[-1]> (q)
                e = Add (v, eps) s = Sqrt (e) n = Div (d, s) g = Mul (n, w) y = Add (g, b)""",
    "twice the difference": """m = ReduceMean <axes=[-1]> (x) d = Sub (x, m) f = Sub (x, m) q = Mul (f, f)
                v = ReduceMean <axes=[-1]> (q) e = Add (eps, v)
                s = Sqrt (e) n = Div (d, s) g = Mul (w, n) y = Add (b, g)""",
    "reciprocal": """m = ReduceMean <axes=[-1]> (x) d = Sub (x, m) q = Mul (d, d) v = ReduceMean <axes=[-1]> (q)
                e = Add (v, eps) s = Sqrt (e) r = Reciprocal (s) n = Mul (r, d) g = Mul (n, w) y = Add (g, b)""",
    "no scale": """m = ReduceMean <axes=[-1]> (x) d = Sub (x, m) q = Pow (d, two) v = ReduceMean <axes=[-1]> (q)
                e = Add (v, eps) s = Sqrt (e) n = Div (d, s) y = Relu (n)""",
}  # fmt: skip


@pytest.mark.parametrize("case", LAYER_NORMS)
def test_a_layer_norm_in_parts_is_one_operator(tmp_path, case):
    values = {"two": np.float32(2), "eps": np.float32(0.01)}
    weights = {} if case == "no scale" else {"w": (6,), "b": (6,)}
    net = same_as_onnxruntime(saved(tmp_path, LAYER_NORMS[case], opset=13, x=SERIES, weights=weights, values=values))
    captured = capture(net, (torch.randn(2, 5, 6),))
    names = [str(node.target) for node in captured.program.graph.nodes if node.op == "call_function"]
    assert "aten.layer_norm.default" in names
    assert not [name for name in names if "mean" in name or "sqrt" in name]


NOT_LAYER_NORMS = {
    "another mean": """m = ReduceMean <axes=[-2]> (x) d = Sub (x, m) q = Pow (d, two) v = ReduceMean <axes=[-1]> (q)
                e = Add (v, eps) s = Sqrt (e) n = Div (d, s) g = Mul (n, w) y = Add (g, b)""",
    "a cube": """m = ReduceMean <axes=[-1]> (x) d = Sub (x, m) q = Pow (d, three) v = ReduceMean <axes=[-1]> (q)
                f = Abs (v) e = Add (f, eps) s = Sqrt (e) n = Div (d, s) g = Mul (n, w) y = Add (g, b)""",
    "read in the middle": """m = ReduceMean <axes=[-1]> (x) d = Sub (x, m) q = Pow (d, two)
                v = ReduceMean <axes=[-1]> (q) e = Add (v, eps) s = Sqrt (e) n = Div (d, s)
                g = Mul (n, w) h = Add (g, b) y = Add (h, n)""",
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_LAYER_NORMS)
def test_what_is_almost_a_layer_norm_stays_what_it_is(tmp_path, case):
    values = {"two": np.float32(2), "three": np.float32(3), "eps": np.float32(0.01)}
    path = saved(tmp_path, NOT_LAYER_NORMS[case], opset=13, x=SERIES, weights={"w": (6,), "b": (6,)}, values=values)
    same_as_onnxruntime(path)


def test_a_group_norm_in_parts_is_one_operator(tmp_path):
    body = """r = Reshape (x, three) i = InstanceNormalization <epsilon=0.01> (r, ones, zeros) s = Shape (x)
              h = Reshape (i, s) g = Mul (h, w) y = Add (g, b)"""
    values = {"three": ints(0, 2, -1), "ones": np.ones(2, np.float32), "zeros": np.zeros(2, np.float32)}
    weights = {"w": (6, 1, 1), "b": (6, 1, 1)}
    net = same_as_onnxruntime(saved(tmp_path, body, opset=13, x=("batch", 6, 4, 4), weights=weights, values=values))
    captured = capture(net, (torch.randn(2, 6, 4, 4),))
    names = [str(node.target) for node in captured.program.graph.nodes if node.op == "call_function"]
    assert names == ["aten.group_norm.default"]


POOLS = {
    "max": "y = MaxPool <kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]> (x)",
    "max, ceil": "y = MaxPool <kernel_shape=[3,3], strides=[2,2], ceil_mode=1> (x)",
    "max, one side": "y = MaxPool <kernel_shape=[2,2], pads=[0,0,1,1]> (x)",
    "max, same": 'y = MaxPool <kernel_shape=[3,3], strides=[2,2], auto_pad="SAME_UPPER"> (x)',
    "max, dilated": "y = MaxPool <kernel_shape=[2,2], dilations=[2,2]> (x)",
    "average": "y = AveragePool <kernel_shape=[2,2], strides=[2,2]> (x)",
    "average, not the padding": "y = AveragePool <kernel_shape=[3,3], pads=[1,1,1,1]> (x)",
    "average, with the padding": "y = AveragePool <kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1> (x)",
    "average, one side": "y = AveragePool <kernel_shape=[3,3], pads=[0,0,1,1]> (x)",
    "average, one side, with it": "y = AveragePool <kernel_shape=[3,3], pads=[0,0,1,1], count_include_pad=1> (x)",
    "average, same": 'y = AveragePool <kernel_shape=[3,3], strides=[2,2], auto_pad="SAME_UPPER"> (x)',
    "global average": "y = GlobalAveragePool (x)",
    "global max": "y = GlobalMaxPool (x)",
}


@pytest.mark.parametrize("case", POOLS)
def test_pools(tmp_path, case):
    same_as_onnxruntime(saved(tmp_path, POOLS[case], opset=12))


REDUCTIONS = [
    (13, "y = ReduceMean <axes=[2,3], keepdims=0> (x)"),
    (18, "a = Constant <value = int64[2] {-2,-1}> () y = ReduceMean <keepdims=1> (x, a)"),
    (11, "y = ReduceSum <axes=[1]> (x)"),
    (13, "a = Constant <value = int64[1] {1}> () y = ReduceSum <keepdims=0> (x, a)"),
    (13, "a = Constant <value = int64[0] {}> () y = ReduceSum <noop_with_empty_axes=1> (x, a)"),
    (13, "y = ReduceMax <axes=[2,3]> (x)"),
    (13, "y = ReduceMin <axes=[-1], keepdims=0> (x)"),
    (13, "y = ReduceProd <axes=[3]> (x)"),
    (13, "y = ReduceL1 <axes=[3]> (x)"),
    (13, "y = ReduceL2 <axes=[1,2]> (x)"),
    (13, "y = ReduceSumSquare <axes=[3]> (x)"),
    (13, "y = ReduceLogSumExp <axes=[3]> (x)"),
    (13, "k = Constant <value = int64[1] {2}> () y, i = TopK <axis=-1> (x, k)"),
    (13, "y = CumSum (x, one)"),
    (13, "y = CumSum <reverse=1, exclusive=1> (x, one)"),
]


@pytest.mark.parametrize(("opset", "body"), REDUCTIONS)
def test_reductions(tmp_path, opset, body):
    same_as_onnxruntime(saved(tmp_path, body, opset=opset, values={"one": np.asarray(1, np.int64)}))


def test_the_largest_of_a_row_by_number(tmp_path):
    body = "y = ArgMax <axis=1, keepdims=0> (x)"
    same_as_onnxruntime(saved(tmp_path, body, opset=13, x=ROWS, out=TensorProto.INT64))


FLOOR = 'mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"'
CUBIC = 'mode="cubic", coordinate_transformation_mode="pytorch_half_pixel", cubic_coeff_a=-0.75'
RESIZES = [
    (9, 'y = Upsample <mode="nearest"> (x, s)'),
    (8, 'y = Upsample <mode="nearest", scales=[1.0,1.0,2.0,3.0]> (x)'),
    (10, 'y = Resize <mode="nearest"> (x, s)'),
    (11, f"y = Resize <{FLOOR}> (x, r, s)"),
    (13, 'y = Resize <mode="nearest"> (x, r, s)'),
    (13, 'y = Resize <mode="linear"> (x, r, s)'),
    (13, 'y = Resize <mode="linear"> (x, , odd)'),
    (13, 'y = Resize <mode="cubic"> (x, , odd)'),
    (13, 'y = Resize <mode="nearest"> (x, , half)'),
    (13, 'y = Resize <mode="nearest", nearest_mode="round_prefer_ceil"> (x, , half)'),
    (13, 'y = Resize <mode="linear", coordinate_transformation_mode="align_corners"> (x, , s)'),
    (13, 'y = Resize <mode="linear", coordinate_transformation_mode="pytorch_half_pixel"> (x, , , n)'),
    (13, f"y = Resize <{CUBIC}> (x, , s)"),
    (18, 'y = Resize <mode="linear", axes=[2,3]> (x, , , m)'),
    (13, f"q = Shape (x) a = Slice (q, zero, two) c = Concat <axis=0> (a, m) y = Resize <{FLOOR}> (x, , , c)"),
]


@pytest.mark.parametrize(("opset", "body"), RESIZES)
def test_resizing(tmp_path, opset, body):
    values = {
        "s": np.asarray([1, 1, 2, 2], np.float32), "r": np.asarray([], np.float32), "n": ints(1, 3, 16, 12),
        "m": ints(16, 12), "h": ints(4, 5), "zero": ints(0), "two": ints(2),
        "odd": np.asarray([1, 1, 1.3, 0.7], np.float32), "half": np.asarray([1, 1, 0.5, 0.25], np.float32),
    }  # fmt: skip
    if "(x, , , n)" in body:  # sizes that name the batch hold it fixed
        body = f"q = Shape (x) a = Slice (q, zero, two) n = Concat <axis=0> (a, m) {body}"
        del values["n"]
    same_as_onnxruntime(saved(tmp_path, body, opset=opset, values=values))


SHAPES = [
    (9, "y = Slice <axes=[2,3], starts=[1,-3], ends=[100,-1]> (x)"),
    (13, "y = Slice (x, one, big, two, two)"),
    (13, "y = Slice (x, minus, low, three, minus)"),
    (11, "u = Unsqueeze <axes=[1,-1]> (x) y = Squeeze <axes=[1]> (u)"),
    (13, "u = Unsqueeze (x, one) y = Squeeze (u, one)"),
    (11, "a, b = Split <axis=2, split=[3,5]> (x) y = Concat <axis=2> (b, a)"),
    (13, "a, b, c = Split <axis=1> (x) y = Concat <axis=1> (c, a, b)"),
    (18, "a, b, c = Split <axis=2, num_outputs=3> (x) y = Concat <axis=-2> (c, a, b)"),
    (8, 'y = Pad <mode="constant", pads=[0,0,1,2,0,0,3,0], value=0.5> (x)'),
    (13, "y = Pad (x, pads, half)"),
    (13, 'y = Pad <mode="reflect"> (x, pads)'),
    (13, 'y = Pad <mode="edge"> (x, pads)'),
    (18, "y = Pad (x, ends, half, axes)"),
    (8, "y = Flatten (x)"),
    (13, "y = Flatten <axis=2> (x)"),
    (13, "y = Flatten <axis=-1> (x)"),
    (13, "y = Transpose (x)"),
    (13, "y = Transpose <perm=[0,2,3,1]> (x)"),
    (8, "y = Reshape (x, rows)"),
    (13, """s = Shape (x) n = Gather (s, zero) u = Unsqueeze (n, zeros) c = Concat <axis=0> (u, minus)
            y = Reshape (x, c)"""),
    (13, """s = Shape (x) a = Slice (s, zeros, two) c = Concat <axis=0> (a, minus) r = Reshape (x, c)
            y = ReduceMax <axes=[2]> (r)"""),
    (13, """s = Shape (x) n = Gather (s, zero) t = Mul (n, three0) u = Unsqueeze (t, zeros)
            c = Concat <axis=0> (u, minus) r = Reshape (x, c) q = Shape (x) y = Reshape (r, q)"""),
    (13, "s = Shape (x) o = ConstantOfShape <value = float[1] {0.5}> (s) y = Add (x, o)"),
    (13, """s = Shape (x) n = Gather (s, zero) u = Unsqueeze (n, zeros) c = Concat <axis=0> (u, one, one, one)
            e = Expand (cls, c) y = Mul (x, e)"""),
    (13, "y = Tile (x, times)"),
    (13, "y = DepthToSpace <blocksize=2> (wide)", "wide"),
    (13, 'y = DepthToSpace <blocksize=2, mode="CRD"> (wide)', "wide"),
    (13, "y = SpaceToDepth <blocksize=2> (x)"),
    (14, "y = Trilu <upper=0> (x)"),
    (13, "y = Identity (x)"),
    (11, "y = Dropout <ratio=0.3> (x)"),
    (12, "y, mask = Dropout (x)"),
    (13, "q = SplitToSequence <axis=1> (x) y = SequenceAt (q, two0)"),
]  # fmt: skip


@pytest.mark.parametrize("case", [case for case in SHAPES if len(case) == 2 or case[2]], ids=lambda case: case[1][:40])
def test_what_moves_elements(tmp_path, case):
    body = case[1]
    if len(case) == 3:
        body = f"wide = Concat <axis=1> (x, x, x, x) {body}"
    values = {
        "zero": np.asarray(0, np.int64), "zeros": ints(0), "one": ints(1), "two": ints(2), "three": ints(3),
        "two0": np.asarray(2, np.int64), "three0": np.asarray(3, np.int64), "minus": ints(-1), "big": ints(2**62),
        "low": ints(-(2**62)), "pads": ints(0, 0, 1, 2, 0, 0, 2, 1), "half": np.float32(0.5), "ends": ints(1, 0, 2, 3),
        "axes": ints(2, -1), "rows": ints(0, -1, 4), "times": ints(1, 2, 1, 3),
        "cls": np.full((1, 3, 8, 1), 2, np.float32),
    }  # fmt: skip
    words = set(re.findall(r"\w+", body))
    used = {name: value for name, value in values.items() if name in words}
    same_as_onnxruntime(saved(tmp_path, body, opset=case[0], values=used))


def test_sizes_by_arithmetic_keep_the_batch_free(tmp_path):
    body = """s = Shape (x) w = Cast <to=1> (s) h = Div (w, two) f = Floor (h) c = Ceil (h) g = Add (f, c)
              i = Cast <to=7> (g) n = Slice (i, zero, one) r = Concat <axis=0> (n, minus) k = Equal (r, minus)
              o = Where (k, minus, r) y = Reshape (x, o)"""
    values = {"two": np.asarray([2], np.float32), "zero": ints(0), "one": ints(1), "minus": ints(-1)}
    path = saved(tmp_path, body, opset=13, values=values)
    # Half of an odd batch and its other half are the batch again: only symbols know that, so a fixed example may not.
    source = models.load(f"onnx:{path}")
    assert source.build()(torch.randn(6, 3, 8, 8)).shape == (6, 192)


UNARY = [
    "Abs", "Acos", "Asin", "Atan", "Ceil", "Cos", "Cosh", "Elu", "Erf", "Exp", "Floor", "HardSigmoid", "HardSwish",
    "LeakyRelu", "Log", "LogSoftmax", "Mish", "Neg", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign",
    "Sin", "Sinh", "Softmax", "Softplus", "Softsign", "Sqrt", "Tan", "Tanh", "ThresholdedRelu", "Celu",
]  # fmt: skip


@pytest.mark.parametrize("name", UNARY)
def test_operators_on_each_element(tmp_path, name):
    body = f"h = Sigmoid (x) y = {name} (h)" if name in ("Log", "Sqrt", "Acos", "Asin") else f"y = {name} (x)"
    same_as_onnxruntime(saved(tmp_path, body, opset=18))


ELEMENTWISE = [
    (20, "y = Gelu (x)", {}),
    (20, 'y = Gelu <approximate="tanh"> (x)', {}),
    (11, "y = Softmax <axis=1> (x)", {}),
    (13, "y = Softmax <axis=1> (x)", {}),
    (11, "y = LogSoftmax <axis=2> (x)", {}),
    (8, "y = Clip <min=0.0, max=6.0> (x)", {}),
    (8, "y = Clip <max=0.5> (x)", {}),
    (13, "y = Clip (x, low, high)", {}),
    (13, "y = Clip (x, , high)", {}),
    (13, "y = Min (x, high)", {}),
    (13, "h = Neg (x) y = Max (x, h, low)", {}),
    (13, "h = Relu (x) y = Pow (h, high)", {}),
    (13, "y = PRelu (x, s)", {"s": (3, 1, 1)}),
    (13, "y = PRelu (x, s)", {"s": (1,)}),
    (13, "y = PRelu (x, s)", {"s": (8,)}),
    (13, "y = PRelu (x, s)", {"s": (8, 1)}),  # along the rows, of as many as there are slopes
    (13, "y = Sub (high, x)", {}),
    (13, "h = Exp (x) y = Div (high, h)", {}),
    (13, "y = Mul (x, s)", {"s": (3, 1, 1)}),
    (13, "h = Sum (x, x, s) y = Mean (h, x)", {"s": (3, 1, 1)}),
    (13, "c = Greater (x, low) y = Where (c, x, high)", {}),
    (13, "a = Less (x, low) b = GreaterOrEqual (x, high) c = Or (a, b) d = Not (c) y = Cast <to=1> (d)", {}),
    (
        13,
        "i = Cast <to=6> (x) k = Cast <to=6> (high) h = Div (i, k) m = Mod (i, k) s = Add (h, m) y = Cast <to=1> (s)",
        {},
    ),
    (13, "y = HardSigmoid <alpha=0.3, beta=0.4> (x)", {}),
    (13, "h = IsNaN (x) y = Cast <to=1> (h)", {}),
    (13, "h = Relu (x) y = Mod <fmod=1> (h, high)", {}),
]


@pytest.mark.parametrize(("opset", "body", "weights"), ELEMENTWISE)
def test_operators_with_settings_or_two_operands(tmp_path, opset, body, weights):
    values = {name: np.float32(number) for name, number in {"low": -0.5, "high": 2.0}.items() if name in body}
    net = same_as_onnxruntime(saved(tmp_path, body, opset=opset, weights=weights, values=values))
    assert len(list(net.parameters())) == len(weights)


PICKS = [
    (13, "y = Gather <axis=1> (x, i)", {"i": np.asarray([[0, 2], [-1, 1]], np.int64)}),
    (13, "y = Gather <axis=1> (x, i)", {"i": np.asarray(-1, np.int64)}),
    (13, "y = Gather <axis=3> (x, i)", {"i": np.asarray([3, 4, 5], np.int64)}),
    (13, "y = Gather <axis=2> (x, i)", {"i": np.asarray([-1, 0], np.int64)}),
    (13, "y = Gather <axis=1> (x, i)", {"i": np.asarray([[-1]], np.int64)}),
    (13, "e = GatherElements <axis=0> (r, i) y = Add (x, e)",
     {"i": np.asarray([-1, 0, -2, 1, 1, -1, 0, -2], np.int64), "r": np.arange(9, dtype=np.float32)}),
    (13, "a = ArgMax <axis=3> (x) y = GatherElements <axis=3> (x, a)", {}),
    (13, "a = ArgMax <axis=1, keepdims=0> (x) y = OneHot <axis=1> (a, d, v)",
     {"d": np.asarray(3, np.int64), "v": np.asarray([0.5, 2], np.float32)}),
    (16, "a = ArgMax <axis=3> (x) u = ReduceMax <axes=[3]> (x) y = ScatterElements <axis=3> (x, a, z)", {}),
]  # fmt: skip


@pytest.mark.parametrize(("opset", "body", "values"), PICKS)
def test_what_picks_elements(tmp_path, opset, body, values):
    body = body.replace("(x, a, z)", "(x, a, u)")
    same_as_onnxruntime(saved(tmp_path, body, opset=opset, values=values))


@pytest.mark.parametrize("by", [2, -2, 3])
def test_less_than_nothing_is_divided_towards_zero_at_every_batch(tmp_path, by):
    """Minus a batch, halved, and back: 1 of 3."""
    body = """s = Shape (x) g = Gather (s, i) n = Neg (g) d = Div (n, k) m = Neg (d) f = Cast <to=1> (m)
    y = Mul (x, f)"""
    values = {"i": np.asarray(0, np.int64), "k": np.asarray(by, np.int64)}
    same_as_onnxruntime(saved(tmp_path, body, opset=13, values=values))


def test_a_weight_that_is_only_repeated_may_be_an_output(tmp_path):
    body = "s = Shape (x) z = Expand (w, s) y = Add (x, z)"
    same_as_onnxruntime(saved(tmp_path, body, opset=13, weights={"w": (3, 1, 1)}, outputs=("y", "z")))


def test_nothing_is_infinite_where_no_infinity_is_looked_for(tmp_path):
    body = "d = Div (x, z) i = IsInf <detect_negative=0, detect_positive=0> (d) f = Cast <to=1> (i) y = Add (x, f)"
    same_as_onnxruntime(saved(tmp_path, body, opset=13, values={"z": np.asarray(0, np.float32)}))


def test_a_table_of_rows_is_an_embedding(tmp_path):
    body = "y = Gather (w, x)"
    for kind in (TensorProto.INT64, TensorProto.INT32):
        path = saved(tmp_path, body, opset=13, x=("batch", "length"), weights={"w": (7, 4)}, kind=kind)
        source = models.load(f"onnx:{path}")
        assert [(one.kind, one.high, one.shape) for one in source.inputs] == [("tokens", 7, (16,))]
        net = same_as_onnxruntime(path)
        names = [str(n.target) for n in capture(net, models.example(source)).program.graph.nodes]
        assert "aten.embedding.default" in names


@pytest.mark.parametrize("way", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("biased", [True, False])
def test_recurrent_layers(tmp_path, way, kind, gates, biased):
    ways = 2 if way == "bidirectional" else 1
    weights = {"w": (ways, gates * 4, 6), "r": (ways, gates * 4, 4)}
    weights |= {"b": (ways, gates * 8)} if biased else {}
    more = ", linear_before_reset=1" if kind == "GRU" else ""
    outs = "o, h, c" if kind == "LSTM" else "o, h"
    body = f"""t = Transpose <perm=[1,0,2]> (x)
               {outs} = {kind} <hidden_size=4, direction="{way}"{more}> (t, w, r{", b" if biased else ""})
               p = Transpose <perm=[2,0,1,3]> (o) q = Transpose <perm=[1,0,2]> (h) f = Flatten (p) g = Flatten (q)
               y = Concat <axis=1> (f, g)"""
    net = same_as_onnxruntime(saved(tmp_path, body, opset=14, x=SERIES, weights=weights))
    assert len(list(net.parameters())) == ways * (4 if biased else 2)


def test_a_recurrent_layer_starts_where_the_file_says(tmp_path):
    body = """t = Transpose <perm=[1,0,2]> (x) s = Shape (x) n = Slice (s, zero, one) u = Concat <axis=0> (one, n, four)
              i = Expand (h0, u) j = Expand (c0, u)
              o, h, c = LSTM <hidden_size=4> (t, w, r, b, , i, j) y = Transpose <perm=[1,0,2]> (c)"""
    weights = {"w": (1, 16, 6), "r": (1, 16, 4), "b": (1, 32), "h0": (1, 1, 4), "c0": (1, 1, 4)}
    values = {"zero": ints(0), "one": ints(1), "four": ints(4)}
    same_as_onnxruntime(saved(tmp_path, body, opset=14, x=SERIES, weights=weights, values=values))


ATTENTIONS = {
    "three dimensions": "y = Attention <q_num_heads=2, kv_num_heads=2> (x, x, x)",
    "shared keys": """k = MatMul (x, w) y = Attention <q_num_heads=2, kv_num_heads=1, scale=0.3> (x, k, k)""",
    "causal": "y = Attention <q_num_heads=3, kv_num_heads=3, is_causal=1> (x, x, x)",
    "masked": "y = Attention <q_num_heads=2, kv_num_heads=2> (x, x, x, mask)",
}


@pytest.mark.parametrize("case", ATTENTIONS)
def test_attention_is_torchs_own(tmp_path, case):
    body = ATTENTIONS[case]
    weights = {"w": (6, 3)} if "w)" in body else {}
    values = {"mask": np.triu(np.full((5, 5), -1e4, np.float32), 1)} if "mask" in body else {}
    net = same_as_onnxruntime(saved(tmp_path, body, opset=23, x=SERIES, weights=weights, values=values))
    assert len(list(net.parameters())) == len(weights)  # a mask is nothing to train
    captured = capture(net, (torch.randn(2, 5, 6),))
    assert any("scaled_dot_product_attention" in str(node.target) for node in captured.program.graph.nodes)


def test_sampling_by_a_grid(tmp_path):
    body = """g = Tanh (x) h = Slice (g, zero, two, one) t = Transpose <perm=[0,2,3,1]> (h)
              y = GridSample <mode="bilinear"> (x, t)"""
    values = {"zero": ints(0), "one": ints(1), "two": ints(2)}
    same_as_onnxruntime(saved(tmp_path, body, opset=16, values=values))


def test_a_number_in_the_graph_is_no_weight_and_a_parameter_of_one_number_is(tmp_path):
    body = """half = Constant <value_float = 0.5> () h = Mul (x, half) g = Mul (h, w) y = Add (g, b)"""
    path = saved(tmp_path, body, opset=13, values={"w": np.float32([3.0]), "b": np.float32([2.0])})
    model = onnx.load(path)
    text = {"w": "part.scale", "b": "/part.0/Constant_output_0", "half": "/part.1/Constant_output_0"}
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [text.get(name, name) for name in names]
    for tensor in model.graph.initializer:
        tensor.name = text[tensor.name]
    onnx.save(model, path)
    net = same_as_onnxruntime(path)
    assert [name for name, _ in net.named_parameters()] == ["part.scale"]
    assert not list(net.buffers())


class Drawn:
    """A random image network of one opset: nodes as text, and the weights that they read."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.opset = int(self.rng.choice([9, 11, 13, 17, 18, 21]))
        self.body: list[str] = []
        self.values: dict[str, np.ndarray] = {}
        self.count = 0

    def name(self, value: np.ndarray | None = None) -> str:
        self.count += 1
        if value is not None:
            self.values[f"v{self.count}"] = value
        return f"v{self.count}"

    def weight(self, *shape: int) -> str:
        return self.name((self.rng.standard_normal(shape) / 2).astype(np.float32))

    def add(self, text: str) -> str:
        made = self.name()
        self.body.append(f"{made} = {text}")
        return made

    def step(self, x: str, width: int, size: int) -> tuple[str, int, int]:
        """One more layer on `x` (batch, width, size, size)."""
        kind = int(self.rng.integers(0, 12))
        if kind == 0:
            out, stride = int(self.rng.integers(2, 7)), int(self.rng.integers(1, 3))
            weight = self.weight(out, width, 3, 3)
            pads = f"pads=[1,1,1,1], strides=[{stride},{stride}]"
            return self.add(f"Conv <{pads}> ({x}, {weight}, {self.weight(out)})"), out, -(-size // stride)
        if kind == 1:
            return self.add(f"Conv <group={width}> ({x}, {self.weight(width, 1, 1, 1)})"), width, size
        if kind == 2:
            more = [self.weight(width) for _ in range(3)]
            spread = self.name((self.rng.random(width) + 0.5).astype(np.float32))
            return self.add(f"BatchNormalization ({x}, {', '.join(more)}, {spread})"), width, size
        if kind == 3 and size > 3:
            return self.add(f"MaxPool <kernel_shape=[2,2], strides=[2,2]> ({x})"), width, size // 2
        if kind == 4:
            pads = 'kernel_shape=[3,3], auto_pad="SAME_LOWER"'
            return self.add(f"AveragePool <{pads}> ({x})"), width, size
        if kind == 5:
            return self.add(f"Add ({x}, {self.add(f'Sigmoid ({x})')})"), width, size
        if kind == 6:
            other = self.add(f"Mul ({x}, {self.weight(width, 1, 1)})")
            return self.add(f"Concat <axis=1> ({other}, {x})"), 2 * width, size
        if kind == 7 and width > 2:
            cut = [self.name(ints(number)) for number in (1, 2**62, 1)]
            by_attribute = f"Slice <axes=[1], starts=[1], ends=[100]> ({x})"
            return self.add(by_attribute if self.opset < 10 else f"Slice ({x}, {', '.join(cut)})"), width - 1, size
        if kind == 8:
            shape = self.add(f"Shape ({x})")
            flat = self.add(f"Reshape ({x}, {self.name(ints(0, width, -1))})")
            mixed = self.add(f"MatMul ({flat}, {self.weight(size * size, size * size)})")
            return self.add(f"Reshape ({mixed}, {shape})"), width, size
        if kind == 9:
            turned = self.add(f"Transpose <perm=[0,2,3,1]> ({x})")
            mixed = self.add(f"MatMul ({turned}, {self.weight(width, 5)})")
            shifted = self.add(f"Add ({mixed}, {self.weight(5)})")
            return self.add(f"Transpose <perm=[0,3,1,2]> ({shifted})"), 5, size
        if kind == 10:
            return self.add(f"PRelu ({x}, {self.weight(width, 1, 1)})"), width, size
        return self.add(f"{self.rng.choice(['Relu', 'Tanh', 'Softplus', 'Identity', 'Elu'])} ({x})"), width, size


@pytest.mark.parametrize("seed", range(24))
def test_random_networks(tmp_path, seed):
    drawn = Drawn(seed)
    x, width, size = "x", 3, 8
    for _ in range(int(drawn.rng.integers(3, 10))):
        x, width, size = drawn.step(x, width, size)
    pooled = drawn.add(f"GlobalAveragePool ({x})")
    flat = drawn.add(f"Flatten ({pooled})")
    drawn.body.append(f"y = Gemm <transB=1> ({flat}, {drawn.weight(4, width)}, {drawn.weight(4)})")
    same_as_onnxruntime(saved(tmp_path, " ".join(drawn.body), opset=drawn.opset, values=drawn.values))
