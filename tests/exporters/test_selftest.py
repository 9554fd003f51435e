"""The program that checks a bundle on the device: what it believes, and whose code it runs."""

import hashlib
import io
import json
import os
import py_compile
import subprocess
import sys
import zipfile

import numpy as np
import onnx
import pytest
from PIL import Image

from exporters import selftest
from tests.exporters.bundles import WEIGHT, X, Y, linear, make, reseal, rewrite, run, variant


@pytest.fixture
def bundle(tmp_path):
    made = make([variant(linear(tmp_path / "linear.onnx"))], tmp_path / "bundle")
    return made.path


# ── a manifest that makes no sense ───────────────────────────────────────────────────────────────────────────────────

NONSENSE = {
    "format": [0, 2, "1", None, True, 1.0],
    "onnxruntime": [None, 5, "", []],
    "threads": [0, -1, "1", 1.5, None, True, 10**9, [], float("nan")],
    "variants": [None, {}, [], "x", [None], [[]], ["plain"], 5],
    "inputs": [None, {}, [], "x", [None], ["file"], 5],
    "outputs": [None, {}, [], "y", [None], [[]], [5], ["y", "y"], ["z"], ["y", "z"], [""]],
    "dynamic": [None, "yes", 1, []],
    "labels": [None, {}, "abc", [None], [5]],
    "metadata": [None, [], "x", {"leanort.model": 5}, {"leanort.ships": "another"}, {"a": None}],
    "files": [None, [], {}, "x", {"golden.npz": 5}, {"golden.npz": None}],
}
NONSENSE_OF_A_VARIANT = {
    "name": [None, 5, "", []],
    "file": [
        None, 5, "", [], "../linear.onnx", "/etc/passwd", "manifest.json", "golden.npz", "serve.py", "a/../linear.onnx",
        "..", ".", "./linear.onnx", "linear.onnx/", "C:linear.onnx", "..\\linear.onnx", "linear.onnx\0", "none.onnx",
    ],
    "portable": [None, "yes", 1, []],
    "isa": [None, 5, []],
    "session": [
        None, [], "x", {"a": 5}, {"session.model_external_initializers_file_folder_path": "/tmp"},
        {"ep.context_file_path": "x"}, {"session.save_model_format": "ORT"}, {"": ""},
    ],
    "tolerance": [None, "1", float("nan"), float("inf"), -float("inf"), -1e-9, 1, 1.0, 1e30, 10**400, True, [], {}],
    "latency_ms": ["1", float("nan"), float("inf"), -1, 10**400, True, []],
}  # fmt: skip
NONSENSE_OF_AN_INPUT = {
    "name": [None, 5, "", [], "file2"],
    "shape": [None, 5, "x", [None], [0], [-1], [1.5], [True], [""], {}],
    "dtype": [None, 5, "", []],
    "mean": [None, 5, "x", [None], ["x"], [float("nan")], [float("inf")], [True]],
    "std": [None, 5, "x", [None], [0], [-1], [float("nan")], [float("inf")]],
}


def unfit(folder):
    """The reason, having seen that the whole answer is one line of JSON and no variant is called right."""
    report, session = selftest.check(folder)
    assert session is None
    assert not report["ok"]
    assert "\n" not in json.dumps(report)
    assert report["reason"]
    return report["reason"]


@pytest.mark.parametrize("key", NONSENSE)
def test_a_manifest_of_nonsense_is_a_reason(bundle, key):
    for value in NONSENSE[key]:
        kept = (bundle / "manifest.json").read_text()
        reseal(bundle, lambda manifest, value=value: manifest.update({key: value}))
        unfit(bundle)
        reseal(bundle, lambda manifest: manifest.pop(key))
        assert key in unfit(bundle)
        (bundle / "manifest.json").write_text(kept)


@pytest.mark.parametrize(
    ("part", "key", "values"),
    [("variants", key, values) for key, values in NONSENSE_OF_A_VARIANT.items()]
    + [("inputs", key, values) for key, values in NONSENSE_OF_AN_INPUT.items()],
)
def test_a_variant_or_an_input_of_nonsense_is_a_reason(bundle, part, key, values):
    for value in values:
        kept = (bundle / "manifest.json").read_text()
        reseal(bundle, lambda manifest, value=value: manifest[part][0].update({key: value}))
        unfit(bundle)
        reseal(bundle, lambda manifest: manifest[part][0].pop(key))
        assert key in unfit(bundle)
        (bundle / "manifest.json").write_text(kept)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "5", '"x"', "[" * 100_000, '{"a":' * 100_000, "{}", '{"format": NaN}', "9" * 10_000,
        '{"threads": ' + "9" * 10_000 + "}", "\ufeff{}", '{"format": 1, "format": 1}', "\ud800",
    ],
)  # fmt: skip
def test_text_that_is_no_manifest_is_a_reason(bundle, text):
    content = text.encode("utf-8", "surrogatepass")
    (bundle / "manifest.json").write_bytes(content)
    (bundle / "manifest.sha256").write_text(hashlib.sha256(content).hexdigest())
    assert "manifest.json" in unfit(bundle)
    done = run(bundle)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (1, "", 1)
    assert not json.loads(done.stdout)["ok"]


