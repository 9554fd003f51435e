"""`gate` and `check` on models made elsewhere: each way of doctoring one is caught, and the reason names it."""

import json
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper

from pipeline.cli import main
from validators import OrtRunner, latency, turns
from validators.apart import Here

CLASSES = 4
RNG = np.random.default_rng(7)  # not the seed of the random inputs: they would be the first centre itself
CENTRES = RNG.standard_normal((CLASSES, 3, 8, 8)).astype(np.float32)
LOOSE = "max_accuracy_drop_points = 1.0\nmax_latency_ratio = 1.5\nmax_size_ratio = 1.5\n"


def classifier(path: Path, weight: np.ndarray, *, slow: int = 0) -> Path:
    """logits = flatten(x) @ weight, and `slow` products with a large identity that change nothing but the time."""
    nodes = [helper.make_node("Flatten", ["input"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["logits_0"])]
    tensors = [numpy_helper.from_array(weight, "w")]
    if slow:
        tensors.append(numpy_helper.from_array(np.float32(0), "zero"))
        nodes.append(helper.make_node("MatMul", ["flat", "v"], ["wide_0"]))
        tensors.append(numpy_helper.from_array(np.zeros((weight.shape[0], 64), np.float32), "v"))
        tensors.append(numpy_helper.from_array(np.eye(64, dtype=np.float32), "i"))
        for step in range(slow):
            nodes.append(helper.make_node("MatMul", [f"wide_{step}", "i"], [f"wide_{step + 1}"]))
        nodes.append(helper.make_node("ReduceSum", [f"wide_{slow}"], ["nothing"], keepdims=0))
        nodes.append(helper.make_node("Add", ["logits_0", "nothing"], ["logits"]))
    else:
        nodes.append(helper.make_node("Identity", ["logits_0"], ["logits"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", CLASSES])],
        tensors,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Time as data: an inference takes a millisecond for each operator, whatever this machine does meanwhile."""
    now = [0.0]
    infer = OrtRunner.infer

    def timed(self, feed):
        if not hasattr(self, "operators"):
            self.operators = len(onnx.load(self.path).graph.node)
        now[0] += 1e-3 * self.operators
        return infer(self, feed)

    passed = lambda: now[0]  # noqa: E731
    fake = SimpleNamespace(perf_counter=passed, process_time=passed, get_clock_info=time.get_clock_info)
    for module in (latency, turns):
        monkeypatch.setattr(module, "time", fake)
    monkeypatch.setattr(latency, "taking_turns", lambda runners, feed: nullcontext(Here(runners, feed)))
    monkeypatch.setattr(OrtRunner, "infer", timed)


@pytest.fixture
def world(tmp_path):
    """A good model, its data, and a loose policy."""
    labels = np.arange(240) % CLASSES
    images = CENTRES[labels] + 0.3 * RNG.standard_normal((240, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=images, y=labels)
    (tmp_path / "policy.toml").write_text(LOOSE)
    weight = CENTRES.reshape(CLASSES, -1).T.copy()
    classifier(tmp_path / "dense.onnx", weight)
    return tmp_path, weight


def leanort(*words: object, code: int) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def gate(folder: Path, *words: object, code: int, size: str = "max_size_ratio = 1.5") -> str:
    (folder / "policy.toml").write_text(LOOSE.replace("max_size_ratio = 1.5", size))
    return leanort(
        "gate", folder / "shipped.onnx", "--against", folder / "dense.onnx", "--data", f"npz:{folder / 'data.npz'}",
        "--policy", folder / "policy.toml", "--seconds", 0.4, *words, code=code,
    )  # fmt: skip


def test_an_equal_model_passes_and_ci_gets_its_files(world, monkeypatch):
    folder, weight = world
    classifier(folder / "shipped.onnx", weight)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(folder / "summary.md"))
    gate(folder, "--report", folder / "ci", "--equal-to", folder / "dense.onnx", "--metric", "cosine", code=0)
    made = json.loads((folder / "ci" / "verdict.json").read_text())
    assert made["outcome"] == "pass"
    assert made["measurements"]["cosine"]["value"] == pytest.approx(1)
    assert {"latency_p99 vs dense", "peak_memory", "cold_first_inference", "parameters vs dense"} <= set(
        made["measurements"]
    )
    assert made["measurements"]["macs"]["value"] == weight.size
    assert made["measurements"]["macs vs dense"]["value"] == 1
    assert "testcase" in (folder / "ci" / "junit.xml").read_text()
    assert (folder / "summary.md").read_text() == (folder / "ci" / "report.md").read_text() + "\n"


def test_one_changed_weight_is_caught_by_parity(world):
    folder, weight = world
    weight[7, 2] += 1e-2
    classifier(folder / "shipped.onnx", weight)
    said = leanort("check", folder / "dense.onnx", folder / "shipped.onnx", "--seconds", 0.1, code=1)
    assert "Parity dense.onnx - shipped.onnx" in said
    assert "random, batch 1: logits" in said
    assert "shipped.onnx first differs at logits_0, made by MatMul" in said
    weight[7, 2] -= 1e-2
    classifier(folder / "shipped.onnx", weight)
    leanort("check", folder / "dense.onnx", folder / "shipped.onnx", "--seconds", 0.1, code=0)


def test_a_difference_that_only_real_samples_show_is_caught_by_parity(world):
    """A bump around the logits that a class's own samples get, far from those of random and of huge inputs."""
    folder, weight = world
    model = onnx.load(classifier(folder / "shipped.onnx", weight))
    middle = (RNG.standard_normal((999, len(weight))).astype(np.float32) @ weight).std() * 13
    for name, value in (("middle", middle), ("width", middle / 4), ("height", 0.5)):
        model.graph.initializer.append(numpy_helper.from_array(np.float32(value), name))
    del model.graph.node[-1]
    model.graph.node.extend(
        helper.make_node(operator, read, [made])
        for operator, read, made in (
            ("Sub", ["logits_0", "middle"], "off"), ("Div", ["off", "width"], "scaled"),
            ("Mul", ["scaled", "scaled"], "square"), ("Neg", ["square"], "minus"), ("Exp", ["minus"], "bump"),
            ("Mul", ["bump", "height"], "high"), ("Add", ["logits_0", "high"], "logits"),
        )
    )  # fmt: skip
    onnx.save(model, folder / "shipped.onnx")
    words = ("check", folder / "dense.onnx", folder / "shipped.onnx", "--seconds", 0.1)
    leanort(*words, code=0)
    assert "real, batch 1: logits" in leanort(*words, "--data", f"npz:{folder / 'data.npz'}", code=1)


def test_a_slower_graph_is_caught_by_latency(world):
    folder, weight = world
    classifier(folder / "shipped.onnx", weight, slow=300)
    limits = 'max_size_ratio = inf\n[[limits]]\nmetric = "macs"\nagainst = "dense"\nmax = 1.0\n'
    said = gate(folder, code=1, size=limits)
    assert "Latency (of dense): 102, but" in said  # 305 operators beside 3
    assert "MACs (of dense): " in said


def test_one_broken_class_is_caught_by_accuracy_and_named(world):
    folder, weight = world
    weight[:, 2] = -weight[:, 2]
    classifier(folder / "shipped.onnx", weight)
    said = gate(folder, code=1)
    assert "Accuracy drop (points): 25.0" in said
    assert "class 2 lost most" in said


def test_two_swapped_labels_are_caught_and_named(world):
    folder, weight = world
    classifier(folder / "shipped.onnx", weight[:, [0, 3, 2, 1]])
    said = gate(folder, code=1)
    assert "Accuracy drop (points): 50.0" in said
    assert "class 1 lost most" in said
    assert "mostly called 3" in said


def test_no_data_and_a_model_that_cannot_run_fail_and_never_pass(world):
    folder, weight = world
    classifier(folder / "shipped.onnx", weight)
    words = ("gate", folder / "shipped.onnx", "--against", folder / "dense.onnx", "--seconds", 0.1)
    assert "Accuracy drop (points) was not measured" in leanort(*words, code=1)
    (folder / "shipped.onnx").write_bytes(b"not a model")
    said = leanort(*words, code=1)
    assert "Session load of shipped could not be measured: onnxruntime" in said
    assert "cannot load" in said
    assert "Accuracy drop (points) was not measured" in said


def test_what_is_given_wrongly_is_one_line(world):
    folder, weight = world
    dense = classifier(folder / "shipped.onnx", weight)
    assert "--against" in leanort("gate", dense, code=2)
    assert "no file" in leanort("gate", dense, "--against", folder / "none.onnx", code=2)
    assert "no metric 'f1'" in leanort("check", dense, dense, "--metric", "f1", code=2)
    assert "NAME=NUMBER" in leanort("check", dense, dense, "--size", "a", code=2)
    assert "own measurements" in leanort("gate", "m/v0001", "--against", dense, "--out", folder, code=2)
    measuring = (["--data", "npz:none.npz"], ["--threads", 1], ["--metric", "top5"], ["--size", "n=1"])
    for words in (["--equal-to", dense], *measuring):
        told = leanort("gate", "m/v0001", *words, "--out", folder, code=2)
        assert f"{words[0]} is for a model file" in told
    assert "no version" in leanort("gate", "m/v0001", "--out", folder, code=2)


def test_an_own_metric_is_limited_like_any_other(world):
    folder, weight = world
    classifier(folder / "shipped.onnx", weight)
    (folder / "scores.py").write_text("def margin(logits, labels):\n    return logits.max(1) - logits.min(1)\n")
    (folder / "own.toml").write_text(LOOSE + '[[limits]]\nmetric = "margin"\nmin = 1e9\n')
    said = leanort(
        "gate", folder / "shipped.onnx", "--against", folder / "dense.onnx", "--data", f"npz:{folder / 'data.npz'}",
        "--policy", folder / "own.toml", "--seconds", 0.1, "--metric", f"{folder / 'scores.py'}:margin", code=1,
    )  # fmt: skip
    assert "Margin" in said
    assert "at least" in said


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("return logits", "it gave an array of shape (48, 4) for 48 samples"),
        ("return logits.max(1) * float('nan')", "it gave a score that is not a finite number"),
        ("return None", "it gave an array of shape () for 48 samples"),
        ("return 'good'", "it gave text where numbers should be"),
        ("return ['1.0'] * len(labels)", "it gave text where numbers should be"),
        ("return logits.max(1) + 1j", "it gave complex numbers where numbers should be"),
        ("return (logits.max(1) > 0).astype('M8[s]')", "it gave dates where numbers should be"),
        ("return [None] * len(labels)", "it gave a score that is not a finite number"),
        ("return [[1], [1, 2]]", "ValueError: "),
        ("import torch; return torch.ones(3)", "it gave an array of shape (3,) for 48 samples"),
        ("import torch; return torch.ones(len(labels), requires_grad=True)", "RuntimeError: "),
        ("return logits.max(1) * 0 + 1e308 * (-1.0) ** labels", "it gave a score that is not a finite number"),
        ("raise type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})", "Mute"),
        ("raise type('Mute', (Exception,), {'__str__': lambda self: __import__('sys').exit(0)})", "Mute"),
        ("raise type('Mute', (Exception,), {'__str__': lambda self: None})", "Mute"),
    ],
)
def test_an_own_metric_that_breaks_off_fails_whatever_is_limited_and_the_rest_is_measured(world, body, why):
    folder, weight = world
    classifier(folder / "shipped.onnx", weight)
    (folder / "scores.py").write_text(f"def margin(logits, labels):\n    {body}\n")
    said = gate(folder, "--metric", f"{folder / 'scores.py'}:margin", "--report", folder / "ci", code=1)
    assert f"Metric margin could not be measured: {why}" in said
    made = json.loads((folder / "ci" / "verdict.json").read_text())
    assert [line for line in made["reasons"] if "margin" not in line] == []
    assert made["measurements"]["accuracy"]["value"] == 1
    assert "margin" not in made["measurements"]


@pytest.mark.parametrize("name", ["accuracy", "latency", "file_size", "top5", "cosine", "macs"])
def test_an_own_metric_cannot_take_the_place_of_what_the_gate_measures(world, name):
    folder, weight = world
    classifier(folder / "shipped.onnx", -weight)  # always wrong
    (folder / "scores.py").write_text(f"def {name}(logits, labels):\n    return 0.0 * labels\n")
    said = gate(folder, "--metric", f"{folder / 'scores.py'}:{name}", code=2)
    assert f"the gate itself measures a {name}" in said


def test_two_own_metrics_of_one_name_are_refused(world):
    folder, weight = world
    classifier(folder / "shipped.onnx", weight)
    for file in ("one.py", "two.py"):
        (folder / file).write_text("def margin(logits, labels):\n    return 0.0 * labels\n")
    said = gate(folder, "--metric", f"{folder / 'one.py'}:margin", "--metric", f"{folder / 'two.py'}:margin", code=2)
    assert "two metrics are called margin" in said


def test_an_own_metric_that_writes_into_what_it_is_given_changes_no_accuracy(world):
    folder, weight = world
    classifier(folder / "shipped.onnx", -weight)
    body = "labels[:] = 0\n    logits[:] = 0\n    return 0.0 * labels"
    (folder / "scores.py").write_text(f"def margin(logits, labels):\n    {body}\n")
    gate(folder, "--metric", f"{folder / 'scores.py'}:margin", "--report", folder / "ci", code=1)
    made = json.loads((folder / "ci" / "verdict.json").read_text())
    assert made["measurements"]["accuracy"]["value"] == 0
    assert made["measurements"]["accuracy vs dense"]["value"] == 100
