"""The turns of a race: a model's inferences, each timed. As a program: the same, for a process that asks for them.

A program of its own, which imports nothing but onnxruntime and numpy, as a deployment does: of a DeiT-tiny at 32x32 the
same two files took 0.3758 to 0.3784 of each other in five such processes, and 0.3767 to 0.3814 in five that had trained
and exported before. A model that crashes takes this process down and not the one that asked.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# onnxruntime 1.31 and later keep a log of what they run, for upload: off, unless whoever calls has said otherwise.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

# Warm: the median of the last few inferences is within this share of the median of the few before.
WARM_WITHIN = 0.05
WARM_WINDOW = 3
WARM_LIMIT = 30

# A model that ran alone would find the caches as it left them. After another one that takes so many inferences: of a
# MobileNetV2 at 224x224 and half of it the ratio was 0.558 in the first one after a change, then 0.472, 0.442, 0.436,
# and 0.445 from the eighth on; of a DeiT-tiny at 32x32 cut to a third 0.435, 0.367, 0.328, and 0.338 from the sixth on.
SETTLED = 8
# One that takes long shows them less: at 224x224 a ResNet-18 of a ResNet-50 0.415, then 0.415 to 0.421 throughout; an
# EfficientNet-B0 of a ViT-tiny (22 ms) 0.619, 0.547, 0.545, 0.537, then 0.52.
SETTLED_SECONDS = 0.05

Inference = Callable[[], object]
"""Of one model, on the race's inputs."""
Times = tuple[float, float]
"""Seconds on the wall and of CPU time for one inference."""


def once(infer: Inference) -> Times:
    """Run once."""
    cpu, wall = time.process_time(), time.perf_counter()
    infer()
    return time.perf_counter() - wall, time.process_time() - cpu


def turn(infer: Inference, timed: int) -> list[Times]:
    """A few inferences that are not counted, until the caches are this model's own, then `timed` that are."""
    began = time.perf_counter()
    for _ in range(SETTLED):
        once(infer)
        if time.perf_counter() - began >= SETTLED_SECONDS:
            break
    return [once(infer) for _ in range(timed)]


def warm_up(infer: Inference) -> tuple[int, float]:
    """Run until the times are steady. Returns how many inferences it took and the last window's median in seconds."""
    times: list[float] = []
    while len(times) < WARM_LIMIT:
        times.append(once(infer)[0])
        if len(times) >= 2 * WARM_WINDOW:
            before = float(np.median(times[-2 * WARM_WINDOW : -WARM_WINDOW]))
            now = float(np.median(times[-WARM_WINDOW:]))
            if now >= before * (1 - WARM_WITHIN):
                break
    return len(times), float(np.median(times[-WARM_WINDOW:]))


def session_options(threads: int, optimize: bool, entries: Mapping[str, str]) -> ort.SessionOptions:
    """How a model is opened: `threads` inside an operator, one operator at a time; idle threads stop when a run ends.

    `optimize=False` runs the graph as it is in the file; `entries` are further session configuration entries.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3  # errors only; they arrive as exceptions too
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def main(given: str) -> None:
    """Open models and take turns, as lines of JSON on the standard input ask: {"open": true} opens all anew and warms
    them up, {"turns": [NAME, ...], "timed": N} takes turns in that order. Each answer is a line; {"failed": NAME,
    "reason": ...} ends the process.

    `given`: {"feed": a .npz of arr_0, arr_1, ..., "inputs": [their names], "models": {NAME: {"path", "threads",
    "optimize", "entries"}}}.
    """
    asked = json.loads(given)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    with np.load(asked["feed"], allow_pickle=False) as arrays:
        feed = {name: arrays[f"arr_{i}"] for i, name in enumerate(asked["inputs"])}
    sessions: dict[str, Any] = {}
    name = ""

    def opened(path: str, threads: int, optimize: bool, entries: Mapping[str, str]) -> Any:
        options = session_options(threads, optimize, entries)
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def inference(name: str) -> Inference:
        return lambda: sessions[name].run(None, feed)

    gc.disable()
    try:
        for line in sys.stdin:
            order = json.loads(line)
            answer: Any = []
            if "open" in order:
                for name, model in asked["models"].items():
                    sessions[name] = opened(**model)
                    answer.append(warm_up(inference(name)))
            else:
                for name in order["turns"]:
                    answer.append(turn(inference(name), order["timed"]))
            print(json.dumps(answer), file=answers, flush=True)
    except Exception as error:  # onnxruntime's exception classes share no base of their own
        print(json.dumps({"failed": name, "reason": str(error)}), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