def test_a_key_that_stands_twice_is_a_reason(bundle):
    text = (bundle / "manifest.json").read_text().replace('"tolerance"', '"tolerance": 0, "tolerance"')
    (bundle / "manifest.json").write_text(text)
    (bundle / "manifest.sha256").write_text(hashlib.sha256(text.encode()).hexdigest())
    assert "twice" in unfit(bundle)


def test_files_that_are_no_files_are_a_reason(bundle, tmp_path):
    for name in ("manifest.json", "manifest.sha256", "golden.npz", "linear.onnx", "serve.py"):
        kept = (bundle / name).read_bytes()
        (tmp_path / name).write_bytes(kept)
        for put in (os.mkfifo, os.mkdir, lambda path: path.symlink_to(tmp_path / path.name)):
            (bundle / name).unlink()
            put(bundle / name)
            assert name in unfit(bundle)
            if put is os.mkdir:
                (bundle / name).rmdir()
            (bundle / name).unlink(missing_ok=True)
            (bundle / name).write_bytes(kept)
    (bundle / "manifest.sha256").write_bytes(b"\xff\xfe")
    assert "manifest.sha256" in unfit(bundle)
    (bundle / "manifest.sha256").write_bytes(b"")
    assert "manifest.sha256" in unfit(bundle)
    assert "manifest.json" in unfit(tmp_path / "nowhere")


# ── answers that prove nothing ───────────────────────────────────────────────────────────────────────────────────────


def golden(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


@pytest.mark.parametrize(
    "arrays",
    [
        {"input_0": X, "output_0": Y[:0]},
        {"input_0": X[:0], "output_0": Y[:0]},
        {"input_0": X, "output_0": Y.astype(str)},
        {"input_0": X, "output_0": Y * np.float32(np.nan)},
        {"input_0": X, "output_0": Y * np.float32(np.inf)},
        {"input_0": X, "output_0": Y.astype(np.complex64)},
        {"input_0": X.astype(str), "output_0": Y},
        {"input_0": X.astype(np.float64), "output_0": Y},
        {"input_0": np.float32(1), "output_0": Y},
        {"input_0": X},
    ],
)
def test_golden_arrays_that_prove_nothing_are_a_reason(bundle, arrays):
    rewrite(bundle, "golden.npz", golden(**arrays))
    unfit(bundle)


def test_golden_arrays_that_cannot_be_held_are_a_reason(bundle):
    """A header of 40 GB; zeros that pack a thousandfold; a pickle; a file that is encrypted, and none at all."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**10,)})
    for content in (header.getvalue(), header.getvalue()[:20], b"", b"\x93NUMPY\x09\x00"):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as file:
            file.writestr("input_0.npy", content)
            file.writestr("output_0.npy", content)
        rewrite(bundle, "golden.npz", packed.getvalue())
        assert "golden" in unfit(bundle)
    rewrite(bundle, "golden.npz", golden(input_0=np.array([{}], object), output_0=Y))
    assert "golden.npz" in unfit(bundle)
    whole = bytearray(golden(input_0=X, output_0=Y))
    whole[whole.index(b"PK\1\2") + 8] |= 1  # encrypted
    rewrite(bundle, "golden.npz", bytes(whole))
    assert "golden.npz" in unfit(bundle)
    rewrite(bundle, "golden.npz", b"no archive")
    assert "golden.npz" in unfit(bundle)


def test_an_output_that_the_manifest_leaves_out_is_a_reason(bundle):
    """It would be served without ever having been compared."""
    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 18]>
        g (float[n, 3, 2, 2] file) => (float[n, 12] served, float[n, 4] y) { served = Flatten (file)
        y = MatMul (served, w) }"""
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(WEIGHT, "w"))
    rewrite(bundle, "linear.onnx", model.SerializeToString())
    assert "it answers served, y, and the manifest names y" in unfit(bundle)


