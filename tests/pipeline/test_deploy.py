"""The whole chain as a user runs it: one command, real data, real stages, on a tiny net."""

import html
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper
from safetensors.torch import load_file
from torch.export import ExportedProgram

from pipeline import measuring, store
from pipeline.artifacts import Exported, Shrunk
from pipeline.cli import main
from pipeline.stages import s7_validate
from validators import OrtRunner

TINY = Path(__file__).with_name("tiny.py")
STAGES = ["baseline", "prune", "finetune", "fold", "shrink", "export", "optimize", "validate"]
QUICK = [
    "--input-size", "3,16,16", "--name", "tiny",
    "--set", "baseline.train={epochs=4, lr=0.1}",
    "--set", "finetune.train={epochs=2, lr=0.02}",
    "--set", "gate.seconds=0.3",
    "--set", 'optimize={candidates=["portable", "host"], seconds=0.2}',
    "--set", "gate.max_accuracy_drop_points=15.0",
    "--set", "gate.max_latency_ratio=5.0",
]  # fmt: skip


def command(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "pipeline", *words, "--out", str(folder)]


def leanort(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *words), capture_output=True, text=True, timeout=280)


def deploy(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return leanort(folder, "deploy", f"{TINY}:build", *QUICK, *words)


def manifest(version: Path) -> dict:
    return json.loads((version / "manifest.json").read_text())


def figures(version: Path, stage: str) -> dict:
    return json.loads((version / stage / "artifact.json").read_text())


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory) -> Path:
    """A folder with one passed version."""
    folder = tmp_path_factory.mktemp("artifacts")
    done = deploy(folder)
    assert done.returncode == 0, done.stderr + done.stdout
    return folder


@pytest.fixture(scope="module")
def version(artifacts) -> Path:
    return artifacts / "tiny" / "v0001"


def test_every_stage_leaves_its_folder_and_current_points_to_the_passed_version(artifacts, version):
    assert [p.name.partition("-")[2] for p in sorted(version.glob("[0-9]-*"))] == STAGES
    assert (artifacts / "tiny" / "current").resolve() == version.resolve()
    for name in ("report.html", "report.md", "junit.xml", "config.toml"):
        assert (version / name).stat().st_size > 100, name


def test_the_shipped_file_is_smaller_and_runs_at_any_batch_size(version):
    import numpy as np
    import onnxruntime

    dense, shipped = (figures(version, s) for s in ("0-baseline", "4-shrink"))
    assert shipped["params_after"] < 0.4 * dense["params"]
    session = onnxruntime.InferenceSession(version / "6-optimize" / figures(version, "6-optimize")["ships"])
    for batch in (1, 3, 8):
        assert session.run(None, {"input": np.zeros((batch, 3, 16, 16), np.float32)})[0].shape == (batch, 10)


def test_shrinking_is_proven_and_the_figures_say_so(version):
    made = figures(version, "4-shrink")
    assert made["removed"]
    assert made["params_after"] < made["params_before"]
    assert made["max_abs_diff"] <= made["tolerance"]
    assert figures(version, "3-fold")["max_abs_diff_to_masked"] == 0.0


def test_what_pruning_expected_is_what_shrinking_reached(version):
    pruned, shrunk = figures(version, "1-prune"), figures(version, "4-shrink")
    assert (pruned["expected_params"], pruned["expected_macs"]) == (shrunk["params_after"], shrunk["macs_after"])


def test_original_weights_survive_under_the_masks_until_fold(version):
    masks = load_file(version / "1-prune" / "masks.safetensors")
    for stage in ("1-prune", "2-finetune"):
        weights = load_file(version / stage / "weights.safetensors")
        assert any((weights[name][~mask.bool()] != 0).any() for name, mask in masks.items()), stage
    folded = load_file(version / "3-fold" / "weights.safetensors")
    assert all((folded[name][~mask.bool()] == 0).all() for name, mask in masks.items())


def test_the_onnx_file_names_its_parents(version):
    import onnx

    entries = {e.key: e.value for e in onnx.load(version / "5-export" / "model.onnx").metadata_props}
    assert entries["leanort.dense_sha256"] == store.sha256(version / "0-baseline" / "weights.safetensors")
    assert {"leanort.version", "leanort.recipe_sha256", "leanort.sparsity", "leanort.data"} <= entries.keys()


