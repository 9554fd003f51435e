"""Data without labels: the dense model's answers stand in their place, and the verdict says what that proves."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from pipeline import data
from pipeline.artifacts import Baseline
from pipeline.cli import main
from pipeline.gate import measuring
from pipeline.release import store
from pipeline.release.opening import open_release
from pipeline.sweep import rows
from pipeline.tasks import classification
from tests.pipeline.chain import QUICK, TINY, figures, said
from tests.pipeline.tiny import TinyNet

TASK = classification.task("classification", "output")

SIZE = (3, 16, 16)
CHAIN = ["deploy", f"{TINY}:build", *QUICK]


def deployed(folder: Path, *words: str, code: int = 0) -> str:
    return said(folder, *CHAIN, *words, code=code)


@pytest.fixture(scope="module")
def weights(tmp_path_factory, knows_digits) -> Path:
    """Of a tiny net that knows the digits."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file({name: value.contiguous() for name, value in knows_digits.state_dict().items()}, path)
    return path


def fitted(weights: Path, inputs: Path) -> list[str]:
    """A quarter of every group cut, and the rest fitted to inputs without labels."""
    words = ["--data", f"npz:{inputs}", "--weights", str(weights), "--set", "finetune.recover=closed-form"]
    return [*words, "--set", "prune.ratio=0.25", "--set", "gate.min_agreement=0.6"]


@pytest.fixture(scope="module")
def version(tmp_path_factory, weights, unlabelled_digits) -> Path:
    folder = tmp_path_factory.mktemp("artifacts")
    text = deployed(folder, *fitted(weights, unlabelled_digits))
    assert "agreement with dense" in text
    return folder / "tiny" / "v0001"


def test_agreement_is_judged_and_no_accuracy_is_claimed(version):
    checked = figures(version, "7-validate")
    assert not checked["labelled"]
    assert checked["accuracy"] is checked["dense_accuracy"] is None
    assert not any(key.startswith("accuracy") for key in checked["measurements"])
    assert checked["agreement"] == checked["measurements"]["agreement vs dense"]["value"]
    assert 0.6 < checked["agreement"] <= 1
    assert 0.9 < checked["cosine"] <= 1
    verdict = json.loads((version / "verdict.json").read_text())
    judged = {check["limit"]["metric"]: check["limit"]["value"] for check in verdict["checks"]}
    assert judged["agreement with dense"] == 0.6
    assert judged["cosine of the outputs with dense"] == 0.9
    assert not any("accuracy" in metric for metric in judged)
    assert any("no labels" in note for note in verdict["notes"])


def test_what_is_shown_says_agreement_and_never_accuracy(version):
    for name in ("report.html", "report.md"):
        text = re.sub(r"<(style|script).*?</\1>", "", (version / name).read_text(), flags=re.S)
        assert "Agreement with dense" in text, name
        assert not re.search(r"\bAccuracy\b", text), name
    out = version.parent.parent
    assert "as dense" in said(out, "list")
    shown = said(out, "show", "tiny")
    assert "agreement with dense" in shown
    assert "accuracy" not in shown


def test_the_answers_are_the_dense_models_own(version, weights, unlabelled_digits):
    model = TinyNet().eval()
    model.load_state_dict(load_file(weights))
    answers, classes = Baseline.load(version / "0-baseline").answers()
    assert classes == 10
    found = data.load(f"npz:{unlabelled_digits}", input_size=SIZE)
    for part, numbers in answers.items():
        with torch.no_grad():
            wanted = torch.cat([model(x).argmax(1) for (x,), _ in found.batches(part)])
        assert torch.equal(numbers, wanted)
    assert not found.labelled


def test_it_is_judged_the_same_again_and_by_another_policy(version, tmp_path):
    out = version.parent.parent
    assert "the data has no labels" in said(out, "gate", "tiny")
    policy = tmp_path / "strict.toml"
    policy.write_text("min_agreement = 1.0\n")
    agreement = figures(version, "7-validate")["agreement"]
    told = said(out, "gate", "tiny", "--policy", str(policy), code=0 if agreement == 1 else 1)
    assert agreement == 1 or "Agreement with dense" in told
    policy.write_text('[[limits]]\nmetric = "accuracy"\nmin = 0.5\n')
    assert "Accuracy" in said(out, "gate", "tiny", "--policy", str(policy), code=1)  # asked for, and not measured


def test_where_the_answers_fall_short_and_nothing_was_trained_that_is_said(version, weights, unlabelled_digits):
    out, why = version.parent.parent, "training: not asked for (recover = 'closed-form')"
    assert why not in said(out, "show", "tiny/v0001")  # it passed
    words = fitted(weights, unlabelled_digits)

    def in_a_sweep() -> tuple[str, ...]:
        return rows.of("macs", "0.5", open_release(max(version.parent.glob("v*")))).reasons

    short = deployed(out, *words, "--set", "gate.min_cosine=0.9999999", code=1)
    assert why in short
    assert f"T{why[1:]}." in in_a_sweep()
    large = deployed(out, *words, "--set", "gate.max_size_ratio=0.001", code=1)
    assert "file size" in large and why not in large
    assert not any(why[1:] in reason for reason in in_a_sweep())