def test_a_variant_that_cannot_run_alone_is_a_reason(bundle):
    """Its batch is fixed to that of the golden inputs, and the manifest says that it is free."""
    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 18]>
        g (float[5, 3, 2, 2] file) => (float[5, 4] y) { z = Flatten (file)  y = MatMul (z, w) }"""
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(WEIGHT, "w"))
    rewrite(bundle, "linear.onnx", model.SerializeToString())
    assert "it cannot run at batch 1" in unfit(bundle)


@pytest.mark.parametrize("name", ["../linear.onnx", "sub/linear.onnx"])
def test_a_variant_outside_the_folder_is_not_run(bundle, name):
    reseal(bundle, lambda manifest: manifest["variants"][0].update(file=name))
    assert "file of a variant" in unfit(bundle)


# ── whose code runs ──────────────────────────────────────────────────────────────────────────────────────────────────

PLANTED = (
    "json", "hashlib", "pathlib", "__future__", "platform", "time", "zipfile", "typing", "re", "stat", "numpy",
    "onnxruntime", "PIL", "types", "warnings", "os", "struct", "io", "sitecustomize", "usercustomize", "ctypes",
    "random", "coloredlogs", "google", "statistics", "math", "shutil", "selftest_helper", "packaging", "flatbuffers",
)  # fmt: skip
STARTS = {
    "selftest.py": ["selftest.py"],
    "serve.py": ["serve.py", "photos"],
    "-m selftest": ["-m", "selftest"],
    "-m serve": ["-m", "serve", "photos"],
    "-S selftest.py": ["-S", "selftest.py"],
}


@pytest.fixture
def photos(bundle, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "photos" / "a.png")
    return tmp_path / "photos"


def started(bundle, photos, words):
    words = [str(photos) if word == "photos" else word for word in words]
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=bundle, timeout=60)


@pytest.mark.parametrize("start", STARTS)
def test_a_module_beside_the_program_never_runs(bundle, photos, tmp_path, start):
    """Before its hash is known, and so before the list of files is: whatever it is called."""
    mark = tmp_path / "mark"
    hostile = f"open({str(mark)!r}, 'a').write(__name__ + ' ')\n"
    for name in PLANTED:
        (bundle / f"{name}.py").write_text(hostile)
    for name in ("encodings", "email", "collections"):
        (bundle / name).mkdir()
        (bundle / name / "__init__.py").write_text(hostile)
    done = started(bundle, photos, STARTS[start])
    assert not mark.exists(), mark.read_text()
    assert done.returncode == 1
    if start != "-S selftest.py":  # without site, numpy is not found
        assert "does not belong here" in done.stdout + done.stderr


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", ["selftest", "json", "PIL"])
def test_a_compiled_module_that_nobody_checks_never_runs(bundle, photos, tmp_path, start, name):
    if start == f"-m {name}":
        pytest.skip("Python itself runs it before any line of the program, so that shipping.md says how to start")
    mark = tmp_path / "mark"
    (tmp_path / "hostile.py").write_text(f"open({str(mark)!r}, 'w')\n")
    for place in ("__pycache__", "."):
        cached = (
            bundle / place / f"{name}.{sys.implementation.cache_tag}.pyc" if place != "." else bundle / f"{name}.pyc"
        )
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        py_compile.compile(str(tmp_path / "hostile.py"), str(cached), invalidation_mode=mode)
    done = started(bundle, photos, STARTS[start])
    assert not mark.exists()
    assert done.returncode == 1


@pytest.mark.parametrize("start", STARTS)
def test_the_programs_leave_nothing_behind_and_can_start_again(bundle, photos, start):
    """Without -B, too."""
    if start == "-S selftest.py":
        pytest.skip("numpy is not found without site")
    before = sorted(entry.name for entry in bundle.iterdir())
    for _ in range(2):
        done = started(bundle, photos, STARTS[start])
        assert done.returncode == 0, done.stdout + done.stderr
        assert sorted(entry.name for entry in bundle.iterdir()) == before


def test_the_server_runs_no_other_selftest_than_the_recorded_one(bundle, photos, tmp_path):
    mark = tmp_path / "mark"
    (bundle / "selftest.py").unlink()
    (bundle / "selftest.py").write_text(f"open({str(mark)!r}, 'w')\n")
    done = started(bundle, photos, ["serve.py", "photos"])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "selftest.py was changed: its sha256 is not the recorded one\n"
    assert not mark.exists()


def test_the_selftest_of_a_bundle_elsewhere_runs_nothing_of_it(bundle, tmp_path):
    """The project's own copy, started in the folder that it checks."""
    mark = tmp_path / "mark"
    (bundle / "json.py").write_text(f"open({str(mark)!r}, 'w')\n")
    done = subprocess.run([sys.executable, selftest.__file__, "."], capture_output=True, text=True, cwd=bundle)
    assert json.loads(done.stdout)["reason"] == "json.py does not belong here"
    assert not mark.exists()


# ── what onnxruntime reports ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("start", [start for start in STARTS if not start.startswith("-S")])
def test_onnxruntime_reports_nothing_from_the_device(bundle, photos, tmp_path, start, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
    for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(home))
    assert started(bundle, photos, STARTS[start]).returncode == 0
    assert list(home.rglob("*")) == []


def test_whoever_wants_onnxruntime_to_report_is_heard(bundle, tmp_path, monkeypatch):
    code = (
        f"import os, runpy; runpy.run_path({str(bundle / 'selftest.py')!r}); print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for given, heard in (("0", "0"), ("1", "1"), (None, "1")):
        monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
        if given is not None:
            monkeypatch.setenv("ORT_DISABLE_TELEMETRY", given)
        done = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True)
        assert done.stdout.strip() == heard, done.stderr
