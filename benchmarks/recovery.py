"""Seconds and memory of the closed-form fit: `python benchmarks/recovery.py [CASES] [--share 0.5] [--samples N]`.

Cases: `small` ResNet-50 at 32x32 with 1,000 images; `large` the same at 224x224 with 500; `text` a BERT of 6 layers
with 500 texts of 128 tokens; by default all three, each in a process of its own. Weights, samples and the groups
removed are random: none of that changes what the fit costs. `--profile` prints where the time goes.

One line a case: seconds of the fit by the wall clock, and of all cores together; peak memory of the process in GB, and
before the fit; what went to disk; weights fitted, and left with a reason.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from pipeline.channels.coupling.analyse import analyse
from pipeline.channels.program.capture import capture
from pipeline.models.find import load
from pipeline.models.source import ModelSource, example
from pipeline.recovery.closed_form import ClosedForm, recover

CASES = {"small": ("resnet50", (3, 32, 32), 1000), "large": ("resnet50", (3, 224, 224), 500), "text": ("", (128,), 500)}
LAYERS = 6
"""Of the BERT."""


def main() -> int:
    """Run each case in a process of its own; exit 0 when all of them ran."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", choices=[*CASES, "all"], default="all")
    parser.add_argument("--share", type=float, default=0.5, help="of the groups of every cluster that is removed")
    parser.add_argument("--samples", type=int, help="other than the case's own number")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure(args.one, args.share, args.samples, profile=args.profile)
        return 0
    options = ["--share", str(args.share), *(["--samples", str(args.samples)] if args.samples else [])]
    options += ["--profile"] if args.profile else []
    failed = 0
    for case in CASES if "all" in args.cases else args.cases:
        failed |= subprocess.run([sys.executable, __file__, "--one", case, *options], check=False).returncode
    return int(failed != 0)


def source_of(case: str) -> ModelSource:
    """The model of a case, with random weights."""
    spec, size, _ = CASES[case]
    if spec:
        return load(spec, input_size=size)
    with tempfile.TemporaryDirectory() as folder:
        config = {"model_type": "bert", "num_hidden_layers": LAYERS, "architectures": ["BertForSequenceClassification"]}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return load(f"hf:{folder}", input_size=size)


def measure(case: str, share: float, samples: int | None, *, profile: bool) -> None:
    """Fit one case and print its line."""
    source = source_of(case)
    count = samples or CASES[case][2]
    captured = capture(source.build().eval(), example(source))
    analysis = analyse(captured)
    draw = np.random.default_rng(0)
    removed = {c.name: draw.permutation(c.size) < share * c.size for c in analysis.clusters}
    parameters = set(captured.program.graph_signature.inputs_to_parameters.values())
    masks = {n: torch.from_numpy(m) for n, m in analysis.masks(removed).items() if n in parameters}
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(one.sample(count, generator) for one in source.inputs)
    before, start = _peak(), _processor_seconds()
    profiler = cProfile.Profile()
    made: ClosedForm = (
        profiler.runcall(recover, captured, masks, inputs) if profile else recover(captured, masks, inputs)
    )
    left = sum(bool(one.reason) for one in made.fitted)
    print(
        f"{case:6} {count} samples  {made.seconds:6.1f} s ({_processor_seconds() - start:.1f} s of all cores)  "
        f"{_peak():.2f} GB ({before:.2f} before)  {made.on_disk / 1e9:.1f} GB on disk  "
        f"{len(made.fitted) - left} fitted, {left} left",
        flush=True,
    )
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
