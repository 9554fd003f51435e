"""Time and memory of analyse + shrink: `python benchmarks/shrink_speed.py [--models NAME ...] [--sweep] [--huge]`.

Interleaved: every repetition measures ours and the other on the same model before the next one starts; medians are
shown. Times are processor seconds of one thread, so that a busy machine does not count against anybody.
`--sweep` shows that time grows linearly with depth and width; `--huge` does ViT-H/14 and its peak memory.
Capturing (torch.export) is shown apart: it is PyTorch's, once per model, and no part of analyse + shrink.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
import warnings
from collections.abc import Callable

import numpy as np
import psutil
import torch
from torch import nn

from pipeline.channels import Analysis, Captured, analyse, capture, shrink
from pipeline.models.find import load
from pipeline.models.source import example

MODELS = ("resnet50", "mobilenet_v2", "densenet121", "vit_b_16", "convnext_tiny")


def main() -> None:
    """Print one table per question asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--huge", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    titles = ("capture", "analyse", "shrink", "ours")
    print(f"{'model':<24}" + "".join(f"{t:>9}" for t in titles) + f"{'Torch-Pruning':>15}{'ratio':>8}  (processor s)")
    for name in args.models:
        compare(name, args.repeat)
    if args.sweep:
        sweep(args.repeat)
    if args.huge:
        huge()


def halves(analysis: Analysis) -> dict[str, np.ndarray]:
    """Half of every cluster's groups, at random."""
    rng = np.random.default_rng(0)
    return {c.name: rng.random(c.size) < 0.5 for c in analysis.clusters}


def ours(captured: Captured) -> tuple[float, float]:
    """Seconds of (analyse, shrink); masking and folding between them are the pipeline's, and not counted."""
    started = time.process_time()
    analysis = analyse(captured)
    analysed = time.process_time() - started
    removed = halves(analysis)
    folded = captured.fold(analysis.masks(removed))
    started = time.process_time()
    shrink(folded, analysis, removed)
    return analysed, time.process_time() - started


def theirs(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> float:
    """Seconds for Torch-Pruning to build its graph and remove half of every layer; NaN where it fails."""
    import torch_pruning

    started = time.process_time()
    try:
        last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
        pruner = torch_pruning.pruner.MagnitudePruner(
            model, inputs[0], torch_pruning.importance.MagnitudeImportance(), pruning_ratio=0.5, ignored_layers=last
        )
        pruner.step()
        with torch.no_grad():
            model(*inputs)
    except Exception:
        return float("nan")
    return time.process_time() - started


def compare(name: str, repeat: int) -> None:
    """One line: medians over interleaved repetitions."""
    source = load(name)
    inputs = example(source, batch=1)
    started = time.process_time()
    captured = capture(source.build(), inputs)
    capturing = time.process_time() - started
    ours(captured)  # warm: the first call fills the table of operators
    rows = []
    for _ in range(repeat):
        analysing, shrinking = ours(captured)
        rows.append((analysing, shrinking, theirs(source.build(), inputs)))
    a, s, t = (statistics.median(column) for column in zip(*rows, strict=True))
    other = "fails" if t != t else f"{t:.3f}"
    ratio = "-" if t != t else f"{(a + s) / t:.2f}"
    print(f"{name:<24}{capturing:>9.2f}{a:>9.3f}{s:>9.3f}{a + s:>9.3f}{other:>15}{ratio:>8}", flush=True)


class Tower(nn.Module):
    """`depth` residual blocks of `width` channels."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, width, 1), nn.Conv2d(width, 10, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 1))
            for _ in range(depth)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores per pixel."""
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def sweep(repeat: int) -> None:
    """Seconds per node over depth, and per channel over width: flat lines mean linear growth."""
    shapes = [(8, 64), (16, 64), (32, 64), (64, 64), (16, 128), (16, 256), (16, 512)]
    for depth, width in shapes:
        captured = capture(Tower(depth, width), (torch.randn(1, 3, 8, 8),))
        total = statistics.median(sum(ours(captured)) for _ in range(repeat))
        nodes = len(captured.program.graph.nodes)
        print(
            f"depth {depth:>3} width {width:>4} nodes {nodes:>5}: {total:.3f} s, {1e6 * total / nodes:.0f} µs per node"
        )


def peak_above(work: Callable[[], object]) -> tuple[float, float]:
    """(processor seconds, peak resident bytes above the start) of `work`."""
    process, done, peak = psutil.Process(), threading.Event(), [0]
    base = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], process.memory_info().rss - base)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.process_time()
    work()
    seconds = time.process_time() - started
    done.set()
    watcher.join()
    return seconds, float(peak[0])


def huge() -> None:
    """ViT-H/14: analyse, mask, fold and shrink."""
    source = load("vit_h_14")
    model = source.build()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    captured = capture(model, example(source, batch=1))

    def work() -> None:
        analysis = analyse(captured)
        removed = halves(analysis)
        shrink(captured.fold(analysis.masks(removed)), analysis, removed)

    seconds, peak = peak_above(work)
    print(f"vit_h_14: {seconds:.1f} s, peak {peak / size:.2f} x the model's {size / 1e9:.2f} GB above the loaded model")


if __name__ == "__main__":
    main()
