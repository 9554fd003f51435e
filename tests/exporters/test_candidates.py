import importlib
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.export import Dim

from exporters import (
    CANDIDATES,
    ExportError,
    NotApplicable,
    Source,
    describe,
    expected_attention,
    fuse,
    fused_attention,
    host,
    isa,
    make,
    sensitivity,
    to_onnx,
)


@pytest.fixture
def source(exported, tiny_program, image, tmp_path):
    return Source(
        onnx=exported,
        program=lambda: tiny_program,
        example=(image,),
        calibration=lambda: [{"input": image.numpy()}],
        folder=tmp_path,
    )


def run(path, x):
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"input": x})[0]


ROUNDING = [
    name
    for name, spec in CANDIDATES.items()
    if spec.budget == "rounding" and name not in ("fused", "legacy", "opset20")  # this source has none of those
]


@pytest.mark.parametrize("name", ROUNDING)
def test_a_float_candidate_computes_the_same_and_says_what_it_is(source, tiny_net, image, name):
    made = make(name, source)
    np.testing.assert_allclose(run(made.path, image.numpy()), tiny_net(image).detach(), rtol=1e-5, atol=1e-5)
    assert made.bytes == made.path.stat().st_size
    assert (made.spec.portable, made.isa) == ((False, isa()) if "host" in name else (True, ""))
    if made.path.suffix == ".onnx":
        summary = describe(made.path)
        assert summary.metadata["parent"] == "abc"
        assert made.operators == summary.operators
    if name.startswith("opset"):
        assert summary.opset == int(name.removeprefix("opset"))


