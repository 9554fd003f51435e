"""Check this bundle on this device, and find its fastest variant that is right here. `python selftest.py [FOLDER]`

Needs only onnxruntime and numpy. Every file's hash, the golden answers of every variant that belongs on this CPU, and
the time of each, taken in turns. Prints one line of JSON; exits 0 when a variant passes and 1 otherwise.
"""
# ruff: noqa: PTH120, PTH107, PTH106  # nothing may be imported before the path is safe, pathlib included

# No `from __future__` here: it would be the first module that is looked for in this folder.
import sys

if __name__ == "__main__":
    # Python looks for modules beside the program first, and a file there that is called json.py would run unchecked.
    sys.dont_write_bytecode = True
    _paths = sys.path[:]
    del sys.path[:1]
    import os

    _folder = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [entry for entry in _paths if os.path.realpath(entry) != _folder]
    if __spec__ is not None and __spec__.cached:  # `python -m` has just compiled this file into __pycache__
        try:
            os.remove(__spec__.cached)
            os.rmdir(os.path.dirname(__spec__.cached))
        except OSError:
            pass

import hashlib
import json
import os
import platform
import re
import stat
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

# onnxruntime 1.31 and later keep a log of what they run, for upload: off, unless whoever calls has said otherwise.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

HERE = Path(__file__).resolve().parent
MANIFEST, DIGEST = "manifest.json", "manifest.sha256"
FORMAT = 1
ROUNDS = 20
MANIFEST_BYTES = 16 << 20
"""More than any manifest needs; read whole before its hash is known."""
GOLDEN_BYTES = 4 << 30
"""Of the golden arrays, unpacked."""
THREADS = 1024
SESSION_KEYS = ("session.set_denormal_as_zero", "optimization.disable_specified_optimizers")
"""What a variant may ask of its session. Other keys name files that no hash covers."""


ANSWERS = {"classes", "labels", "values", "embedding", "map", "tokens", "array"}
HOLDS = ("array", "image", "sound", "ids", "mask", "segments")
"""What outputs and inputs can be said to be; serve.py goes by it."""


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


def one_line(error: BaseException) -> str:
    """What an error says, short enough for a line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def plain_file(folder: Path, name: str, limit: int = 0) -> Path:
    """The file `name` of the folder. Raises Unfit when it is none, or a link, or larger than `limit` bytes."""
    file = folder / name
    try:
        status = os.lstat(file)
    except (OSError, ValueError):
        raise Unfit(f"{name} is missing") from None
    if not stat.S_ISREG(status.st_mode):
        raise Unfit(f"{name} is not a plain file of this folder")
    if limit and status.st_size > limit:
        raise Unfit(f"{name} has {status.st_size} bytes, more than {limit}")
    return file


def sha256(file: Path) -> str:
    """The digest of a file of any size."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        for block in iter(lambda: content.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, after every file of the bundle was found to be as it was built. Raises Unfit."""
    try:
        text = plain_file(folder, MANIFEST, MANIFEST_BYTES).read_bytes()
        wanted = plain_file(folder, DIGEST, MANIFEST_BYTES).read_text(encoding="ascii").split()[0]
    except (OSError, UnicodeDecodeError, IndexError):
        raise Unfit(f"{MANIFEST} or {DIGEST} is unreadable") from None
    if hashlib.sha256(text).hexdigest() != wanted:
        raise Unfit(f"{MANIFEST} was changed, or {DIGEST} was")
    try:
        manifest = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise Unfit(f"{MANIFEST} is no JSON: {one_line(error)}") from None
    _check_form(manifest)
    files: dict[str, str] = manifest["files"]
    for name, digest in sorted(files.items()):
        if not plain_name(name):
            raise Unfit(f"{name} is not a plain file of this folder")
        if sha256(plain_file(folder, name)) != digest:
            raise Unfit(f"{name} was changed: its sha256 is not the recorded one")
    for entry in sorted(folder.iterdir()):
        if entry.name not in files and entry.name not in (MANIFEST, DIGEST):
            raise Unfit(f"{entry.name} does not belong here")
    return {**manifest}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no key stands twice: readers differ in which one they take."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def plain_name(value: Any) -> bool:
    """Whether a value names a file of the folder itself, on any system."""
    return (
        isinstance(value, str) and bool(re.fullmatch(r"[^/\\:\x00-\x1f\x7f]{1,255}", value)) and value.strip(".") != ""
    )


