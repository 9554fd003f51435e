"""Time models of a few widths on this device, operator by operator. `python measure.py [FOLDER]`

Needs only onnxruntime and numpy. Every model takes turns with the dense one, so that whatever slows the device down
for a while slows both: all times are written as shares of the dense model's. Writes `device.json` beside the models;
a run that was broken off goes on with the models that are not in it yet.
"""

import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

# onnxruntime 1.31 and later keep a log of what they run, for upload: off, unless whoever calls has said otherwise.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

FORMAT = 2
KIT, FEED, RESULT = "kit.json", "feed.npz", "device.json"
LONGEST = 4 << 20
"""Bytes of a kit's own description."""
FEED_BYTES = 4 << 30
OLDER_OPSET = 20
"""Which onnxruntime reads from 1.17 on, of January 2024."""
SESSIONS = 3
"""Opened of each model: where one lies in memory may slow a model of a millisecond by two fifths, for as long as it is
open, and never makes it faster.
"""
ROUNDS_AT_LEAST, ROUNDS_AT_MOST = 3, 150
"""Of one session."""
WARM = 2
SETTLED, SETTLED_SECONDS = 8, 0.05
"""A turn starts with so many inferences, or as many as take so long, that do not count: they find the caches filled by
the other model. A race of releases leaves out as many, so that both tell the times of a model that runs alone: with one
of them left out, a ResNet-50 at 32x32 cut to 30 MB took 0.36 of dense by its table, and 0.24 in a race.
"""
TIMED = 3
"""Inferences that count in a turn."""
WATCHED = 8
"""Turns of a session, at the most, with each operator's time written down, of which the last inference counts."""


def session(path: Any, threads: int, profile: str | None = None) -> Any:
    """The model on the CPU provider; with `profile`, a file's prefix, each operator's time is written there."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile
    return ort.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])


def once(model: Any, feed: dict[str, Any], clock: Any = time.perf_counter) -> float:
    """Seconds of one inference."""
    began = clock()
    model.run(None, feed)
    return float(clock() - began)


def turn(model: Any, feed: dict[str, Any], clock: Any = time.perf_counter) -> float:
    """Seconds of one inference, the median of a few once the caches are the model's own."""
    settle(model, feed)
    return float(np.median([once(model, feed, clock) for _ in range(TIMED)]))


def settle(model: Any, feed: dict[str, Any]) -> int:
    """Run until the caches are the model's own; returns how many inferences that took."""
    began, done = time.perf_counter(), 0
    while done < SETTLED and time.perf_counter() - began < SETTLED_SECONDS:
        once(model, feed)
        done += 1
    return done


def clock_of(threads: int) -> Any:
    """The processor's time where all is computed on the calling thread, which other programs do not lengthen; Windows
    counts that in steps of 16 ms.
    """
    counted = hasattr(time, "thread_time") and sys.platform != "win32"
    return time.thread_time if threads == 1 and counted else time.perf_counter


def fastest(path: Any, feed: dict[str, Any], threads: int) -> Any:
    """Of a few sessions of one model the one that takes the least time."""
    clock = clock_of(threads)
    opened = [session(path, threads) for _ in range(SESSIONS)]
    took: list[list[float]] = [[] for _ in opened]
    for _ in range(WARM + ROUNDS_AT_LEAST):
        for one, times in zip(opened, took, strict=True):
            times.append(turn(one, feed, clock))
    return opened[int(np.argmin([np.median(times[WARM:]) for times in took]))]


def measure(dense: Any, path: Any, feed: dict[str, Any], threads: int, seconds: float) -> dict[str, Any]:
    """The model at `path` against `dense`, an open session of the same inputs, in turns for at least `seconds`
    together, in a few new sessions of which the fastest counts.

    {"ratio": of the two times, "spread": between the ratio's quartiles, "rounds": their number, "dense_ms": the dense
    model's time, "operators": [[name, operator, shapes in, shapes out, share of the dense model's time], ...]}
    """
    runs = [in_turns(dense, path, feed, threads, seconds / SESSIONS) for _ in range(SESSIONS)]
    return min(runs, key=lambda run: float(run["ratio"]))


def in_turns(dense: Any, path: Any, feed: dict[str, Any], threads: int, seconds: float) -> dict[str, Any]:
    """`measure` in one new session, against the open session `dense`."""
    clock = clock_of(threads)
    with tempfile.TemporaryDirectory() as folder:
        model = session(path, threads)
        watched = session(path, threads, str(Path(folder) / "run"))
        for _ in range(WARM):
            for one in (dense, model, watched):
                once(one, feed)
        ratios: list[float] = []
        references: list[float] = []
        runs: list[int] = []
        began = time.perf_counter()
        while len(ratios) < ROUNDS_AT_LEAST or (time.perf_counter() - began < seconds and len(ratios) < ROUNDS_AT_MOST):
            reference = max(turn(dense, feed, clock), 1e-9)
            ratios.append(turn(model, feed, clock) / reference)
            references.append(reference)
            if len(runs) < WATCHED:
                runs.append(settle(watched, feed) + 1)
                once(watched, feed)
        events = json.loads(Path(watched.end_profiling()).read_text(encoding="utf-8"))
    low, ratio, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    return {
        "ratio": float(ratio),
        "spread": float(high - low),
        "rounds": len(ratios),
        "dense_ms": 1e3 * float(np.median(references)),
        "operators": operators(events, np.array(references[: len(runs)]), runs),
    }


