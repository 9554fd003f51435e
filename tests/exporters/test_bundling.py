import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from exporters import ExportError, check, isa, pack, selftest, unpack
from tests.exporters.bundles import WEIGHT, X, Y, linear, make, reseal, rewrite, run, variant


@pytest.fixture
def model(tmp_path):
    def build(name="linear.onnx", weight=WEIGHT, **options):
        return linear(tmp_path / name, weight, **options)

    return build


def test_a_bundle_checks_itself_wherever_it_is_moved(model, tmp_path):
    made = make([variant(model())], tmp_path / "bundle")
    assert sorted(entry.name for entry in made.path.iterdir()) == [
        "golden.npz", "linear.onnx", "manifest.json", "manifest.sha256", "selftest.py", "serve.py",
    ]  # fmt: skip
    done = run(made.path.rename(tmp_path / "elsewhere"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") == 1
    report = json.loads(done.stdout)
    assert report["ok"]
    assert report["chosen"] == "plain"
    row = report["variants"]["plain"]
    assert row["status"] == "pass"
    assert row["latency_ms"] > 0
    assert row["of_promised"] == pytest.approx(row["latency_ms"] / 0.01, rel=0.1, abs=1e-3)


def test_external_weights_come_along(model, tmp_path):
    source = model(save_as_external_data=True, location="w.bin", size_threshold=0)
    made = make([variant(source)], tmp_path / "bundle")
    assert {"linear.onnx", "w.bin"} < set(made.sha256)
    assert run(made.path).returncode == 0
    (made.path / "w.bin").unlink()
    (made.path / "w.bin").write_bytes((tmp_path / "w.bin").read_bytes()[:-4])
    assert "w.bin was changed" in json.loads(run(made.path).stdout)["reason"]


def test_the_selftest_needs_only_onnxruntime_and_numpy(model, tmp_path):
    made = make([variant(model())], tmp_path / "bundle")
    script = (
        "import runpy, sys\n"
        "for name in ('torch', 'onnx', 'pydantic', 'exporters', 'validators', 'pipeline', 'scipy', 'PIL'):\n"
        "    sys.modules[name] = None\n"
        f"sys.argv = ['selftest.py']; runpy.run_path({str(made.path / 'selftest.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-B", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_one_flipped_byte_in_any_file_is_found_and_what_was_changed_is_not_run(model, tmp_path):
    made = make([variant(model())], tmp_path / "bundle")
    for file in sorted(made.path.iterdir()):
        if file.name == "selftest.py":
            continue  # the one that is run here; the project's own copy checks it below
        kept = file.read_bytes()
        file.unlink()  # it may be a link
        broken = bytearray(kept)
        broken[len(broken) // 2] ^= 1
        file.write_bytes(broken)
        done = run(made.path)
        report = json.loads(done.stdout)
        assert done.returncode == 1, file.name
        assert file.name.split(".")[0] in report["reason"]
        assert not report["variants"]
        file.write_bytes(kept)
    (made.path / "selftest.py").write_text("print('{\"ok\": true}')\n")
    report = check(made.path)
    assert not report["ok"]
    assert "selftest.py was changed" in report["reason"]


def test_extra_missing_and_outside_files_are_refused(model, tmp_path):
    made = make([variant(model())], tmp_path / "bundle")
    extra = made.path / "onnxruntime.py"
    extra.write_text("")
    assert check(made.path)["reason"] == "onnxruntime.py does not belong here"
    extra.unlink()
    (made.path / "__pycache__").mkdir()
    assert check(made.path)["reason"] == "__pycache__ does not belong here"
    (made.path / "__pycache__").rmdir()
    golden = (made.path / "golden.npz").rename(tmp_path / "golden.npz")
    assert check(made.path)["reason"] == "golden.npz is missing"
    digest = hashlib.sha256(golden.read_bytes()).hexdigest()
    reseal(made.path, lambda manifest: manifest["files"].update({"../golden.npz": digest}))
    assert check(made.path)["reason"] == "../golden.npz is not a plain file of this folder"


def test_the_fastest_variant_that_is_right_here_is_chosen(model, tmp_path):
    """A wrong one is fastest, one is another CPU's, one needs a newer onnxruntime: the plain one remains."""
    files = [variant(model(f"{name}.onnx"), name) for name in ("plain", "foreign", "future", "wrong")]
    made = make(files, tmp_path / "bundle")
    wrong = made.path / "wrong.onnx"
    wrong.unlink()
    model("wrong.onnx", WEIGHT + np.float32(1e-3)).rename(wrong)
    future = onnx.load(made.path / "future.onnx")
    future.opset_import[0].version = 999
    (made.path / "future.onnx").unlink()
    onnx.save(future, made.path / "future.onnx")

    def change(manifest):
        for name in ("wrong.onnx", "future.onnx"):
            manifest["files"][name] = hashlib.sha256((made.path / name).read_bytes()).hexdigest()
        manifest["variants"][1] |= {"portable": False, "isa": "vax"}

    reseal(made.path, change)
    report = check(made.path)
    assert report["ok"]
    assert report["chosen"] == "plain"
    reasons = {name: row.get("reason", "") for name, row in report["variants"].items()}
    assert reasons["foreign"] == f"it is tuned for vax and this CPU is {isa()}"
    assert "cannot load it" in reasons["future"]
    assert "y differs from the golden output" in reasons["wrong"]
    assert not reasons["plain"]


def test_when_no_variant_passes_the_reason_is_one_line_and_the_exit_code_1(model, tmp_path):
    made = make([variant(model())], tmp_path / "bundle")
    reseal(made.path, lambda manifest: manifest["variants"][0].update(portable=False, isa="vax"))
    done = run(made.path)
    assert done.returncode == 1
    assert "no variant passes on this device: plain: it is tuned for vax" in json.loads(done.stdout)["reason"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda arrays: arrays | {"output_0": arrays["output_0"] + 1}, "y differs from the golden output by"),
        (lambda arrays: arrays | {"output_0": arrays["output_0"][:1]}, "y has shape"),
        (lambda arrays: {"output_0": arrays["output_0"]}, "golden.npz does not match the manifest"),
        (None, "golden.npz does not match the manifest"),
    ],
    ids=["values", "shape", "no input", "truncated"],
)
def test_a_golden_file_that_does_not_match_is_one_line(model, tmp_path, change, said):
    """Its hash is right, so that it is not a matter of damage."""
    made = make([variant(model())], tmp_path / "bundle")
    golden = made.path / "golden.npz"
    content = golden.read_bytes()
    with np.load(golden) as arrays:
        kept = dict(arrays)
    golden.unlink()
    if change is None:
        golden.write_bytes(content[: len(content) // 2])
    else:
        np.savez(golden, **change(kept))
    digest = hashlib.sha256(golden.read_bytes()).hexdigest()
    reseal(made.path, lambda manifest: manifest["files"].update({"golden.npz": digest}))
    done = run(made.path)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (1, "", 1)
    assert said in json.loads(done.stdout)["reason"]
    with pytest.raises(ExportError, match="fails its self-test"):
        pack(made.path, tmp_path / "x.tar.gz")
    assert not (tmp_path / "x.tar.gz").exists()


def test_the_selftest_knows_the_cpu_by_the_same_name_as_the_exporters():
    assert selftest.isa() == isa()


def test_a_variant_that_computes_something_else_is_not_bundled(model, tmp_path):
    good, bad = model(), model("bad.onnx", WEIGHT + np.float32(1e-3))
    for files in ([variant(bad, "bad")], [variant(good), variant(bad, "bad")]):
        with pytest.raises(ExportError, match="self-test fails: bad: y differs"):
            make(files, tmp_path / "bundle")
    with pytest.raises(ExportError, match="y has shape"):
        make([variant(good)], tmp_path / "bundle", golden_outputs={"y": Y[:, :3]})
    assert sorted(tmp_path.iterdir()) == [bad, good]


def test_what_cannot_be_checked_is_refused(model, tmp_path):
    source = [variant(model())]
    with pytest.raises(ExportError, match="golden inputs are z; the model has file"):
        make(source, tmp_path / "bundle", golden_inputs={"z": X})
    with pytest.raises(ExportError, match="golden output y holds NaN"):
        make(source, tmp_path / "bundle", golden_outputs={"y": Y * np.float32(np.nan)})
    with pytest.raises(ExportError, match="at least one variant"):
        make([], tmp_path / "bundle")
    (tmp_path / "bundle").mkdir()
    with pytest.raises(ExportError, match="exists"):
        make(source, tmp_path / "bundle")


def test_a_packed_bundle_is_the_same_bytes_and_unpacks_to_one_that_passes(model, tmp_path):
    made = make([variant(model())], tmp_path / "bundle")
    first, second = tmp_path / "x.tar.gz", tmp_path / "again" / "x.tar.gz"
    pack(made.path, first)
    pack(made.path, second)
    assert first.read_bytes() == second.read_bytes()
    unpack(first, tmp_path / "there")
    assert check(tmp_path / "there")["ok"]
    with pytest.raises(ExportError, match="exists"):
        pack(made.path, first)


def test_the_docs_show_the_server_as_it_is():
    page = (Path(__file__).parents[2] / "docs" / "shipping.md").read_text()
    shown = re.search(r"```python\n(\"\"\"Answer a folder.*?)```", page, re.DOTALL)
    assert shown
    assert shown[1] == (Path(selftest.__file__).with_name("serve.py")).read_text()


def spoilt(folder, name):
    """Replace one variant by a model that answers something else, its digests right."""
    linear(folder / "other", WEIGHT + np.float32(1e-3))
    content = (folder / "other").read_bytes()
    (folder / "other").unlink()
    rewrite(folder, name, content)


def test_what_ships_must_pass_itself_to_be_packed(model, tmp_path):
    """Another variant that is right does not stand in for it; one that is wrong beside it does not stop it."""
    files = [variant(model(f"{name}.onnx"), name) for name in ("first", "second")]
    made = make(files, tmp_path / "bundle")
    spoilt(made.path, "second.onnx")
    pack(made.path, tmp_path / "second.tar.gz")
    made = make(files, tmp_path / "again")
    spoilt(made.path, "first.onnx")
    assert check(made.path)["ok"]
    with pytest.raises(ExportError, match="ships first, which fails its self-test: y differs"):
        pack(made.path, tmp_path / "first.tar.gz")
    made = make(files, tmp_path / "named", metadata={"leanort.ships": "second"})
    spoilt(made.path, "second.onnx")
    with pytest.raises(ExportError, match="ships second, which fails its self-test: y differs"):
        pack(made.path, tmp_path / "first.tar.gz")
    assert not (tmp_path / "first.tar.gz").exists()


def test_a_bundle_that_ships_another_variant_than_was_chosen_is_not_packed(model, tmp_path):
    made = make([variant(model(f"{name}.onnx"), name) for name in ("first", "second")], tmp_path / "bundle")
    pack(made.path, tmp_path / "right.tar.gz", ships=("first", "first.onnx"))
    for ships in (("second", "second.onnx"), ("first", "second.onnx")):
        with pytest.raises(ExportError, match="does not ship"):
            pack(made.path, tmp_path / "wrong.tar.gz", ships=ships)
    assert not (tmp_path / "wrong.tar.gz").exists()
