"""The whole chain killed, crashed and doctored: it resumes, or it is sealed as a fail that names the reason."""

import html
import json
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch.export import ExportedProgram

from pipeline.artifacts.program import Exported, Shrunk
from pipeline.gate import chain
from pipeline.release import store
from pipeline.stages import s7_validate
from tests.pipeline.chain import QUICK, STAGES, TINY, deploy, figures, forked, said
from validators import OrtRunner, turns


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_killed_in_every_stage_in_turn_resumes_and_ends_in_the_same_result(artifacts, version, tmp_path):
    model = tmp_path / "tiny"
    for number, stage in enumerate(STAGES):
        with forked(tmp_path, "deploy", f"{TINY}:build", *QUICK) as (process, _, _):
            deadline = time.monotonic() + 120
            while not (model / ".partial" / f"{number}-{stage}.building" / ".fingerprint").exists():
                assert process.is_alive(), "the run ended before it could be killed"
                assert time.monotonic() < deadline
                time.sleep(0.002)
            process.kill()
        # What a kill may leave at any moment: half a checkpoint, half a candidate with its files, a finished picture.
        building = model / ".partial" / f"{number}-{stage}.building"
        (building / ".model.portable.onnx.x.partial").mkdir(parents=True, exist_ok=True)
        for name in (".model.portable.onnx.x.partial/model.onnx", ".training.pt.1.partial", "left.svg"):
            (building / name).write_bytes(b"half")
        (building / s7_validate.WORSE).mkdir()
        complete = [p.parent.name for p in sorted(model.glob(".partial/*/stage.json"))]
        assert complete == [f"{n}-{name}" for n, name in enumerate(STAGES[:number])]
        assert not (model / "v0001").exists()
    done = deploy(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("reused from the interrupted run") == len(STAGES) - 1
    for name in ("0-baseline/weights.safetensors", "3-fold/weights.safetensors", "4-shrink/ledger.json"):
        assert (model / "v0001" / name).read_bytes() == (version / name).read_bytes(), name
    assert sorted(p.name for p in model.iterdir()) == [".lock", "current", "v0001"]
    kept = {str(path.relative_to(version)) for path in version.rglob("*")}
    assert {str(path.relative_to(model / "v0001")) for path in (model / "v0001").rglob("*")} <= kept
    assert said(tmp_path, "verify", "tiny/v0001")


def test_no_room_for_the_shrunk_program_is_one_line_that_names_it_and_the_next_run_goes_on(tmp_path):
    """The operating system itself cuts the write short."""
    short = ["--set", "baseline.train={epochs=1}", "--set", "finetune.train={epochs=1}"]
    said(tmp_path, "deploy", f"{TINY}:build", *QUICK, *short, "--until", "fold")
    done = deploy(tmp_path, *short, "--until", "shrink", largest=40_000)
    output = done.stdout + done.stderr
    assert done.returncode == 3, output
    assert "Traceback" not in output
    (error,) = (line for line in output.splitlines() if line.startswith("error:"))
    assert "4-shrink.building/shrunk.pt2 cannot be written: File too large" in error
    again = said(tmp_path, "deploy", f"{TINY}:build", *QUICK, *short, "--until", "shrink")
    assert again.count("reused from the interrupted run") == 4


@pytest.mark.slow
def test_a_run_killed_between_epochs_goes_on_with_the_next_one(version, tmp_path):
    """The long stage: its checkpoint is used, and the weights are those of a run that was never killed."""
    checkpoint = tmp_path / "tiny" / ".partial" / "0-baseline.building" / "training.pt"
    with forked(tmp_path, "deploy", f"{TINY}:build", *QUICK, "--until", "baseline") as (process, _, _):
        while not checkpoint.exists():
            assert process.is_alive()
            time.sleep(0.002)
        process.kill()
    assert "Resuming after epoch" in said(tmp_path, "deploy", f"{TINY}:build", *QUICK, "--until", "baseline")
    resumed = tmp_path / "tiny" / ".partial" / "0-baseline" / "weights.safetensors"
    assert resumed.read_bytes() == (version / "0-baseline" / "weights.safetensors").read_bytes()


def sealed(artifacts: Path, tmp_path: Path) -> Path:
    """A copy of the folder with the passed version alone, to deploy into."""
    copy = tmp_path / "artifacts"
    shutil.copytree(artifacts / "tiny" / "v0001", copy / "tiny" / "v0001")
    store.point_current(copy / "tiny", copy / "tiny" / "v0001")
    return copy


def crashed(folder: Path) -> tuple[Path, str]:
    """The newest version below `folder`, whose gate broke off: sealed, verified, said to CI; and its reasons."""
    newest = sorted((folder / "tiny").glob("v*"))[-1]
    assert said(folder, "verify", f"tiny/{newest.name}")
    made = json.loads((newest / "verdict.json").read_text())
    assert (made["outcome"], made["exit_code"]) == ("fail", 1)
    reasons = "\n".join(made["reasons"])
    suite = ElementTree.parse(newest / "junit.xml").getroot()
    assert int(suite.get("failures")) == len(made["reasons"])
    page = html.unescape((newest / "report.html").read_text())
    for line in made["reasons"]:
        assert line[0].upper() + line[1:] in page
    assert not (newest / "bundle").exists()
    assert (folder / "tiny" / "current").resolve().name == "v0001"
    assert "fail" in said(folder, "list")
    said(folder, "show", "tiny")
    assert "7-validate" in said(folder, "diff", "tiny/v0001", f"tiny/{newest.name}")
    assert "could not be measured" in said(folder, "gate", f"tiny/{newest.name}", code=1)
    return newest, reasons


def test_an_own_metric_that_crashes_is_sealed_as_a_fail_and_tried_again_once_mended(artifacts, version, tmp_path):
    folder = sealed(artifacts, tmp_path)
    score = tmp_path / "score.py"
    score.write_text("def margin(logits, labels):\n    raise RuntimeError('no such column')\n")
    own = ["--set", f'gate.metrics=["{score}:margin"]']
    shown = said(folder, "deploy", f"{TINY}:build", *QUICK, *own, code=1)
    assert "metric margin could not be measured: RuntimeError: no such column" in shown
    newest, reasons = crashed(folder)
    assert reasons == "metric margin could not be measured: RuntimeError: no such column"
    assert figures(newest, "7-validate")["accuracy"] > 0.5
    steps = json.loads(said(folder, "plan", f"{TINY}:build", *QUICK, *own, "--json"))["stages"]
    assert [step["stage"] for step in steps if step["action"] == "run"] == ["7-validate"]


def test_a_session_that_cannot_be_loaded_is_sealed_as_a_fail(artifacts, version, tmp_path):
    folder = sealed(artifacts, tmp_path)
    live = folder / "tiny" / "v0001" / "6-optimize" / figures(version, "6-optimize")["ships"]
    whole = live.read_bytes()
    live.chmod(0o644)
    live.write_bytes(b"not a model")
    said(folder, "deploy", f"{TINY}:build", *QUICK, "--set", "gate.seed=3", "--from", "optimize", code=1)
    live.write_bytes(whole)
    newest, reasons = crashed(folder)
    assert "session load of promoted could not be measured: onnxruntime" in reasons
    assert figures(newest, "7-validate")["bytes"] > 0
    assert figures(newest, "7-validate")["latency_ms"] is None


def test_a_session_that_dies_while_it_runs_is_sealed_as_a_fail(artifacts, version, tmp_path, monkeypatch):
    def infer(self: OrtRunner, feed: object) -> dict:
        if self.name == "shipped":
            raise RuntimeError("the kernel gave up")
        return real(self, feed)

    real = OrtRunner.infer
    monkeypatch.setattr(OrtRunner, "infer", infer)
    dying = tmp_path / "dying.py"  # in the process that times, as a kernel that is killed does
    dying.write_text("import os, sys\nsys.stdin.readline()\nos.kill(os.getpid(), 9)\n")
    monkeypatch.setattr(turns, "__file__", str(dying))
    folder = sealed(artifacts, tmp_path)
    said(folder, "deploy", f"{TINY}:build", *QUICK, "--set", "gate.seed=1", code=1)
    newest, reasons = crashed(folder)
    assert "accuracy could not be measured: RuntimeError: the kernel gave up" in reasons
    assert "latency could not be measured: The process that times" in reasons
    assert "ended (exit code -9)" in reasons
    assert "latency (of dense) was not measured" in reasons
    assert figures(newest, "7-validate")["bytes"] > 0
    assert not (newest / "7-validate" / "latency.json").exists()


def test_parity_that_breaks_off_is_sealed_as_a_fail(artifacts, version, tmp_path, monkeypatch):
    monkeypatch.setattr(s7_validate, "compare_chain", lambda *args, **kwargs: 1 / 0)
    folder = sealed(artifacts, tmp_path)
    said(folder, "deploy", f"{TINY}:build", *QUICK, "--set", "gate.seed=2", code=1)
    newest, reasons = crashed(folder)
    assert reasons == "parity could not be measured: ZeroDivisionError: division by zero"
    assert figures(newest, "7-validate")["latency_ms"] > 0


def test_a_weight_changed_in_the_shrunk_program_is_caught_and_its_layer_named(
    artifacts, version, tmp_path, monkeypatch
):
    def program(self: Shrunk) -> ExportedProgram:
        made = real(self)
        with torch.no_grad():
            made.state_dict["blocks.2.conv1.weight"][3, 2, 1, 1] += 1
        return made

    real = Shrunk.program
    monkeypatch.setattr(Shrunk, "program", program)
    folder = sealed(artifacts, tmp_path)
    shown = said(folder, "deploy", f"{TINY}:build", *QUICK, "--set", "gate.seed=4", code=1)
    assert "parity folded - shrunk" in shown
    doctored(folder, "shrunk", "conv2d (blocks.2.conv1)", "conv2d (blocks.2.conv1)")


def test_a_weight_changed_in_the_exported_file_is_caught_and_its_layer_named(artifacts, version, tmp_path, monkeypatch):
    model = onnx.load(version / "5-export" / "model.onnx")
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == convolutions[2].input[1])
    changed = numpy_helper.to_array(weight).copy()
    changed[3, 2, 1, 1] += 1
    weight.CopyFrom(numpy_helper.from_array(changed, weight.name))
    onnx.save(model, tmp_path / "changed.onnx")
    monkeypatch.setattr(Exported, "onnx", property(lambda self: tmp_path / "changed.onnx"))
    folder = sealed(artifacts, tmp_path)
    shown = said(folder, "deploy", f"{TINY}:build", *QUICK, "--set", "gate.seed=5", code=1)
    assert "parity shrunk - exported" in shown
    doctored(folder, "exported", "conv2d (blocks.0.conv2)", f"Conv {convolutions[2].name}")


