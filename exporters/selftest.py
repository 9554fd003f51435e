"""Check this bundle on this device, and find its fastest variant that is right here. `python selftest.py [FOLDER]`

Needs only onnxruntime and numpy. Every file's hash, the golden answers of every variant that belongs on this CPU, and
the time of each, taken in turns. Prints one line of JSON; exits 0 when a variant passes and 1 otherwise.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

HERE = Path(__file__).resolve().parent
MANIFEST, DIGEST = "manifest.json", "manifest.sha256"
ROUNDS = 20


class Unfit(Exception):  # noqa: N818  # a finding, and the message is the line that is printed
    """What is wrong with the bundle or with a variant."""


def isa() -> str:
    """The widest vector extension of this CPU, in the words of the manifest."""
    machine = platform.machine().lower()
    if machine in ("arm64", "aarch64"):
        return "neon"
    if machine not in ("x86_64", "amd64"):
        return machine
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "sse"
    flags = next((line for line in info.splitlines() if line.startswith("flags")), "").split()
    return next(
        (name for flag, name in (("avx512f", "avx512"), ("avx2", "avx2"), ("avx", "avx")) if flag in flags), "sse"
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, after every file of the bundle was found to be as it was built. Raises Unfit."""
    try:
        text = (folder / MANIFEST).read_bytes()
        wanted = (folder / DIGEST).read_text(encoding="ascii").split()[0]
    except (OSError, UnicodeDecodeError, IndexError):
        raise Unfit(f"{MANIFEST} or {DIGEST} is missing or unreadable") from None
    if hashlib.sha256(text).hexdigest() != wanted:
        raise Unfit(f"{MANIFEST} was changed, or {DIGEST} was")
    manifest: dict[str, Any] = json.loads(text)
    for name, digest in sorted(manifest["files"].items()):
        file = folder / name
        if Path(name).name != name or file.is_symlink():
            raise Unfit(f"{name} is not a plain file of this folder")
        if not file.is_file():
            raise Unfit(f"{name} is missing")
        if hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            raise Unfit(f"{name} was changed: its sha256 is not the recorded one")
    for entry in sorted(folder.iterdir()):
        if entry.name not in manifest["files"] and entry.name not in (MANIFEST, DIGEST, "__pycache__"):
            raise Unfit(f"{entry.name} does not belong here")
    return manifest


def read_golden(folder: Path, manifest: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The golden inputs and outputs by name. Raises Unfit when the file holds others than the manifest names."""
    try:
        with np.load(folder / "golden.npz", allow_pickle=False) as golden:
            inputs = {entry["name"]: golden[f"input_{i}"] for i, entry in enumerate(manifest["inputs"])}
            outputs = {name: golden[f"output_{i}"] for i, name in enumerate(manifest["outputs"])}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise Unfit(f"golden.npz does not match the manifest: {' '.join(str(error).split())[:200]}") from None
    return inputs, outputs


def open_variant(folder: Path, variant: dict[str, Any], threads: int) -> Any:
    """A session of one variant. Raises Unfit when it is not for this CPU or this onnxruntime cannot load it."""
    if not variant["portable"] and variant["isa"] != isa():
        raise Unfit(f"it is tuned for {variant['isa']} and this CPU is {isa()}")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 4
    for key, value in variant["session"].items():
        options.add_session_config_entry(key, value)
    try:
        return ort.InferenceSession(str(folder / variant["file"]), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exception classes share no base
        reason = " ".join(str(error).split())[:200]
        raise Unfit(f"onnxruntime {ort.__version__} cannot load it: {reason}") from None


def prove(session: Any, variant: dict[str, Any], inputs: dict[str, Any], outputs: dict[str, Any]) -> float:
    """The largest error over max(1, max|golden|). Raises Unfit when it is more than the variant is allowed."""
    worst = 0.0
    try:
        found = dict(zip(outputs, session.run(list(outputs), inputs)))  # noqa: B905  # Python 3.9 has no strict
    except Exception as error:
        raise Unfit(f"it cannot run: {' '.join(str(error).split())[:200]}") from None
    for name, wanted in outputs.items():
        if found[name].shape != wanted.shape:
            raise Unfit(f"{name} has shape {found[name].shape}, not {wanted.shape}")
        difference = np.abs(found[name].astype(np.float64) - wanted.astype(np.float64))
        scaled = float(difference.max()) / max(1.0, float(np.abs(wanted).max()))
        if not scaled <= variant["tolerance"]:
            raise Unfit(f"{name} differs from the golden output by {scaled:.3g}, allowed {variant['tolerance']:.3g}")
        worst = max(worst, scaled)
    return worst


def check(folder: Path) -> tuple[dict[str, Any], Any]:
    """Verify the bundle in `folder` and time what passes. Returns (report, chosen variant's session or None)."""
    rows: dict[str, dict[str, Any]] = {}
    report: dict[str, Any] = {"ok": False, "chosen": None, "reason": "", "onnxruntime": ort.__version__, "isa": isa()}
    report["variants"] = rows
    try:
        manifest = read_manifest(folder)
        inputs, outputs = read_golden(folder, manifest)
    except (Unfit, OSError, ValueError, KeyError) as error:
        report["reason"] = str(error)
        return report, None
    report |= {"model": manifest["metadata"].get("leanort.model", ""), "built_with": manifest["onnxruntime"]}
    sessions = {}
    for variant in manifest["variants"]:
        row = rows[variant["name"]] = {"file": variant["file"], "promised_ms": variant["latency_ms"]}
        try:
            session = open_variant(folder, variant, manifest["threads"])
            row.update(status="pass", max_error=prove(session, variant, inputs, outputs))
            sessions[variant["name"]] = session
        except Unfit as error:
            row.update(status="fail", reason=str(error))
    one = (
        {name: value[:1] if value.ndim else value for name, value in inputs.items()} if manifest["dynamic"] else inputs
    )
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(ROUNDS + 1):
        for name, session in sessions.items():
            session.run(None, one)  # finds the caches as another variant left them
            start = time.perf_counter()
            session.run(None, one)
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    for name, taken in times.items():
        row = rows[name]
        row["latency_ms"] = round(float(np.median(taken)), 4)
        row["of_promised"] = round(row["latency_ms"] / row["promised_ms"], 3) if row["promised_ms"] else None
    if not sessions:
        reasons = (f"{name}: {row['reason']}" for name, row in rows.items())
        report["reason"] = f"no variant passes on this device: {'; '.join(reasons)}"
        return report, None
    best = min(sessions, key=lambda name: float(rows[name]["latency_ms"]))
    report |= {"ok": True, "chosen": best}
    return report, sessions[best]


def main(arguments: list[str]) -> int:
    """Print the report as one line; the exit code."""
    report, _ = check(Path(arguments[0]) if arguments else HERE)
    print(json.dumps(report))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    sys.exit(main(sys.argv[1:]))