def test_a_candidate_of_another_opset_keeps_the_names_of_free_dimensions(tiny_net, image, tmp_path):
    dynamic = {0: Dim("n"), 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    program = torch.export.export(tiny_net, (image,), dynamic_shapes=(dynamic,))
    free = ({2: "height", 3: "width"},)
    onnx_file = to_onnx(program, tmp_path / "m.onnx", example=(image,), opset=20, metadata={}, free=free)
    source = Source(onnx_file.path, lambda: program, (image,), lambda: [], tmp_path, free=free)
    before, after = describe(onnx_file.path).inputs, describe(make("opset18", source).path).inputs
    assert before[0].shape == ("batch", 3, "height", "width")
    assert after == before


@pytest.fixture(params=[True, False], ids=["vnni", "no vnni"])
def vnni(request, monkeypatch):
    """A CPU that has VNNI, and one that has not, whatever this machine is."""
    flags = {"avx", "avx2", "avx512f"} | ({"avx512_vnni"} if request.param else set())
    monkeypatch.setattr(host, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(host.platform, "machine", lambda: "x86_64")
    return request.param


def largest_weight(path):
    tensors = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
    return max(np.abs(w.astype(int)).max() for w in tensors if w.dtype == np.int8 and w.ndim > 1)


INT8 = ["int8-minmax", "int8-entropy", "int8-percentile", "int8-dynamic"]


@pytest.mark.parametrize("name", INT8)
def test_int8_for_any_machine_is_made_on_every_machine_close_and_silent(source, tiny_net, image, name, vnni, capfd):
    made = make(name, source)
    wanted = tiny_net(image).detach().numpy()
    error = np.abs(run(made.path, image.numpy()) - wanted).max()
    assert 0 < error < 0.2 * np.abs(wanted).max()
    assert (made.spec.portable, made.isa, made.spec.budget) == (True, "", "accuracy")
    assert largest_weight(made.path) == 64  # with the seven bits that saturate nowhere
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("name", INT8)
def test_int8_with_all_its_bits_belongs_to_cpus_that_do_not_saturate(source, name, vnni):
    if not vnni:
        with pytest.raises(NotApplicable, match="no VNNI"):
            make(f"{name}-host", source)
        return
    made = make(f"{name}-host", source)
    assert (made.spec.portable, made.isa) == (False, "avx512")
    assert largest_weight(made.path) == 127


def test_the_ranges_are_found_once_for_all_that_need_them_and_are_left_as_they_were(source, monkeypatch):
    """Making it again, with a node in float or with more bits, gives what a fresh calibration would have given."""
    monkeypatch.setattr(host, "has_vnni", lambda: True)
    counted = []

    def calibration():
        counted.append(1)
        return batches()

    batches, names = source.calibration, ("int8-percentile", "int8-percentile-host")
    first = next(node.name for node in onnx.load(source.onnx).graph.node if node.op_type == "Conv")
    shared = replace(source, calibration=calibration)
    found = [
        make(name, replace(shared, exclude=exclude)).path.read_bytes() for exclude in ((first,), ()) for name in names
    ]
    assert len(counted) == 1
    fresh = [
        make(name, replace(source, exclude=exclude, ranges={})).path.read_bytes()
        for exclude in ((first,), ())
        for name in names
    ]
    assert found == fresh
    assert len(set(found)) == 4


def test_every_row_of_the_table_fits_its_name_and_int8_is_raced_where_int8_is_asked_for():
    for name, spec in CANDIDATES.items():
        assert spec.name == name
        assert spec.portable == ("host" not in name)
        assert (spec.suffix == ".ort") == name.startswith("ort-")
        assert (spec.races == "with int8") == name.startswith("int8")


def test_the_ort_format_says_which_operators_a_minimal_build_must_have(source):
    made = make("ort-portable", source)
    lines = made.path.with_suffix(".required_operators.config").read_text()
    assert "com.microsoft;1;FusedConv" in lines
    assert 'Gemm{"inputs": {"0": ["float"]}}' in lines
    assert str(source.folder) not in lines


def test_what_a_model_or_an_installation_has_not_is_skipped_with_its_reason(source):
    with pytest.raises(NotApplicable, match="opset 20 already"):
        make("opset20", source)
    with pytest.raises(NotApplicable, match="nothing to fuse"):
        make("fused", source)
    with pytest.raises(ExportError, match="There is no candidate int4"):
        make("int4", source)


def test_the_old_tools_run_in_a_process_of_their_own_and_their_failure_is_one_line(source, tmp_path, monkeypatch):
    package = tmp_path / "onnxruntime_tools"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "optimizer.py").write_text(
        "import shutil\nclass Made:\n    def __init__(self, path): self.path = path\n"
        "    def save_model_to_file(self, to): shutil.copy(self.path, to)\n"
        "def optimize_model(path, **options): return Made(path)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    made = make("legacy", source)
    assert made.path.read_bytes() == source.onnx.read_bytes()
    (package / "optimizer.py").write_text("raise RuntimeError('symbolic shape inference: Range')\n")
    with pytest.raises(ExportError, match="onnxruntime-tools fails: RuntimeError: symbolic shape inference: Range"):
        make("legacy", source)
    assert not list(tmp_path.glob(".legacy*"))


def test_the_node_that_quantisation_hurts_most_comes_first(tmp_path):
    """Two layers; the second one's weights have one outlier per channel, which costs all others their precision."""
    made = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 18]>
        g (float[n, 16] input) => (float[n, 4] output) { a = MatMul (input, fine)  output = MatMul (a, rough) }"""
    )
    made.graph.node[0].name, made.graph.node[1].name = "fine_node", "rough_node"
    rng = np.random.default_rng(0)
    rough = rng.standard_normal((16, 4)).astype(np.float32)
    rough[0] = 3000
    fine = np.eye(16, dtype=np.float32)
    fine[:, 0] = 0  # the outlier meets nothing but zeros
    made.graph.initializer.extend(
        [onnx.numpy_helper.from_array(fine, "fine"), onnx.numpy_helper.from_array(rough, "rough")]
    )
    onnx.save(made, tmp_path / "m.onnx")
    feed = {"input": rng.standard_normal((8, 16)).astype(np.float32)}
    found = sensitivity(tmp_path / "m.onnx", batches=[feed], probe=feed)
    assert list(found) == ["rough_node", "fine_node"]
    assert found["rough_node"] > 5 * found["fine_node"]


def test_calibration_batches_that_are_none_or_do_not_fit_are_one_line(source, image):
    for batches, words in (
        ([], "no calibration batches"),
        ([{"input": image.numpy()[:, :, :4]}], r"shape \(2, 3, 4, 8\) for input, which takes"),
        ([{"input": image.numpy()[:0]}], "holds no samples"),
        ([{"pixels": image.numpy()}], "holds pixels; the model takes input"),
    ):
        with pytest.raises(ExportError, match=words):
            make("int8-minmax", replace(source, calibration=lambda b=batches: b))
    assert not [entry for entry in source.folder.iterdir() if "int8" in entry.name]


class Attention(nn.Module):
    """One self-attention with as many heads of 8 as pruning left: (N, 4, 16) -> the same."""

    def __init__(self, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(16, 24 * heads)
        self.out = nn.Linear(8 * heads, 16)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.heads, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)) + x


def test_what_the_fusions_print_becomes_a_note(source, capfd, monkeypatch):
    module = importlib.import_module("exporters.fusions")
    optimizer = importlib.import_module("onnxruntime.transformers.optimizer")
    tool = optimizer.optimize_model

    def talk(*arguments, **options):
        print("failed in shape inference")
        return tool(*arguments, **options)

    monkeypatch.setattr(optimizer, "optimize_model", talk)
    made = module.fuse(source.onnx, source.folder / "fused.onnx")
    assert "failed in shape inference" in made.notes
    assert capfd.readouterr().out == ""


def test_float16_halves_the_weights_of_a_convolutional_net_and_of_a_transformer(source, tiny_net, image, tmp_path):
    torch.manual_seed(0)
    transformer = nn.Sequential(nn.Linear(16, 16), Attention(3), nn.LayerNorm(16), nn.GELU(), Attention(1)).eval()
    x = torch.randn(2, 4, 16)
    program = torch.export.export(transformer, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    to_onnx(program, tmp_path / "transformer.onnx", example=(x,), opset=20, metadata={"parent": "abc"})
    other = replace(source, onnx=tmp_path / "transformer.onnx", folder=tmp_path)
    for net, given, feed in ((tiny_net, source, image), (transformer, other, x)):
        made = make("fp16", given)
        wanted = net(feed).detach().numpy()
        found = run(made.path, feed.numpy())
        assert found.dtype == np.float32
        assert 0 < np.abs(found - wanted).max() < 5e-3 * max(1, np.abs(wanted).max())
        model = onnx.load(made.path)
        onnx.checker.check_model(model)
        weights = [tensor for tensor in model.graph.initializer if len(tensor.dims) > 1]
        assert weights
        assert {tensor.data_type for tensor in weights} == {onnx.TensorProto.FLOAT16}
        assert describe(made.path).metadata["parent"] == "abc"
        assert (made.spec.budget, made.spec.portable) == ("accuracy", True)


def test_float16_leaves_the_nodes_that_hurt_in_float(source, image):
    first = next(node for node in onnx.load(source.onnx).graph.node if node.op_type == "Conv")
    made = make("fp16", replace(source, exclude=(first.name,)))
    types = {tensor.name: tensor.data_type for tensor in onnx.load(made.path).graph.initializer}
    assert types[first.input[1]] == onnx.TensorProto.FLOAT
    assert onnx.TensorProto.FLOAT16 in types.values()
    assert "1 node stays in float for accuracy" in made.notes
    assert np.isfinite(run(made.path, image.numpy())).all()


def test_float16_of_a_model_without_weights_is_no_candidate(source, tmp_path):
    made = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 18]>
        g (float[n, 3] input) => (float[n, 3] output) { output = Relu (input) }"""
    )
    onnx.save(made, tmp_path / "relu.onnx")
    with pytest.raises(NotApplicable, match="no weights in float32"):
        make("fp16", replace(source, onnx=tmp_path / "relu.onnx"))


def test_layers_with_other_head_counts_are_fused_right_and_the_audit_counts_them(tmp_path):
    torch.manual_seed(0)
    net, x = nn.Sequential(Attention(3), nn.LayerNorm(16), Attention(1)).eval(), torch.randn(2, 4, 16)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    assert expected_attention(program) == 2
    counts = {}
    for opset in (20, 23):
        path = tmp_path / f"{opset}.onnx"
        to_onnx(program, path, example=(x,), opset=opset, metadata={})
        counts[opset] = fused_attention(describe(path).operators)
        np.testing.assert_allclose(run(path, x.numpy()), net(x).detach(), rtol=1e-4, atol=1e-5)
    assert counts == {20: 0, 23: 2}
    made = fuse(tmp_path / "20.onnx", tmp_path / "fused.onnx")
    np.testing.assert_allclose(run(made.path, x.numpy()), net(x).detach(), rtol=1e-4, atol=1e-5)
    assert made.fused == {
        name.removeprefix("com.microsoft:"): count
        for name, count in made.summary.operators.items()
        if name.startswith("com.microsoft:")
    }
