"""What ships: a folder with the model and the means to check it where it arrives.

model.onnx (and model.onnx.data), golden.npz, manifest.json, selftest.py
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from exporters import selftest
from exporters.errors import ExportError
from exporters.summary import describe

Array = np.ndarray[Any, np.dtype[Any]]


class Bundle(BaseModel):
    """A written bundle: its folder, and the sha256 of every file in it but the manifest."""

    model_config = ConfigDict(frozen=True)

    path: Path
    sha256: dict[str, str]


def bundle(
    model: Path,
    folder: Path,
    *,
    golden_inputs: Mapping[str, Array],
    golden_outputs: Mapping[str, Array],
    atol: float,
    metadata: Mapping[str, str],
) -> Bundle:
    """Make the new `folder` from the ONNX file `model`, whole or not at all, and run its self-test once.

    `golden_outputs` are what a trusted model answers to `golden_inputs` (name -> array), such as the PyTorch model that
    this file was made from; the self-test holds the file to |found − golden| ≤ atol · max(1, max|golden|) per output.
    The file keeps its name when it has external weights, which name each other, and is called model.onnx otherwise.

    Raises ExportError when `folder` exists, the golden names are not the model's, or the self-test fails.
    """
    model, folder = Path(model), Path(folder)
    summary = describe(model)
    for kind, specs, golden in (("input", summary.inputs, golden_inputs), ("output", summary.outputs, golden_outputs)):
        if {spec.name for spec in specs} != set(golden):
            raise ExportError(
                f"The golden {kind}s are {', '.join(golden) or 'none'}; the model has "
                f"{', '.join(spec.name for spec in specs)}.",
                f"Give one array per {kind}.",
            )
        for name, array in golden.items():
            if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
                raise ExportError(f"The golden {kind} {name} holds NaN or infinity.", "It could not be checked.")
    if folder.exists():
        raise ExportError(f"{folder} exists.", "A bundle is never overwritten: give a new folder.")
    partial: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
        name = model.name if summary.external_files else "model.onnx"
        shutil.copyfile(model, partial / name)
        for data in summary.external_files:
            shutil.copyfile(model.parent / data, partial / data)
        shutil.copyfile(selftest.__file__, partial / "selftest.py")
        arrays = {f"input_{i}": golden_inputs[key] for i, key in enumerate(golden_inputs)}
        arrays |= {f"output_{i}": golden_outputs[key] for i, key in enumerate(golden_outputs)}
        np.savez(partial / "golden.npz", **arrays)  # type: ignore[arg-type]  # the names are not savez's own
        sha256 = {file.name: _sha256(file) for file in sorted(partial.iterdir())}
        manifest = {
            "model": name,
            "inputs": list(golden_inputs),
            "outputs": list(golden_outputs),
            "atol": atol,
            "summary": summary.model_dump(mode="json"),
            "metadata": dict(metadata),
            "sha256": sha256,
        }
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        _run_selftest(partial)
        partial.chmod(0o755)
        partial.rename(folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ExportError(f"{folder} cannot be written: {reason}.", "Check its rights and free space.") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return Bundle(path=folder, sha256=sha256)


def _run_selftest(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-B", str(folder / "selftest.py")], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).strip().splitlines() if line]
        bad = next((line for line in lines if line.startswith("FAIL")), lines[-1] if lines else "no output")
        raise ExportError(f"The bundle's self-test fails: {bad}", "Compare the file with the golden model.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
