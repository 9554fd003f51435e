import json
import subprocess
import sys

import numpy as np
import onnx
import pytest

from exporters import ExportError, bundle

WEIGHT = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
X = np.random.default_rng(1).standard_normal((5, 3)).astype(np.float32)


@pytest.fixture
def model(tmp_path):
    def build(**options):
        made = onnx.parser.parse_model(
            """<ir_version: 9, opset_import: ["" : 18]>
            g (float[n, 3] file) => (float[n, 4] y) { y = MatMul (file, w) }"""
        )
        made.graph.initializer.append(onnx.numpy_helper.from_array(WEIGHT, "w"))
        onnx.save(made, tmp_path / "linear.onnx", **options)
        return tmp_path / "linear.onnx"

    return build


def make(model, folder, **options):
    golden = {"golden_inputs": {"file": X}, "golden_outputs": {"y": X @ WEIGHT}, "atol": 1e-5, "metadata": {"a": "b"}}
    return bundle(model, folder, **{**golden, **options})


def selftest(folder):
    return subprocess.run([sys.executable, "-B", folder / "selftest.py"], capture_output=True, text=True, cwd="/")


def test_a_bundle_checks_itself_wherever_it_is_moved(model, tmp_path):
    made = make(model(), tmp_path / "bundle")
    assert sorted(entry.name for entry in made.path.iterdir()) == [
        "golden.npz",
        "manifest.json",
        "model.onnx",
        "selftest.py",
    ]
    moved = made.path.rename(tmp_path / "elsewhere")
    done = selftest(moved)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok   y differs by" in done.stdout
    assert json.loads((moved / "manifest.json").read_text())["metadata"] == {"a": "b"}


def test_external_weights_come_along(model, tmp_path):
    source = model(save_as_external_data=True, location="w.bin", size_threshold=0)
    made = make(source, tmp_path / "bundle")
    assert {"linear.onnx", "w.bin"} < set(made.sha256)
    assert selftest(made.path).returncode == 0


def test_the_selftest_needs_only_onnxruntime_and_numpy(model, tmp_path):
    made = make(model(), tmp_path / "bundle")
    script = (
        "import runpy, sys\n"
        "for name in ('torch', 'onnx', 'pydantic', 'exporters', 'validators', 'pipeline', 'scipy'):\n"
        "    sys.modules[name] = None\n"
        f"runpy.run_path({str(made.path / 'selftest.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-B", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz", "selftest.py"])
def test_a_changed_file_is_found(model, tmp_path, name):
    made = make(model(), tmp_path / "bundle")
    with (made.path / name).open("ab") as file:
        file.write(b"\n")
    done = selftest(made.path)
    assert done.returncode == 1
    assert f"FAIL {name} is unchanged" in done.stdout
    assert "differs by" not in done.stdout  # what was changed is not run


def test_a_model_that_computes_something_else_is_not_bundled(model, tmp_path):
    wrong = X @ WEIGHT
    wrong[4, 2] += 1e-3
    source = model()
    for output in (wrong, wrong[:, :3]):
        with pytest.raises(ExportError, match="self-test fails: FAIL y"):
            make(source, tmp_path / "bundle", golden_outputs={"y": output})
    assert list(tmp_path.iterdir()) == [source]


def test_what_cannot_be_checked_is_refused(model, tmp_path):
    source = model()
    with pytest.raises(ExportError, match="golden inputs are z; the model has file"):
        make(source, tmp_path / "bundle", golden_inputs={"z": X})
    with pytest.raises(ExportError, match="golden output y holds NaN"):
        make(source, tmp_path / "bundle", golden_outputs={"y": X @ WEIGHT * np.float32(np.nan)})
    (tmp_path / "bundle").mkdir()
    with pytest.raises(ExportError, match="exists"):
        make(source, tmp_path / "bundle")