def _finite(value: Any, low: float, high: float = 1e300) -> bool:
    """Whether a value is a number from `low` to below `high`."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value < high


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _list_of(check: Any, value: Any) -> bool:
    return isinstance(value, list) and all(check(one) for one in value)


def _count(value: Any) -> bool:
    return type(value) is int and value > 0


def _map_of_text(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(one, str) for one in value.values())


def _check_form(manifest: Any) -> None:
    """Raise Unfit for the first value that is missing or makes no sense."""
    _check_keys(
        MANIFEST,
        manifest,
        {
            "format": lambda value: value == FORMAT and type(value) is int,
            "onnxruntime": _text,
            "threads": lambda value: type(value) is int and 1 <= value <= THREADS,
            "variants": lambda value: isinstance(value, list) and value,
            "inputs": lambda value: isinstance(value, list) and value,
            "outputs": lambda value: _list_of(_text, value) and value,
            "dynamic": lambda value: isinstance(value, bool),
            "labels": lambda value: _list_of(lambda one: isinstance(one, str), value),
            "metadata": _map_of_text,
            "files": lambda value: _map_of_text(value) and "golden.npz" in value,
        },
    )
    # Older bundles have none of these.
    given = manifest.get("answers", {})
    if not _map_of_text(given) or not set(given) <= set(manifest["outputs"]) or not set(given.values()) <= ANSWERS:
        raise Unfit(f"{MANIFEST}: answers cannot be {json.dumps(given)[:80]}")
    sizes = manifest.get("sizes", {})
    if not isinstance(sizes, dict) or not all(_list_of(_count, value) for value in sizes.values()):
        raise Unfit(f"{MANIFEST}: sizes cannot be {json.dumps(sizes)[:80]}")
    files = manifest["files"]
    for variant in manifest["variants"]:
        _check_keys(
            "a variant",
            variant,
            {
                "name": _text,
                "file": lambda value: plain_name(value) and value in files and value.endswith((".onnx", ".ort")),
                "portable": lambda value: isinstance(value, bool),
                "isa": lambda value: isinstance(value, str),
                "session": lambda value: _map_of_text(value) and set(value) <= set(SESSION_KEYS),
                # At 1 a model that answers nothing but zeros would pass.
                "tolerance": lambda value: _finite(value, 0, 1),
                "latency_ms": lambda value: value is None or _finite(value, 0),
            },
        )
    for entry in manifest["inputs"]:
        _check_keys(
            "an input",
            entry,
            {
                "name": _text,
                "shape": lambda value: _list_of(lambda one: _text(one) or _count(one), value),
                "dtype": _text,
                "mean": lambda value: _list_of(lambda one: _finite(one, -1e300), value),
                "std": lambda value: _list_of(lambda one: _finite(one, 0) and one > 0, value),
            },
        )
        for key, known in (("holds", HOLDS), ("fit", ("cover", "stretch"))):
            if entry.get(key, known[0]) not in known:
                raise Unfit(f"{MANIFEST}: {key} of an input cannot be {json.dumps(entry[key])[:80]}")
        if not _count(entry.get("rate", 1)) and (entry["rate"] != 0 or entry.get("holds") == "sound"):
            raise Unfit(f"{MANIFEST}: rate of an input cannot be {json.dumps(entry['rate'])[:80]}")
    names = {"variants": [one["name"] for one in manifest["variants"]], "outputs": manifest["outputs"]}
    names["inputs"] = [one["name"] for one in manifest["inputs"]]
    for what, given in names.items():
        if len(set(given)) != len(given):
            raise Unfit(f"{MANIFEST} names two {what} alike")
    if shipped(manifest) not in names["variants"]:
        raise Unfit(f"{MANIFEST} ships {shipped(manifest)}, which is no variant")


def _check_keys(what: str, value: Any, keys: dict[str, Any]) -> None:
    if not isinstance(value, dict):
        raise Unfit(f"{what} is no map" if what == MANIFEST else f"{what} in {MANIFEST} is no map")
    for key, holds in keys.items():
        if key not in value:
            raise Unfit(f"{MANIFEST}: {key} of {what} is missing" if what != MANIFEST else f"{MANIFEST} lacks {key}")
        if not holds(value[key]):
            given = json.dumps(value[key])
            given = given if len(given) < 80 else f"{given[:80]}…"
            raise Unfit(f"{MANIFEST}: {key}{'' if what == MANIFEST else ' of ' + what} cannot be {given}")


def shipped(manifest: dict[str, Any]) -> str:
    """The name of the variant that the release stands for: the first one where nothing else is said."""
    return str(manifest["metadata"].get("leanort.ships", manifest["variants"][0]["name"]))


def read_golden(folder: Path, manifest: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The golden inputs and outputs by name. Raises Unfit when the file holds others than the manifest names."""
    try:
        with zipfile.ZipFile(folder / "golden.npz") as packed:
            size = sum(entry.file_size for entry in packed.infolist())
        if size > GOLDEN_BYTES:
            raise ValueError(f"it unpacks to {size} bytes")
        with np.load(folder / "golden.npz", allow_pickle=False) as golden:
            inputs = {entry["name"]: golden[f"input_{i}"] for i, entry in enumerate(manifest["inputs"])}
            outputs = {name: golden[f"output_{i}"] for i, name in enumerate(manifest["outputs"])}
    except Exception as error:  # zipfile, zlib and numpy raise a dozen classes that share no base
        raise Unfit(f"golden.npz does not match the manifest: {one_line(error)}") from None
    for name, wanted in outputs.items():
        if not isinstance(wanted, np.ndarray) or wanted.dtype.kind not in "biuf" or not wanted.size:
            raise Unfit(f"the golden output {name} holds no numbers to compare with")
        if not np.isfinite(wanted).all():
            raise Unfit(f"the golden output {name} holds NaN or infinity")
    return inputs, outputs


