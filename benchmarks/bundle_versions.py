"""A bundle's self-test under several versions of onnxruntime, each in a new environment that never saw torch.

    python benchmarks/bundle_versions.py resnet50.tar.gz 1.23.2 1.31.1 1.32.0

Installs onnxruntime and numpy from the package index, and nothing else. One line of JSON per version; exits 1 when the
bundle fails under any of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from exporters import unpack

VERSIONS = ("1.23.2", "1.31.1", "1.32.0")


def selftest(bundle: Path, version: str, scratch: Path) -> dict[str, object]:
    """What the bundle's own self-test says under one version of onnxruntime."""
    home = scratch / version
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    packages = [f"onnxruntime=={version}", "numpy"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages], check=True)
    torch = subprocess.run([python, "-c", "import torch"], capture_output=True, check=False)
    if not torch.returncode:
        raise RuntimeError("torch is there, so this proves nothing")
    done = subprocess.run([python, "-B", bundle / "selftest.py"], capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1) or not done.stdout:
        raise RuntimeError(f"the self-test itself fails under onnxruntime {version}: {done.stderr.strip()[-300:]}")
    report: dict[str, object] = json.loads(done.stdout)
    if report["onnxruntime"] != version or bool(report["ok"]) != (done.returncode == 0):
        raise RuntimeError(f"the self-test under onnxruntime {version} contradicts itself: {done.stdout}")
    return report


def main(archive: str, *versions: str) -> int:
    """Run all versions; the exit code."""
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(archive)
        if bundle.is_file():
            unpack(bundle, Path(folder) / "bundle")
            bundle = Path(folder) / "bundle"
        for version in versions or VERSIONS:
            report = selftest(bundle, version, Path(folder))
            print(json.dumps(report), flush=True)
            failed |= not report["ok"]
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