def test_other_answers_are_other_data(version, unlabelled_digits, tmp_path):
    """The stages after the baseline depend on the answers: other dense weights, and none of them is reused."""
    torch.manual_seed(1)
    other = tmp_path / "other.safetensors"
    save_file({name: value.contiguous() for name, value in TinyNet().state_dict().items()}, other)
    words = [f"{TINY}:build", *QUICK, "--data", f"npz:{unlabelled_digits}", "--weights", str(other)]
    result = CliRunner().invoke(main, ["plan", *words, "--out", str(version.parent.parent), "--json"])
    assert result.exit_code == 0, result.output
    assert {step["action"] for step in json.loads(result.stdout)["stages"]} == {"run"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "has no labels, so that resnet18 cannot be trained on it"),
        (["--weights", "train"], "cannot be trained"),
        (["--weights", "{weights}", "--set", "prune.criterion=taylor"], "needs the labels"),
    ],
)
def test_what_needs_labels_is_refused_before_anything_is_spent(tmp_path, unlabelled_digits, weights, words, says):
    model = "resnet18" if not words else f"{TINY}:build"
    words = [word.format(weights=weights) for word in words]
    text = said(tmp_path, "deploy", model, "--data", f"npz:{unlabelled_digits}", *words, code=2)
    assert says in text
    assert not list(tmp_path.iterdir())


def test_weights_of_another_number_of_classes_are_told_how_to_be_taken(tmp_path, unlabelled_digits, weights):
    state = load_file(weights)
    state["head.weight"], state["head.bias"] = state["head.weight"][:4].clone(), state["head.bias"][:4].clone()
    fewer = tmp_path / "four.safetensors"
    save_file(state, fewer)
    words = [*CHAIN, "--data", f"npz:{unlabelled_digits}", "--weights", str(fewer), "--until", "baseline"]
    assert "--set data.classes=NUMBER" in said(tmp_path / "out", *words, code=2)
    said(tmp_path / "out", *words, "--set", "data.classes=4")
    made = Baseline.load(tmp_path / "out" / "tiny" / store.PARTIAL / "0-baseline")
    assert made.answers()[1] == 4


def test_classes_are_for_data_without_labels(tmp_path):
    assert "labels of 10 classes" in said(tmp_path, "deploy", f"{TINY}:build", "--set", "data.classes=4", code=2)


def test_a_dense_model_with_one_answer_proves_nothing(tmp_path, unlabelled_digits, weights):
    state = load_file(weights)
    state["head.bias"] = torch.tensor([100.0] + [0.0] * 9)
    constant = tmp_path / "constant.safetensors"
    save_file(state, constant)
    words = ["--data", f"npz:{unlabelled_digits}", "--weights", str(constant), "--set", "finetune.recover=none"]
    assert "only guesses" in deployed(tmp_path / "out", *words, code=1)
    assert not (tmp_path / "out" / "tiny" / "current").exists()


def test_a_dense_model_that_gives_nan_has_no_answers(tmp_path, unlabelled_digits, weights):
    state = load_file(weights)
    state["head.bias"] = torch.full((10,), float("nan"))
    broken = tmp_path / "broken.safetensors"
    save_file(state, broken)
    assert "NaN" in deployed(tmp_path / "out", "--data", f"npz:{unlabelled_digits}", "--weights", str(broken), code=2)


def test_made_up_labels_do_not_pass(tmp_path, unlabelled_digits, weights):
    """A dense model that is never right, and a shipped one that is never right either: no drop, and no proof."""
    with np.load(unlabelled_digits) as file:
        x = file["x"]
    labelled = tmp_path / "labelled.npz"
    np.savez(labelled, x=x, y=np.random.default_rng(0).integers(0, 10, len(x)))
    words = ["--data", f"npz:{labelled}", "--weights", str(weights), "--set", "finetune.recover=none"]
    text = deployed(tmp_path / "out", *words, "--set", "gate.max_accuracy_drop_points=100", code=1)
    assert "only guesses" in text
    assert not (tmp_path / "out" / "tiny" / "current").exists()


def test_files_from_elsewhere_agree_with_the_one_they_are_held_against(version, unlabelled_digits):
    dense = version / "0-baseline" / "dense.onnx"
    shipped = version / "6-optimize" / figures(version, "6-optimize")["ships"]
    words = ["--data", f"npz:{unlabelled_digits}", "--input-size", "3,16,16", "--seconds", "0.1"]
    told = CliRunner().invoke(main, ["gate", str(shipped), "--against", str(dense), *words]).output
    assert "agreement with dense" in told
    assert "no labels" in told
    same = CliRunner().invoke(main, ["check", str(dense), str(dense), *words])
    assert same.exit_code == 0, same.output


@pytest.mark.parametrize(("least", "alike"), [(0.0, None), (0.5, 1.0)])
def test_outputs_without_a_direction_have_no_cosine_and_break_nothing_else(least, alike):
    """Logits of a model that ends in a ReLU can all be zero for a sample."""

    def infer(feed):
        return {"y": np.full((len(feed["x"]), 3), least, np.float32)}

    spec = SimpleNamespace(name="x", dtype="float32", shape=("n", 3, 16, 16))
    runner = SimpleNamespace(name="m", inputs=[spec], infer=infer)
    digits = data.load("digits", input_size=SIZE)
    named = replace(digits, inputs=(replace(digits.inputs[0], name="x"),))
    found = measuring._cosine({"dense": runner, "shipped": runner}, named)
    assert (found and found.value) == (None if alike is None else pytest.approx(alike))