def test_every_hop_was_compared_on_every_kind_of_feed(version):
    hops = figures(version, "7-validate")["hops"]
    assert [(h["reference"], h["candidate"]) for h in hops] == [
        ("folded", "shrunk"),
        ("shrunk", "exported"),
        ("exported", "optimized"),
    ]
    feeds = json.loads((version / "7-validate" / "parity.json").read_text())["hops"][0]["feeds"]
    assert {f"{kind}, batch {b}" for kind in ("random", "zeros", "large", "real") for b in (1, 3, 8)} == set(feeds)


def test_an_identical_run_reuses_everything_and_makes_no_new_version(artifacts, version):
    before = os.times()
    done = deploy(artifacts)
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("reused from v0001") == len(STAGES)
    assert [p.name for p in sorted((artifacts / "tiny").glob("v*"))] == ["v0001"]
    # CPU time, so that a busy machine does not count.
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert 0.5 < spent < 40


def test_a_changed_threshold_reruns_only_validation_and_a_failed_gate_exits_1(artifacts, version):
    done = deploy(artifacts, "--set", "gate.max_size_ratio=0.001")
    assert done.returncode == 1, done.stderr
    assert "file size (of dense)" in done.stdout
    second = artifacts / "tiny" / "v0002"
    assert sorted(manifest(second)["reused"]) == sorted(
        p.name for p in version.glob("[0-9]-*") if p.name != "7-validate"
    )
    assert (artifacts / "tiny" / "current").resolve() == version.resolve()
    shared = second / "0-baseline" / "weights.safetensors"
    assert shared.stat().st_ino == (version / "0-baseline" / "weights.safetensors").stat().st_ino


