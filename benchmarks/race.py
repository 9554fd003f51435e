"""What onnxruntime makes of one pruned model: `python benchmarks/race.py MODEL [--ratio 0.5] [--candidates ...]`.

Untrained weights and random channels and heads, of which every layer loses another number. Each candidate is proven
against the shrunk program in float32 rounding (int8 has no budget here, and shows its error only), all are timed in one
interleaved run, and an audit counts the attentions that are one operator. Takes whatever `leanort deploy` takes as
MODEL, several inputs included, such as hf:bert. Exits 1 when a float candidate is not the same function.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporters import (
    CANDIDATES,
    ExportError,
    Made,
    NotApplicable,
    Source,
    describe,
    expected_attention,
    fused_attention,
    make,
    to_onnx,
)
from pipeline.channels import analyse, capture, shrink
from pipeline.models.find import load
from pipeline.models.source import example
from validators import Feed, OrtRunner, TorchRunner, compare, race

DEFAULT = ("portable", "host", "opset18", "opset23", "fused", "ort-portable", "int8-dynamic")


def main() -> int:
    """Print one row per candidate."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--input", type=int, nargs=3, metavar=("C", "H", "W"))
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the groups of every cluster to remove")
    parser.add_argument("--candidates", nargs="*", default=DEFAULT, choices=list(CANDIDATES))
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    source = load(args.model, input_size=tuple(args.input) if args.input else None, seed=args.seed)
    inputs = example(source, seed=args.seed)
    captured = capture(source.build(), inputs)
    analysis = analyse(captured)
    rng = np.random.default_rng(args.seed)
    removed = {c.name: rng.random(c.size) < args.ratio for c in analysis.clusters}
    program = shrink(captured.fold(analysis.masks(removed)), analysis, removed).program
    names = [one.name for one in source.inputs]
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "model.onnx"
        to_onnx(program, exported, example=inputs, opset=20, metadata={}, input_names=names)
        outputs = [spec.name for spec in describe(exported).outputs]
        reference = TorchRunner(program, example=inputs, threads=1, input_names=names, output_names=outputs)
        feeds = []
        for batch in (1, 3):
            arrays = [tensor.numpy() for tensor in example(source, batch, seed=batch)]
            feeds.append(Feed(f"random, batch {batch}", dict(zip(names, arrays, strict=True))))
        made_from = Source(
            onnx=exported,
            program=lambda: program,
            example=inputs,
            calibration=lambda: calibration(feeds),
            folder=Path(folder),
        )
        expected = expected_attention(program)
        print(f"{args.model}: {analysis.params:,} parameters, {expected} attentions in the program", flush=True)
        return table(args.candidates, made_from, reference, feeds, expected, args.seconds)


def calibration(feeds: list[Feed]) -> Iterable[Mapping[str, Any]]:
    """The largest feed: ranges of random inputs, since there are no others."""
    return [feeds[-1].arrays]


def table(
    wanted: list[str], source: Source, reference: TorchRunner, feeds: list[Feed], expected: int, seconds: float
) -> int:
    """Make, prove and time the candidates; 1 when a float one is wrong."""
    rows: dict[str, tuple[Made, float | None, float]] = {}
    runners: dict[str, OrtRunner] = {}
    wrong = False
    for name in wanted:
        started = time.perf_counter()
        try:
            made = make(name, source)
            runner = OrtRunner(made.path, threads=1, name=name)
        except (NotApplicable, ExportError) as error:
            print(f"{name:<14} {'skipped' if isinstance(error, NotApplicable) else 'FAILED'}: {error}", flush=True)
            continue
        parity = compare(reference, runner, feeds, atol=1e-4, rtol=0.0)
        rows[name] = (made, parity.max_scaled, time.perf_counter() - started)
        if parity.passed or made.spec.budget == "accuracy":
            runners[name] = runner
        else:
            wrong = True
            print(f"{name:<14} WRONG: {parity.reasons[0]}", flush=True)
    if not runners:
        return 1
    first = next(iter(runners))
    report = race(runners, feeds[0], reference=first, seconds=seconds, seed=0)
    titles = ("ms", f"of {first}", "interval", "MB", "error", "attention", "made, s")
    widths = (9, 13, 18, 8, 10, 11, 9)
    print(f"{'candidate':<14}" + "".join(f"{t:>{w}}" for t, w in zip(titles, widths, strict=True)))
    for name, timed in report.runners.items():
        made, error, taken = rows[name]
        ratio = timed.ratio
        cells = (
            f"{timed.median_ms:.2f}",
            f"{ratio.value:.3f}",
            f"{ratio.low:.3f} to {ratio.high:.3f}",
            f"{made.bytes / 1e6:.2f}",
            f"{error:.1e}" if error is not None else "none",
            f"{fused_attention(made.operators)}/{expected}" if made.operators else "?",
            f"{taken:.1f}",
        )
        print(f"{name:<14}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True)) + f"  {made.technique}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
