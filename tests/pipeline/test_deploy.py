"""The whole chain as a user runs it: one command, real data, real stages, on a tiny net."""

import json
import os
import shutil
import subprocess

import onnx
import pytest
from safetensors.torch import load_file

from foundation.files import sha256
from pipeline.gate import measuring
from tests.pipeline.chain import QUICK, STAGES, TINY, command, deploy, figures, leanort, manifest, said


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

    entries = {e.key: e.value for e in onnx.load(version / "5-export" / "model.onnx").metadata_props}
    assert entries["leanort.dense_sha256"] == sha256(version / "0-baseline" / "weights.safetensors")
    assert {"leanort.version", "leanort.recipe_sha256", "leanort.sparsity", "leanort.data"} <= entries.keys()


def test_every_hop_was_compared_on_every_kind_of_feed(version):
    hops = figures(version, "7-validate")["hops"]
    assert [(h["reference"], h["candidate"]) for h in hops] == [
        ("folded", "shrunk"),
        ("shrunk", "exported"),
        ("exported", "optimized"),
    ]
    feeds = json.loads((version / "7-validate" / "parity.json").read_text())["hops"][0]["feeds"]
    fixed = {f"{kind}, batch {b}" for kind in ("random", "zeros", "large", "real") for b in (1, 3, 8)}
    assert fixed < set(feeds)  # beside them, batch sizes that are drawn


def test_an_identical_run_reuses_everything_and_makes_no_new_version(artifacts, version):
    before = os.times()
    words = command(artifacts, "deploy", f"{TINY}:build", *QUICK)
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, check=False)
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("reused from v0001") == len(STAGES)
    assert [p.name for p in sorted((artifacts / "tiny").glob("v*"))] == ["v0001"]
    # CPU time, so that a busy machine does not count.
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert 0.5 < spent < 40


def test_a_choice_that_changed_nothing_but_the_recipe_is_named_by_the_file_that_ships(artifacts, version, tmp_path):
    """Rounds play no part where there is one: the same masks, and so the same weights; the file names the recipe."""
    copy = shutil.copytree(artifacts, tmp_path / "artifacts", symlinks=True)
    assert version.parent.parent.name == "artifacts"
    told = said(copy, "deploy", f"{TINY}:build", *QUICK, "--set", "prune.steps=7")
    assert "2-finetune: reused" in told and "4-shrink: reused" in told
    assert "5-export: reused" not in told
    newest = max((copy / "tiny").glob("v*"))
    assert newest.name != version.name
    assert said(copy, "verify", f"tiny/{newest.name}")


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
    assert "lowest L2 norms" in said
    overview = leanort(artifacts, "why", "tiny/v0001").stdout
    assert f"{len(gone)} of 32" in overview
    wrong = leanort(artifacts, "why", "tiny/v0001", "blocks.0.conv9")
    assert wrong.returncode == 2
    assert "Did you mean blocks.0.conv" in wrong.stderr
    assert (version / "4-shrink" / "widths.svg").read_text().startswith("<svg")


def test_a_stored_version_is_judged_again_and_only_a_passed_one_is_promoted(artifacts, version, tmp_path, monkeypatch):
    deploy(artifacts, "--set", "gate.max_size_ratio=0.001")
    loose, strict = tmp_path / "loose.toml", tmp_path / "strict.toml"
    common = "max_accuracy_drop_points = 15.0\nmax_latency_ratio = 1000.0\n"
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
        ("seal", "v0001", False),
        ("promote", "v0001", False),
        ("seal", "v0002", False),
        ("promote", "v0002", True),
        ("rollback", "v0001", False),
    ]
    assert log[3]["reason"] == "size is no matter here"
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
    assert parents["promoted model"] == sha256(version / "6-optimize" / shipped)
    assert parents["dense weights"] == sha256(version / "0-baseline" / "weights.safetensors")
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


def test_the_same_inputs_give_the_same_bytes(version, tmp_path):
    words = command(tmp_path, "deploy", f"{TINY}:build", *QUICK)  # started anew, as whoever repeats it does
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    again = tmp_path / "tiny" / "v0001"
    models = {
        p.relative_to(version) for p in version.rglob("*") if p.suffix in (".onnx", ".ort", ".safetensors", ".pt2")
    }
    assert len(models) > 8
    for path in models:
        if (again / path).exists():
            assert sha256(version / path) == sha256(again / path), path
    assert {p for p in models if not (again / p).exists()} <= {
        p for p in models if p.parts[0] in ("6-optimize", "bundle")
    }


def test_why_tells_what_the_closed_form_made_of_a_layer(artifacts, version):
    told = said(artifacts, "why", "tiny/v0001", "blocks.0.conv1")
    assert "blocks.0.conv1.weight was fitted to the dense layer" in told
    rungs = figures(version, "2-finetune")["rungs"]
    assert [rung["name"] for rung in rungs][:2] == ["pruned", "closed form"]
    assert "closed form" in (version / "report.html").read_text()
