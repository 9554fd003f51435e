"""A bundle of a small linear model, and what the tests of bundles do to it."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import onnx

from exporters import InputNote, Variant, bundle

WEIGHT = np.random.default_rng(0).standard_normal((12, 4)).astype(np.float32)
X = np.random.default_rng(1).random((5, 3, 2, 2)).astype(np.float32)
Y = X.reshape(5, 12) @ WEIGHT


def linear(file, weight=WEIGHT, **options):
    """Write the model y = flat(file) · weight."""
    made = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 18]>
        g (float[n, 3, 2, 2] file) => (float[n, 4] y) { z = Flatten (file)  y = MatMul (z, w) }"""
    )
    made.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(made, file, **options)
    return file


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


def rewrite(folder, name, content):
    """Put other bytes into a file of the bundle, which may be a link, with the digests that belong to them."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(content)
    reseal(folder, lambda manifest: manifest["files"].update({name: hashlib.sha256(content).hexdigest()}))