def open_variant(folder: Path, variant: dict[str, Any], threads: int) -> Any:
    """A session of one variant. Raises Unfit when it is not for this CPU or this onnxruntime cannot load it."""
    if not variant["portable"] and variant["isa"] != isa():
        raise Unfit(f"it is tuned for {variant['isa']} and this CPU is {isa()}")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 4
    try:
        for key, value in variant["session"].items():
            options.add_session_config_entry(key, value)
        return ort.InferenceSession(str(folder / variant["file"]), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exception classes share no base
        raise Unfit(f"onnxruntime {ort.__version__} cannot load it: {one_line(error)}") from None


def prove(session: Any, variant: dict[str, Any], inputs: dict[str, Any], outputs: dict[str, Any]) -> float:
    """The largest error of floats over max(1, max|golden|); whole numbers are equal.

    Raises Unfit when it is more than the variant is allowed.
    """
    worst = 0.0
    answered = [output.name for output in session.get_outputs()]
    if sorted(answered) != sorted(outputs):
        raise Unfit(f"it answers {', '.join(answered)}, and the manifest names {', '.join(outputs)}")
    try:
        found = dict(zip(outputs, session.run(list(outputs), inputs)))  # noqa: B905  # Python 3.9 has no strict
    except Exception as error:
        raise Unfit(f"it cannot run: {one_line(error)}") from None
    for name, wanted in outputs.items():
        if not isinstance(found[name], np.ndarray) or found[name].dtype.kind not in "biuf":
            raise Unfit(f"{name} holds no numbers")
        if found[name].shape != wanted.shape:
            raise Unfit(f"{name} has shape {found[name].shape}, not {wanted.shape}")
        if wanted.dtype.kind != "f":
            wrong = int((found[name] != wanted).sum()) if found[name].dtype.kind != "f" else wanted.size
            if wrong:
                raise Unfit(f"{name} differs from the golden output in {wrong} of {wanted.size} whole numbers")
            continue
        difference = np.abs(found[name].astype(np.float64) - wanted.astype(np.float64))
        scaled = float(difference.max()) / max(1.0, float(np.abs(wanted.astype(np.float64)).max()))
        if not scaled <= variant["tolerance"]:
            raise Unfit(f"{name} differs from the golden output by {scaled:.3g}, allowed {variant['tolerance']:.3g}")
        worst = max(worst, scaled)
    return worst


def take_times(sessions: dict[str, Any], feed: dict[str, Any]) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Milliseconds of each session at one feed, taken in turns, and the reason of each that cannot run it."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    broken: dict[str, str] = {}
    for turn in range(ROUNDS + 1):
        for name, session in sessions.items():
            if name in broken:
                continue
            try:
                session.run(None, feed)  # finds the caches as another variant left them
                start = time.perf_counter()
                session.run(None, feed)
            except Exception as error:  # onnxruntime's exception classes share no base
                broken[name] = f"it cannot run at batch 1: {one_line(error)}"
                continue
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times, broken


def check(folder: Path) -> tuple[dict[str, Any], Any]:
    """Verify the bundle in `folder` and time what passes. Returns (report, chosen variant's session or None)."""
    rows: dict[str, dict[str, Any]] = {}
    report: dict[str, Any] = {"ok": False, "chosen": None, "reason": "", "onnxruntime": ort.__version__, "isa": isa()}
    report["variants"] = rows
    try:
        manifest = read_manifest(folder)
        inputs, outputs = read_golden(folder, manifest)
    except (Unfit, OSError, MemoryError) as error:
        report["reason"] = one_line(error)
        return report, None
    report["model"] = manifest["metadata"].get("leanort.model", "")
    report.update(built_with=manifest["onnxruntime"], ships=shipped(manifest))
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
    times, broken = take_times(sessions, one)
    for name, reason in broken.items():
        del sessions[name], times[name]
        rows[name].update(status="fail", reason=reason)
    for name, taken in times.items():
        row = rows[name]
        row["latency_ms"] = round(float(np.median(taken)), 4)
        row["of_promised"] = round(row["latency_ms"] / row["promised_ms"], 3) if row["promised_ms"] else None
    if not sessions:
        reasons = (f"{name}: {row['reason']}" for name, row in rows.items())
        report["reason"] = f"no variant passes on this device: {'; '.join(reasons)}"
        return report, None
    best = min(sessions, key=lambda name: float(rows[name]["latency_ms"]))
    report.update(ok=True, chosen=best)
    return report, sessions[best]


def main(arguments: list[str]) -> int:
    """Print the report as one line; the exit code."""
    report, _ = check(Path(arguments[0]) if arguments else HERE)
    print(json.dumps(report))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
