"""How well a latency table predicts: `python benchmarks/latency_table.py [MODEL ...] [--tests 12] [--int8]`.

For each model (a spec as for `leanort deploy`; `NAME@C,H,W` sets the input) a table is measured, with untrained
weights, which no time hangs on. Then models of random widths that the table has not seen are exported and timed against
the dense one, in turns, and held against what the table says of them. With `--depth`, that share of the residual
branches goes as a whole in each of them, which none of the table's own models shows. Printed: seconds of the table,
the error that it expects of itself, and the relative error of the predictions, median and worst.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from exporters.host import vector_block
from pipeline.channels.coupling.analyse import analyse
from pipeline.latency import device, probes, profile, trial
from pipeline.latency.probes import Setting
from pipeline.measurements import Measurements
from pipeline.models.find import load
from pipeline.models.graph import graph_of
from pipeline.progress import TerminalProgress
from pipeline.selection.branches import removable
from pipeline.training.masks import maskable

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "timm:deit_tiny_patch16_224", "hf:bert")


def main() -> int:
    """Print one line per model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--tests", type=int, default=12, help="models of random widths to predict")
    parser.add_argument("--int8", action="store_true", help="the latency of int8 files")
    parser.add_argument("--depth", type=float, default=0.0, help="share of the residual branches that go as a whole")
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
    clusters = analysis.clusters
    began = time.perf_counter()
    table = profile.measure(analysis, source, setting, clusters, Measurements(), TerminalProgress())
    fit = table.fit(analysis)
    spent = time.perf_counter() - began
    errors, rng = [], np.random.default_rng(args.seed)
    branches = removable(analysis, maskable(model)) if args.depth else ()
    with tempfile.TemporaryDirectory() as folder:
        dense, path = Path(folder) / "dense.onnx", Path(folder) / "model.onnx"
        feed = profile.dense_file(analysis, source, setting, dense)
        reference = device.session(dense, setting.threads)
        for choice in probes.drawn(clusters, setting.align, args.tests + 1, args.seed)[1:]:
            gone = [one for one in branches if rng.random() < args.depth]
            choice |= {name: np.ones_like(choice[name]) for one in gone for name in one.inside}
            if gone:
                masks = {key: mask for one in gone for key, mask in one.masks(analysis.captured.state).items()}
                program = trial.cut(analysis, {}, {**analysis.masks(choice), **masks}, setting)
                probes.export(program, source, setting, path, feed)
            else:
                probes.write(analysis, choice, source, setting, path, feed)
            took = device.measure(reference, path, feed, setting.threads, 2 * profile.SECONDS)["ratio"]
            kept = fit.sizes.kept({cluster: int((~gone).sum()) for cluster, gone in choice.items()})
            said = float(fit.ratio(kept[None])[0])
            errors.append(abs(said / took - 1))
            if args.verbose:
                share = analysis.estimate(choice).macs / max(analysis.macs, 1)
                print(f"  MACs {share:.2f}: predicted {said:.3f}, took {took:.3f} ({said / took - 1:+.1%})", flush=True)
    print(
        f"{name:<30}{table.dense_ms:>10.2f}{spent:>10.0f}{fit.error:>10.1%}{np.median(errors):>9.1%}{max(errors):>8.1%}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
