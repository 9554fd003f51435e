"""The list of the zoo: what is wrong with it is said in one line, before anything runs."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "zoo.py"


@pytest.fixture(name="zoo")
def _zoo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("zoo", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[", "not JSON"),
        ('{"model": "resnet18"}', "give a list"),
        ('["resnet18"]', "entry 0"),
        ('[{"model": "resnet18"}, {"model": 3}]', "entry 1"),
        ('[{"model": "resnet18", "input": [3, 0, 4]}]', r"input is \[3, 0, 4\]"),
        ('[{"model": "resnet18", "input": [1, 3, 4, 8, 8]}]', r"input is \[1, 3, 4, 8, 8\]"),
        ('[{"model": "resnet18", "input": [3, 224, "x"]}]', "give \\[C, H, W\\]"),
    ],
)
def test_a_list_that_cannot_be_read_is_named(zoo: ModuleType, tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "models.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=said):
        zoo.read_entries(path)


def test_images_clips_and_models_that_know_their_input_are_taken(zoo: ModuleType, tmp_path: Path) -> None:
    entries = [{"model": "a", "input": [3, 8, 8]}, {"model": "b", "input": [3, 4, 8, 8]}, {"model": "hf:bert"}]
    entries.append({"model": "hf:gpt2", "input": [32]})
    path = tmp_path / "models.json"
    path.write_text(json.dumps(entries))
    assert zoo.read_entries(path) == entries


def line(zoo: ModuleType, **known: Any) -> dict[str, Any]:
    known = {"model": "m", "status": "exact", "params_before": 9, "params_after": 5, "blocked": [], **known}
    return {**dict.fromkeys(zoo.KEYS), **known}


def test_ctrl_c_keeps_the_lines_that_were_done(
    zoo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "models.json", tmp_path / "new" / "zoo.jsonl"
    path.write_text('[{"model": "a"}, {"model": "b"}]')

    def second_is_stopped(entry: dict[str, Any], _args: Any) -> dict[str, Any]:
        if entry["model"] == "b":
            raise KeyboardInterrupt
        return line(zoo, model="a")

    monkeypatch.setattr(zoo, "in_own_process", second_is_stopped)
    monkeypatch.setattr(sys, "argv", ["zoo.py", str(path), "--out", str(out)])
    assert zoo.main() == 130
    assert [json.loads(text)["model"] for text in out.read_text().splitlines()] == ["a"]
    assert "1 models: 1 exact" in capsys.readouterr().out


def test_a_control_that_stays_close_proves_nothing(zoo: ModuleType) -> None:
    class Expected:
        params, macs = 5, 7

    found = {"output_scale": 1.0, "max_abs_diff": 1e-7, "ort_max_abs_diff": 1e-7, "macs_after": 7}
    assert zoo.verdict(line(zoo, control_diff=1.0, **found), (), Expected, onnx=True) == ("exact", None)
    assert zoo.verdict(line(zoo, control_diff=5e-5, **found), (), Expected, onnx=True)[0] == "failed"
    rounded = found | {"max_abs_diff": 2e-5}
    assert zoo.verdict(line(zoo, control_diff=1.0, **rounded), (), Expected, onnx=True)[0] == "failed"
    found["ort_max_abs_diff"] = 2e-5
    assert zoo.verdict(line(zoo, control_diff=1.0, **found), (), Expected, onnx=True)[0] == "failed"


@pytest.mark.parametrize(
    ("found", "dense", "status"),
    [
        (2.3e-5, 1e-5, "exact"),  # 1.15 times the tolerance of 2e-5, at a scale of 2
        (2.3e-5, 1e-7, "failed"),
        (5e-5, 1e-5, "failed"),  # more than twice what the dense model differs by
        (0.1, 0.2, "failed"),  # a dense model that is wrong itself vouches for nothing
        (float("nan"), 1e-5, "failed"),
        (2.3e-5, None, "failed"),
    ],
)
def test_what_the_dense_model_differs_by_in_onnxruntime_is_the_yardstick(
    zoo: ModuleType, found: float, dense: float | None, status: str
) -> None:
    class Expected:
        params, macs = 5, 7

    known = {"output_scale": 2.0, "max_abs_diff": 1e-7, "macs_after": 7, "control_diff": 1.0}
    made = line(zoo, ort_max_abs_diff=found, dense_ort_diff=dense, **known)
    assert zoo.verdict(made, (), Expected, onnx=True)[0] == status
    assert "onnxruntime differs by" in zoo.verdict(made, (), Expected, onnx=True)[1]


def test_the_dense_model_runs_in_onnxruntime_only_where_the_tolerance_is_missed(
    zoo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net.py").write_text(DEAD_AT_FIRST.replace("-self.sign", "self.sign"))
    entry = {"model": f"{tmp_path / 'net.py'}:Net", "input": [3, 8, 8]}
    exact = zoo.shrink_one(entry, 0.5, 0, True)
    assert (exact["status"], exact["dense_ort_diff"]) == ("exact", None)
    monkeypatch.setattr(zoo, "TOLERANCE", 0.0)
    assert zoo.shrink_one(entry, 0.5, 0, True)["dense_ort_diff"] is not None


DEAD_AT_FIRST = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.sign = nn.Parameter(torch.zeros(1))  # drawn first, and above zero with seed 0
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        return torch.relu(-self.sign * self.b(torch.relu(self.a(x))).square())
"""


def test_weights_that_let_nothing_through_are_drawn_again(zoo: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(DEAD_AT_FIRST)
    entry = {"model": f"{tmp_path / 'net.py'}:Net", "input": [3, 8, 8]}
    found = zoo.shrink_one(entry, 0.5, 0, False)
    assert (found["status"], found["reason"]) == ("exact", None)
    assert found["output_scale"] > 0
    zoo.DRAWS = 1
    assert zoo.shrink_one(entry, 0.5, 0, False)["status"] == "failed"


def test_a_fit_comes_nearer_to_dense_and_is_shrunk_as_exactly(zoo: ModuleType) -> None:
    entry = {"model": "resnet18", "input": [3, 32, 32]}
    plain, fitted = (zoo.shrink_one(entry, 0.5, 0, False, samples) for samples in (0, 12))
    assert (plain["status"], plain["fit_error"]) == ("exact", None)
    assert (fitted["status"], fitted["params_after"]) == ("exact", plain["params_after"])
    before, after = fitted["fit_error"]
    assert after < 0.5 * before
    assert fitted["fitted"] > 0
    assert "error" in zoo.row(fitted)


def test_a_fit_that_does_not_run_says_why_and_the_rest_is_proven(zoo: ModuleType) -> None:
    few = zoo.shrink_one({"model": "resnet18", "input": [3, 32, 32]}, 0.5, 0, False, 3)
    assert few["status"] == "exact"
    assert "3" in few["fit_refused"]
    assert f"no fit: {few['fit_refused']}" in zoo.row(few)
