"""How long it takes to choose all widths together: `python benchmarks/allocation.py [--layers 200] [--latency]`.

A chain of pointwise convolutions, whose layers have curves drawn at random, is cut to a share of its
multiply-accumulates, and with `--latency` to as much of its time by a latency table that is measured first. Greedily
and by integer programming, in turns. Printed for so many widths a layer: seconds of the processor (median of the
rounds) and, for the integer program, the loss that the curves promise over that of the greedy choice.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import numpy as np
import torch
from torch import nn

from exporters.host import vector_block
from pipeline.channels.coupling.analyse import analyse
from pipeline.channels.coupling.groups import Analysis
from pipeline.latency import profile
from pipeline.latency.probes import Setting
from pipeline.measurements import Measurements
from pipeline.models.find import load
from pipeline.models.graph import graph_of
from pipeline.progress import TerminalProgress
from pipeline.recipe.prune import PruneSection
from pipeline.selection import widths
from pipeline.selection.allocation import Budget, Removed
from pipeline.selection.cost import Cost, Counted, Timed
from pipeline.selection.curves import SHARES, Curve


def main() -> int:
    """Print one line per cost, number of widths and way of choosing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=200)
    parser.add_argument("--channels", type=int, default=512, help="of each layer")
    parser.add_argument("--widths", type=int, nargs="*", default=[8, 32], help="how many widths a layer may have")
    parser.add_argument("--goal", type=float, default=0.4, help="share of the multiply-accumulates, or time, left")
    parser.add_argument("--latency", action="store_true", help="by a latency table as well, which is measured first")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    source = load(_chain(args.layers, args.channels), input_size=(3, 4, 4))
    analysis = analyse(graph_of(source.build(), source))
    costs: dict[str, Cost] = {"MACs": Counted(analysis, "macs", args.goal, analysis.macs / 1e6)}
    if args.latency:
        setting = Setting(1, 1, False, 23, vector_block())
        table = profile.measure(analysis, source, setting, analysis.clusters, Measurements(), TerminalProgress())
        costs["latency"] = Timed(table.fit(analysis), args.goal, table.dense_ms, 1, 1)
    curves = _curves(analysis, args.seed)
    print(f"{len(analysis.clusters)} layers of {args.channels} channels, {args.goal} left")
    print(f"{'by':<10}{'widths':>8}{'greedy, s':>12}{'exact, s':>12}{'loss':>9}")
    for name, cost in costs.items():
        for count in args.widths:
            greedy, exact, loss = _timed(analysis, curves, cost, max(1, args.channels // count), args.rounds)
            print(f"{name:<10}{count:>8}{greedy:>12.2f}{exact:>12.2f}{loss:>9.3f}", flush=True)
    return 0


def _chain(layers: int, channels: int) -> nn.Module:
    """`layers` convolutions in a row, and a last one that nothing is cut from."""
    inside = [layer for _ in range(layers - 1) for layer in (nn.Conv2d(channels, channels, 1), nn.ReLU())]
    return nn.Sequential(nn.Conv2d(3, channels, 1), nn.ReLU(), *inside, nn.Conv2d(channels, 8, 1)).eval()


def _curves(analysis: Analysis, seed: int) -> dict[str, Curve]:
    """A power of what goes for each layer, from 1e-4 to 1 nats where all goes: real ones lie so far apart."""
    draw = np.random.default_rng(seed)
    found = {}
    for cluster in analysis.clusters:
        most, power = 10 ** draw.uniform(-4, 0), draw.uniform(1.2, 3)
        counts = tuple(round(share * cluster.size) for share in SHARES)
        found[cluster.name] = Curve((0, *counts), (0.0, *(most * (n / cluster.size) ** power for n in counts)))
    return found


def _timed(
    analysis: Analysis, curves: dict[str, Curve], cost: Cost, align: int, rounds: int
) -> tuple[float, float, float]:
    """(seconds of the greedy choice, of the exact one, the exact one's loss over the greedy one's)."""
    scores = {cluster.name: np.arange(cluster.size, dtype=float) for cluster in analysis.clusters}
    budget = Budget(0.5, align=align, floor=PruneSection().floor)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    lost = {}
    for _ in range(rounds):
        for exact, spent in seconds.items():
            began = time.process_time()
            chosen = widths.choose(analysis, analysis.clusters, scores, curves, budget, [cost], exact=exact)
            spent.append(time.process_time() - began)
            lost[exact] = _lost(curves, chosen)
    return statistics.median(seconds[False]), statistics.median(seconds[True]), lost[True] / lost[False]


def _lost(curves: dict[str, Curve], chosen: Removed) -> float:
    return sum(curve.at(int(chosen[name].sum())) for name, curve in curves.items())


if __name__ == "__main__":
    sys.exit(main())
