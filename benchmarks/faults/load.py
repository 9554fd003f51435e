"""Gates while the machine is busy."""

from __future__ import annotations

import multiprocessing
import os
import random
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.faults.outcome import Outcome, crashed, leanort

LOADS = ("none", "every core", "twice every core", "in bursts")


def run(folder: Path, tries: int, chance: random.Random) -> Outcome:
    """A model against itself may not fail a limit of 1.5, one of four times the work may not pass 1.0, whatever else
    runs; "inconclusive" is right for both."""
    outcome = Outcome()
    one, four = _model(folder / "one.onnx", 4), _model(folder / "four.onnx", 16)
    for number in range(tries):
        load = chance.choice(LOADS)
        count = {"none": 0, "every core": 1, "twice every core": 2, "in bursts": 1}[load] * (os.cpu_count() or 1)
        stop = multiprocessing.Event()
        others = [multiprocessing.Process(target=_work, args=(stop, load == "in bursts", n)) for n in range(count)]
        for other in others:
            other.start()
        slower = chance.random() < 0.5
        policy = folder / "policy.toml"
        limit = 1.0 if slower else 1.5
        policy.write_text(f"max_latency_ratio = {limit}\nmax_size_ratio = inf\nmax_accuracy_drop_points = inf\n")
        try:
            done = leanort("gate", four if slower else one, "--against", one, "--policy", policy, "--seconds", "1")
        finally:
            stop.set()
            for other in others:
                other.join()
        right = done.returncode != (0 if slower else 1) and not crashed(done)
        what = f"{number}, {load}, {'four times the work' if slower else 'the same model'}: exit {done.returncode}"
        outcome.expect(right, done.returncode == 0, what)
    return outcome


def _work(stop: multiprocessing.synchronize.Event, bursts: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    while not stop.is_set():
        rng.standard_normal((400, 400)) @ rng.standard_normal((400, 400))
        if bursts:
            stop.wait(float(rng.uniform(0, 0.3)))


def _model(path: Path, layers: int) -> Path:
    rng = np.random.default_rng(0)
    names = ["x", *(f"h{n}" for n in range(layers - 1)), "y"]
    weights = [
        numpy_helper.from_array(rng.standard_normal((256, 256)).astype(np.float32) / 16, f"w{n}") for n in range(layers)
    ]
    nodes = [helper.make_node("MatMul", [names[n], f"w{n}"], [names[n + 1]]) for n in range(layers)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 256]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path