def test_verify_accepts_what_was_sealed_and_names_a_flipped_byte(artifacts, version, tmp_path):
    assert leanort(artifacts, "verify", "tiny/v0001").returncode == 0
    copy = tmp_path / "tiny" / "v0001"
    shutil.copytree(version, copy)
    shipped = copy / "6-optimize" / "model.portable.onnx"
    shipped.chmod(0o644)
    content = bytearray(shipped.read_bytes())
    content[len(content) // 2] ^= 1
    shipped.write_bytes(content)
    done = leanort(tmp_path, "verify", "tiny")
    assert done.returncode != 0
    assert "6-optimize/model.portable.onnx" in done.stdout


def test_list_show_and_diff_read_what_is_there(artifacts, version):
    listed = leanort(artifacts, "list")
    assert "v0001 *" in listed.stdout
    assert "pass" in leanort(artifacts, "show", "tiny/v0001").stdout
    assert "gate.max_size_ratio" in leanort(artifacts, "diff", "tiny/v0001", "tiny/v0002").stdout


def test_a_person_can_ask_which_channels_of_a_layer_went_and_why(artifacts, version):
    ledger = json.loads((version / "4-shrink" / "ledger.json").read_text())
    gone = ledger["groups"]["blocks.0.conv1"]
    told = json.loads(leanort(artifacts, "why", "tiny/v0001", "blocks.0.conv1", "--json").stdout)
    assert told["removed"]["blocks.0.conv1.weight[0]"] == gone
    assert told["cause"] == {"blocks.0.conv1": {"chosen by pruning": gone, "dead in the weights": []}}
    said = leanort(artifacts, "why", "tiny/v0001", "blocks.0.conv1").stdout
    assert f"blocks.0.conv1.weight[0] lost {len(gone)}" in said
    assert "lowest norms" in said
    overview = leanort(artifacts, "why", "tiny/v0001").stdout
    assert f"{len(gone)} of 32" in overview
    wrong = leanort(artifacts, "why", "tiny/v0001", "blocks.0.conv9")
    assert wrong.returncode == 2
    assert "Did you mean blocks.0.conv" in wrong.stderr
    assert (version / "4-shrink" / "widths.svg").read_text().startswith("<svg")


def said(folder: Path, *words: str, code: int = 0) -> str:
    """What a command prints, run in this process."""
    result = CliRunner().invoke(main, [*words, "--out", str(folder)])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_a_stored_version_is_judged_again_and_only_a_passed_one_is_promoted(artifacts, version, tmp_path, monkeypatch):
    deploy(artifacts, "--set", "gate.max_size_ratio=0.001")
    loose, strict = tmp_path / "loose.toml", tmp_path / "strict.toml"
    common = "max_accuracy_drop_points = 15.0\nmax_latency_ratio = 5.0\n"
    loose.write_text(common)
    strict.write_text(common + '[[limits]]\nmetric = "parameters"\nagainst = "dense"\nmax = 0.1\n')
    monkeypatch.setattr(measuring, "contest", lambda *args, **kwargs: pytest.fail("something was measured"))
    assert "fail tiny" in said(artifacts, "gate", "tiny/v0002", code=1).replace(f"{TINY}:build", "tiny")
    said(artifacts, "gate", "tiny/v0002", "--policy", str(loose), "--report", str(tmp_path / "ci"))
    assert json.loads((tmp_path / "ci" / "verdict.json").read_text())["outcome"] == "pass"
    assert "Parameters (of dense)" in said(artifacts, "gate", "tiny/v0001", "--policy", str(strict), code=1)
    assert "verdict is fail" in said(artifacts, "promote", "tiny/v0002", code=2)
    assert "v0002 is current; it was v0001" in said(
        artifacts, "promote", "tiny/v0002", "--force", "--reason", "size is no matter here"
    )
    assert "v0001 is current; it was v0002" in said(artifacts, "rollback", "tiny")
    log = json.loads(said(artifacts, "list", "--log", "--json"))
    assert [(e["action"], e["version"], e["forced"]) for e in log] == [
        ("promote", "v0001", False),
        ("promote", "v0002", True),
        ("rollback", "v0001", False),
    ]
    assert log[1]["reason"] == "size is no matter here"
    assert "would remove nothing" in said(artifacts, "gc", "tiny", "--dry-run")


def test_the_next_version_is_measured_against_the_promoted_one_and_names_it(artifacts, version):
    limit = 'gate.limits=[{metric = "file_size", against = "promoted", max = 1.0}]'
    done = deploy(artifacts, "--ratio", "0.25", "--set", limit)
    assert done.returncode == 1, done.stderr + done.stdout
    newest = sorted((artifacts / "tiny").glob("v*"))[-1]
    assert figures(newest, "7-validate")["promoted"] == "v0001"
    assert {"latency vs promoted", "accuracy vs promoted", "macs vs promoted"} <= set(
        figures(newest, "7-validate")["measurements"]
    )
    assert "file size (of promoted)" in done.stdout
    shipped = figures(version, "6-optimize")["ships"]
    parents = manifest(newest)["parents"]
    assert parents["promoted model"] == store.sha256(version / "6-optimize" / shipped)
    assert parents["dense weights"] == store.sha256(version / "0-baseline" / "weights.safetensors")
    assert said(artifacts, "verify", f"tiny/{newest.name}")
    assert (artifacts / "tiny" / "current").resolve() == version.resolve()


def test_plan_writes_nothing_and_names_groups(tmp_path):
    done = leanort(tmp_path / "none", "plan", f"{TINY}:build", "--input-size", "3,16,16", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert {"blocks.0.conv1", "blocks.2.conv1"} <= {c["name"] for c in plan["clusters"]}
    assert plan["expected_params"] < plan["params"]
    assert all(step["action"] == "run" for step in plan["stages"])
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_killed_in_every_stage_in_turn_resumes_and_ends_in_the_same_result(artifacts, version, tmp_path):
    model = tmp_path / "tiny"
    for number, stage in enumerate(STAGES):
        words = command(tmp_path, "deploy", f"{TINY}:build", *QUICK)
        process = subprocess.Popen(words, stderr=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + 120
        while not (model / ".partial" / f"{number}-{stage}.building" / ".fingerprint").exists():
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        complete = [p.parent.name for p in sorted(model.glob(".partial/*/stage.json"))]
        assert complete == [f"{n}-{name}" for n, name in enumerate(STAGES[:number])]
        assert not (model / "v0001").exists()
    done = deploy(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("reused from the interrupted run") == len(STAGES) - 1
    for name in ("0-baseline/weights.safetensors", "3-fold/weights.safetensors", "4-shrink/ledger.json"):
        assert (model / "v0001" / name).read_bytes() == (version / name).read_bytes(), name
    assert sorted(p.name for p in model.iterdir()) == [".lock", "current", "v0001"]


@pytest.mark.slow
def test_a_run_killed_between_epochs_goes_on_with_the_next_one(version, tmp_path):
    """The long stage: its checkpoint is used, and the weights are those of a run that was never killed."""
    words = command(tmp_path, "deploy", f"{TINY}:build", *QUICK, "--until", "baseline")
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL, start_new_session=True)
    checkpoint = tmp_path / "tiny" / ".partial" / "0-baseline.building" / "training.pt"
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(words, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "Resuming after epoch" in done.stderr
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
    folder = sealed(artifacts, tmp_path)
    said(folder, "deploy", f"{TINY}:build", *QUICK, "--set", "gate.seed=1", code=1)
    newest, reasons = crashed(folder)
    for what in ("accuracy", "latency"):
        assert f"{what} could not be measured: RuntimeError: the kernel gave up" in reasons
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
