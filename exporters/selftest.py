"""Check this folder: every file's hash, and the model's answers to the golden inputs. `python selftest.py`

Needs only onnxruntime and numpy. Prints one line per check; exits 0 when all hold and 1 otherwise.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

HERE = Path(__file__).resolve().parent


def main() -> int:
    """Run all checks; the number of failures decides the exit code."""
    manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    failures = 0

    def check(what: str, holds: bool) -> None:
        nonlocal failures
        failures += not holds
        print(f"{'ok  ' if holds else 'FAIL'} {what}")

    for name, digest in sorted(manifest["sha256"].items()):
        file = HERE / name
        check(f"{name} is unchanged", file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == digest)
    if failures:
        return 1
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(HERE / manifest["model"], options, providers=["CPUExecutionProvider"])
    with np.load(HERE / "golden.npz", allow_pickle=False) as golden:
        inputs = {name: golden[f"input_{i}"] for i, name in enumerate(manifest["inputs"])}
        wanted = {name: golden[f"output_{i}"] for i, name in enumerate(manifest["outputs"])}
    found = dict(zip(manifest["outputs"], session.run(manifest["outputs"], inputs), strict=True))
    for name, value in wanted.items():
        if found[name].shape != value.shape:
            check(f"{name} has shape {found[name].shape}, wanted {value.shape}", False)
            continue
        tolerance = manifest["atol"] * max(1.0, float(np.abs(value).max()))
        error = float(np.abs(found[name].astype(np.float64) - value.astype(np.float64)).max())
        check(f"{name} differs by {error:.3g}, allowed {tolerance:.3g}", error <= tolerance)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