def test_a_search_that_breaks_off_takes_no_verdict_with_it(artifacts, version, tmp_path, monkeypatch):
    """What is read of a graph to say where it parts may be anything: that it parts was measured before."""

    def search(*args: object, **kwargs: object) -> None:
        raise AttributeError("a node of another kind\nand more")

    real = Shrunk.program

    def program(self: Shrunk) -> ExportedProgram:
        made = real(self)
        with torch.no_grad():
            made.state_dict["blocks.2.conv1.weight"][3, 2, 1, 1] += 1
        return made

    monkeypatch.setattr(Shrunk, "program", program)
    monkeypatch.setattr(chain, "first_unmatched", search)
    folder = sealed(artifacts, tmp_path)
    shown = said(folder, "deploy", f"{TINY}:build", *QUICK, "--set", "gate.seed=6", code=1)
    assert "parity folded - shrunk" in shown
    newest = sorted((folder / "tiny").glob("v*"))[-1]
    assert "could not be measured" not in (newest / "verdict.json").read_text()
    assert (
        "shrunk: where it differs could not be found: a node of another kind" in figures(newest, "7-validate")["notes"]
    )


def doctored(folder: Path, candidate: str, reference_node: str, candidate_node: str) -> None:
    """The newest version says where the hop to `candidate` parts, in its report and in a repro pack that runs."""
    newest = sorted((folder / "tiny").glob("v*"))[-1]
    note = next(n for n in figures(newest, "7-validate")["notes"] if n.startswith(f"{candidate} first differs at"))
    assert candidate_node in note
    assert note in html.unescape((newest / "report.html").read_text())
    with zipfile.ZipFile(newest / "7-validate" / "repro.zip") as pack:
        pack.extractall(folder / "repro")
    found = json.loads((folder / "repro" / "divergence.json").read_text())
    assert (found["reference_node"], found["candidate_node"]) == (reference_node, candidate_node)
    done = subprocess.run([sys.executable, "repro.py"], cwd=folder / "repro", capture_output=True, text=True)
    assert found["tensor"] in done.stdout, done.stderr
