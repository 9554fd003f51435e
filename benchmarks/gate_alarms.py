"""How often the latency gate is wrong: `python benchmarks/gate_alarms.py [--gates 200] [--slower 0.05]`.

Two things are raced against a small convolutional net, `--gates` times each, by the gate's own race and judgement at a
limit half-way to the planted slow-down: the same file once more (A/A: anything but a pass is a false alarm), and the
same file made slower by a busy wait of that share of each inference (anything but a pass has caught it).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from validators import Bound, Limit, OrtRunner, judge, race, random_feeds


class Slowed(OrtRunner):
    """A model that takes a share longer than it needs."""

    slower = 0.0

    def infer(self, feed: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """Run once, then wait busily."""
        started = time.perf_counter()
        answer = super().infer(feed)
        until = started + (time.perf_counter() - started) * (1 + self.slower)
        while time.perf_counter() < until:
            pass
        return answer


def main() -> None:
    """Print one line for each kind of gate."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gates", type=int, default=200)
    parser.add_argument("--slower", type=float, default=0.05)
    parser.add_argument("--seconds", type=float, default=4.0, help="time budget of one gate, as in a recipe")
    parser.add_argument("--first", type=int, default=0, help="seed of the first gate")
    args = parser.parse_args()
    limit = 1 + args.slower / 2
    with tempfile.TemporaryDirectory() as folder:
        path = net(Path(folder) / "net.onnx")
        reference = OrtRunner(path, threads=1, name="dense")
        print(f"limit {limit:.3f}, at most {args.seconds:g} s each, {args.gates} gates of each kind")
        for label, slower in (("A/A", 0.0), (f"{args.slower:.0%} slower", args.slower)):
            shipped = Slowed(path, threads=1, name="shipped")
            shipped.slower = slower
            outcomes: Counter[str] = Counter()
            warnings: Counter[str] = Counter()
            ratios, spent = [], []
            for gate in range(args.first, args.first + args.gates):
                started = time.perf_counter()
                feed = random_feeds(reference.inputs, seed=gate, batches=(1,))[0]
                report = race(
                    {"dense": reference, "shipped": shipped},
                    feed,
                    reference="dense",
                    seconds=args.seconds,
                    seed=gate,
                    bounds=[Bound("shipped", "dense", limit)],
                )
                ratio = report.runners["shipped"].ratio
                outcomes[judge({"latency": ratio}, [Limit(metric="latency", operator="<=", value=limit)]).outcome] += 1
                warnings.update(warning.partition(":")[0] for warning in report.warnings)
                ratios.append(ratio.value)
                spent.append(time.perf_counter() - started)
            passed = outcomes["pass"]
            print(
                f"{label:<12} pass {passed}, fail {outcomes['fail']}, inconclusive {outcomes['inconclusive']}: "
                f"{100 * (args.gates - passed) / args.gates:.1f} % no pass; "
                f"ratio {np.median(ratios):.4f} (1st to 99th percentile {np.quantile(ratios, 0.01):.4f} to "
                f"{np.quantile(ratios, 0.99):.4f}); {np.median(spent):.2f} s a gate; warnings {dict(warnings)}",
                flush=True,
            )


def net(path: Path) -> Path:
    """Five 3x3 convolutions of 32 channels at 32x32 pixels: about a millisecond on one thread."""
    rng = np.random.default_rng(0)
    nodes, tensors, value, width = [], [], "input", 3
    for layer in range(5):
        weight = rng.standard_normal((32, width, 3, 3)).astype(np.float32) / np.float32(np.sqrt(9 * width))
        tensors.append(numpy_helper.from_array(weight, f"w{layer}"))
        nodes.append(helper.make_node("Conv", [value, f"w{layer}"], [f"c{layer}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{layer}"], [f"r{layer}"]))
        value, width = f"r{layer}", 32
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, ["batch", 32, 32, 32])],
        tensors,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


if __name__ == "__main__":
    main()