def operators(events: list[dict[str, Any]], references: Any, runs: list[int]) -> list[list[Any]]:
    """Each operator of a profile once, its time the median over the turns, in each the last one of so many `runs`
    against the dense model's beside it.
    """
    times: dict[str, list[float]] = {}
    shapes: dict[str, Any] = {}
    for event in events:
        name = event.get("name", "")
        if event.get("cat") != "Node" or not name.endswith("_kernel_time"):
            continue
        name, told = name[: -len("_kernel_time")], event.get("args", {})
        times.setdefault(name, []).append(event["dur"] / 1e6)
        if name not in shapes:
            shapes[name] = (
                told.get("op_name", ""),
                *(listed(told.get(k)) for k in ("input_type_shape", "output_type_shape")),
            )
    found, counted = [], WARM + np.cumsum(runs) - 1
    for name, spent in times.items():
        each = max(1, len(spent) // (WARM + sum(runs)))  # in a loop, an operator runs several times
        took = np.array(spent[: each * (len(spent) // each)]).reshape(-1, each).sum(axis=1)
        last = took[np.minimum(counted, len(took) - 1)]
        found.append([name, *shapes[name], float(np.median(last / references))])
    return found


def listed(told: Any) -> list[list[int]]:
    """The shapes in a profile's words: [{"float": [1, 3, 8, 8]}, ...]."""
    return [[int(n) for n in shape] for one in told or () for shape in one.values()]


def facts() -> dict[str, str]:
    """What the times belong to."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass
    return {"onnxruntime": ort.__version__, "machine": platform.machine(), "cpu": cpu, "system": platform.system()}


def digest(content: Any) -> str:
    """Of what a result says, so that an edit shows."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sealed(kit: dict[str, Any], measured: list[dict[str, Any]]) -> dict[str, Any]:
    """A result as it is written: what was asked, what was measured where, and the digest of both."""
    content = {"format": FORMAT, "kit": kit, "device": facts(), "measured": measured}
    return {**content, "digest": digest(content)}


def checked(folder: Path) -> dict[str, Any]:
    """The kit's description, every file's hash looked at. Raises SystemExit with what is wrong."""
    with (folder / KIT).open("rb") as file:
        kit: dict[str, Any] = json.loads(file.read(LONGEST))
    for name, wanted in kit["files"].items():
        if Path(name).name != name:
            raise SystemExit("This kit is not whole: it names a file outside its folder. Unpack it again.")
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != wanted:
            raise SystemExit("This kit is not whole: " + name + " was changed. Unpack it again.")
    return kit


def feeds(folder: Path) -> dict[str, Any]:
    """The inputs that every model is run on."""
    if (folder / FEED).stat().st_size > FEED_BYTES:
        raise SystemExit("The inputs of this kit are too large.")
    with np.load(folder / FEED, allow_pickle=False) as arrays:
        return dict(arrays)


def cannot_run(kit: dict[str, Any], error: Exception) -> str:
    """What is wrong, and what to do next."""
    words = str(error).splitlines()
    again = f"leanort profile {kit['model']} --set export.opset={OLDER_OPSET} --kit kit.tar.gz"
    return (
        f"onnxruntime {ort.__version__} on this device cannot run the models of this kit, which are of opset "
        f"{kit['setting']['opset']}. Install a newer onnxruntime here, or write the kit for an older opset: {again}\n"
        f"What it says: {words[0] if words else error!r}"
    )


def main() -> int:
    """Measure what is not measured yet."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent
    kit, result = checked(folder), folder / RESULT
    feed = feeds(folder)
    measured: list[dict[str, Any]] = []
    if result.is_file():
        before = json.loads(result.read_text(encoding="utf-8"))
        if before.get("kit") == kit and before.get("device") == facts():
            measured = before["measured"]
    try:
        dense = fastest(folder / kit["reference"], feed, kit["threads"])
        for number, name in enumerate(kit["models"]):
            if number < len(measured):
                continue
            measured.append(measure(dense, folder / name, feed, kit["threads"], kit["seconds"]))
            print(f"{number + 1}/{len(kit['models'])}  {measured[-1]['ratio']:.3f} of dense", flush=True)
            part = result.with_suffix(".part")
            part.write_text(json.dumps(sealed(kit, measured)), encoding="utf-8")
            part.replace(result)
    except Exception as error:  # onnxruntime's exception classes share no base of their own, but the package
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        raise SystemExit(cannot_run(kit, error)) from None
    print(f"Done: give {result} to leanort with --device.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
