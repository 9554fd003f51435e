"""How well a latency table predicts: `python benchmarks/latency_table.py [MODEL ...] [--tests 12] [--int8]`.

For each model (a spec as for `leanort deploy`; `NAME@C,H,W` sets the input) a table is measured, with untrained
weights, which no time hangs on. Then models of random widths that the table has not seen are exported and raced against
the dense one, as the gate does it, and held against what the table says of them. With `--depth`, that share of the
residual branches goes as a whole in each of them; of the table's own models one is without any. With `--goal 0.5`,
widths are chosen for that share of the time, and for as many multiply-accumulates by counting these, and timed.
Printed: seconds of the table, the error that it expects of itself, and the relative error of the predictions, median
and worst.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from exporters.host import vector_block
from pipeline.channels.coupling.analyse import analyse
from pipeline.channels.coupling.groups import Analysis
from pipeline.channels.dead.removable import Branch, removable
from pipeline.latency import probes, profile, trial
from pipeline.latency.probes import Setting
from pipeline.measurements import Measurements
from pipeline.models.find import load
from pipeline.models.graph import graph_of
from pipeline.models.source import ModelSource
from pipeline.progress import TerminalProgress
from pipeline.selection import widths
from pipeline.selection.allocation import Budget, Removed
from pipeline.selection.cost import Cost, Counted, Timed
from pipeline.selection.curves import Curve
from pipeline.training.masks import maskable

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "timm:deit_tiny_patch16_224", "hf:bert")


def main() -> int:
    """Print one line per model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--tests", type=int, default=12, help="models of random widths to predict")
    parser.add_argument("--int8", action="store_true", help="the latency of int8 files")
    parser.add_argument("--depth", type=float, default=0.0, help="share of the residual branches that go as a whole")
    parser.add_argument("--goal", type=float, default=0.0, help="choose widths for this share of the time as well")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--verbose", action="store_true", help="every prediction")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'model':<30}{'dense, ms':>10}{'table, s':>10}{'expected':>10}{'median':>9}{'worst':>8}", flush=True)
    for name in args.models:
        one(name, args)
    return 0


def one(name: str, args: argparse.Namespace) -> None:
    """Measure a table and hold it against models that it has not seen."""
    spec, _, shape = name.partition("@")
    size = tuple(int(n) for n in shape.split(",")) if shape else None
    source = load(spec, input_size=size, seed=0)
    model = source.build()
    analysis = analyse(graph_of(model, source))
    setting = Setting(args.threads, args.batch, args.int8, 23, vector_block())
    began = time.perf_counter()
    every = removable(analysis, maskable(model))
    table = profile.measure(analysis, source, setting, analysis.clusters, Measurements(), TerminalProgress(), every)
    fit = table.fit(analysis)
    spent = time.perf_counter() - began
    branches = every if args.depth else ()
    errors, draw = [], np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        times = _Times(analysis, source, setting, Path(folder))
        for choice in probes.drawn(analysis.clusters, setting.align, args.tests + 1, args.seed)[1:]:
            gone = [one for one in branches if draw.random() < args.depth]
            choice |= {name: np.ones_like(choice[name]) for one in gone for name in one.inside}
            took, said = times.of(choice, gone), Timed(fit, 1.0, table.dense_ms, args.threads, args.batch).of(choice)
            errors.append(abs(said / took - 1))
            if args.verbose:
                share = analysis.estimate(choice, branches=True).macs / max(analysis.macs, 1)
                print(f"  MACs {share:.2f}: predicted {said:.3f}, took {took:.3f} ({said / took - 1:+.1%})", flush=True)
        print(
            f"{name:<30}{table.dense_ms:>10.2f}{spent:>10.0f}{fit.error:>10.1%}"
            f"{np.median(errors):>9.1%}{max(errors):>8.1%}",
            flush=True,
        )
        if args.goal:
            _chosen(analysis, Timed(fit, args.goal, table.dense_ms, args.threads, args.batch), setting.align, times)


class _Times:
    """Times of models as files over the dense one's, in a race as the gate runs it: several sessions of each."""

    def __init__(self, analysis: Analysis, source: ModelSource, setting: Setting, folder: Path) -> None:
        self.analysis, self.source, self.setting, self.path = analysis, source, setting, folder / "model.onnx"
        self.reference = folder / "dense.onnx"
        self.feed = profile.dense_file(analysis, source, setting, self.reference)
        self.weights = probes.visible(analysis)

    def of(self, removed: Removed, branches: Sequence[Branch] = ()) -> float:
        """The time without these groups and whole branches."""
        masks = dict(self.analysis.masks(removed))
        for branch in branches:
            masks |= branch.masks(self.analysis.captured.state)
        program = probes.cut(self.analysis, self.weights, masks, self.setting)
        probes.export(program, self.source, self.setting, self.path, self.feed)
        threads = self.setting.threads
        share, _ = trial.timed(self.path, self.reference, self.feed, threads, trial.SECONDS, trial.SEED)
        return share.value


def _chosen(analysis: Analysis, cost: Timed, align: int, times: _Times) -> None:
    """Widths for a goal by the table, and for as many multiply-accumulates by counting them: what either takes.

    Of every cluster the same share is worth the same, and the more has gone the more it costs: what real curves say
    hangs on the weights, which are untrained here.
    """
    curves = {
        c.name: Curve(tuple(range(c.size + 1)), tuple((n / c.size) ** 2 for n in range(c.size + 1)))
        for c in analysis.clusters
    }
    scores = {c.name: np.arange(c.size, dtype=float) for c in analysis.clusters}
    budget = Budget(ratio=0.5, align=align, floor=0.1)

    def choice(goal: Cost) -> tuple[float, float]:
        """(share of MACs, of the time) of the widths that a goal leads to."""
        removed = widths.choose(analysis, analysis.clusters, scores, curves, budget, [goal])
        return analysis.estimate(removed).macs / analysis.macs, times.of(removed)

    macs, took = choice(cost)
    print(f"  for {cost.goal:.2f} of the time, by the table: MACs {macs:.3f}, took {took:.3f}, x {took / macs:.3f}")
    macs, took = choice(Counted(analysis, "macs", macs, analysis.macs / 1e6))
    print(f"  for as many MACs, by counting: MACs {macs:.3f}, took {took:.3f}, x {took / macs:.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
