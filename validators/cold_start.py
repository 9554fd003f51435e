"""What a fresh process pays for a model, as JSON: `python cold_start.py MODEL THREADS SESSION FEED.npz INPUT...`

Run as a program by `structure.measure`; imports nothing but what a deployment needs.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort


def peak_bytes() -> int:
    """This process's largest resident size so far.

    Linux keeps `ru_maxrss` across exec, so a child of a large process starts with its parent's peak; VmHWM is its own.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(model: str, threads: str, session_entries: str, feed_file: str, *names: str) -> None:
    """Load the model and run it once on the arrays arr_0, arr_1, ... of the file, in the order of the input `names`.

    `session_entries` are further session configuration entries, as a JSON object.

    Prints peak memory before and after, in bytes, and the times of the load and of the first inference.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = int(threads)
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for key, value in json.loads(session_entries).items():
        options.add_session_config_entry(key, value)
    with np.load(feed_file, allow_pickle=False) as arrays:
        feed = {name: arrays[f"arr_{i}"] for i, name in enumerate(names)}
    before = peak_bytes()
    start = time.perf_counter()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    loaded = time.perf_counter()
    session.run(None, feed)
    ran = time.perf_counter()
    print(
        json.dumps(
            {
                "idle_rss": before,
                "peak_rss": peak_bytes(),
                "cold_load_ms": 1e3 * (loaded - start),
                "cold_first_ms": 1e3 * (ran - loaded),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
