import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from exporters import ExportError, InputNote, Variant, bundle, check, isa, pack, selftest, unpack

WEIGHT = np.random.default_rng(0).standard_normal((12, 4)).astype(np.float32)
X = np.random.default_rng(1).random((5, 3, 2, 2)).astype(np.float32)
Y = X.reshape(5, 12) @ WEIGHT


@pytest.fixture
def model(tmp_path):
    def build(name="linear.onnx", weight=WEIGHT, **options):
        made = onnx.parser.parse_model(
            """<ir_version: 9, opset_import: ["" : 18]>
            g (float[n, 3, 2, 2] file) => (float[n, 4] y) { z = Flatten (file)  y = MatMul (z, w) }"""
        )
        made.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
        onnx.save(made, tmp_path / name, **options)
        return tmp_path / name

    return build


def note(**changed):
    return InputNote(
        **{"name": "file", "shape": ("n", 3, 2, 2), "dtype": "float32", "mean": (0.5,) * 3, "std": (0.25,) * 3}
        | changed
    )


def variant(path, name="plain", **options):
    return Variant(**{"name": name, "path": path, "tolerance": 1e-5, "latency_ms": 0.01} | options)


def make(variants, folder, **options):
    golden = {"golden_inputs": {"file": X}, "golden_outputs": {"y": Y}, "inputs": [note()], "metadata": {"a": "b"}}
    return bundle(variants, folder, **golden | {"labels": ["a", "b", "c", "d"]} | options)


def run(folder, *words, program="selftest.py"):
    return subprocess.run([sys.executable, "-B", folder / program, *words], capture_output=True, text=True, cwd="/")


def reseal(folder, change):
    """Change the manifest as an attacker would: with its digest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    text = json.dumps(manifest)
    (folder / "manifest.json").write_text(text)
    (folder / "manifest.sha256").write_text(hashlib.sha256(text.encode()).hexdigest())


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


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "b/../evil", "b/c/evil", "evil"])
def test_an_archive_that_reaches_outside_its_folder_is_refused(tmp_path, name):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        entry = tarfile.TarInfo(name)
        entry.size = 1
        tar.addfile(entry, io.BytesIO(b"x"))
    with pytest.raises(ExportError, match="which no bundle does"):
        unpack(tmp_path / "x.tar.gz", tmp_path / "there")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.tar.gz"]


def test_links_and_truncated_archives_are_refused(model, tmp_path):
    with tarfile.open(tmp_path / "link.tar.gz", "w:gz") as tar:
        entry = tarfile.TarInfo("b/model.onnx")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(entry)
    with pytest.raises(ExportError, match="which no bundle does"):
        unpack(tmp_path / "link.tar.gz", tmp_path / "there")
    pack(make([variant(model())], tmp_path / "bundle").path, tmp_path / "x.tar.gz")
    whole = (tmp_path / "x.tar.gz").read_bytes()
    for cut in (len(whole) // 2, 5):
        (tmp_path / "cut.tar.gz").write_bytes(whole[:cut])
        with pytest.raises(ExportError, match="cannot be unpacked"):
            unpack(tmp_path / "cut.tar.gz", tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_a_bundle_serves_a_folder_of_images(model, tmp_path):
    made = make([variant(model())], tmp_path / "bundle")
    photos = tmp_path / "photos"
    photos.mkdir()
    pixels = np.random.default_rng(2).integers(0, 256, (2, 2, 3), np.uint8)
    Image.fromarray(pixels).save(photos / "a.png")
    (photos / "b.txt").write_text("no image")
    command = [sys.executable, "-B", "-m", "serve", str(photos)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=made.path)
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    logits = ((pixels.transpose(2, 0, 1) / 255 - 0.5) / 0.25).reshape(12) @ WEIGHT
    assert first["file"] == "a.png"
    assert first["label"] == "abcd"[logits.argmax()]
    assert first["share"] == pytest.approx(np.exp(logits.max()) / np.exp(logits).sum(), abs=1e-3)
    assert second["file"] == "b.txt"
    assert "error" in second
    reseal(made.path, lambda manifest: manifest["files"].update({"model.onnx": "0" * 64}))
    done = subprocess.run(command, capture_output=True, text=True, cwd=made.path)
    assert done.returncode == 1
    assert "model.onnx is missing" in done.stderr


def test_the_docs_show_the_server_as_it_is():
    page = (Path(__file__).parents[2] / "docs" / "shipping.md").read_text()
    shown = re.search(r"```python\n(\"\"\"Classify a folder.*?)```", page, re.DOTALL)
    assert shown
    assert shown[1] == (Path(selftest.__file__).with_name("serve.py")).read_text()
