"""What a LayerNorm over removed channels costs in onnxruntime, form by form, and what that does to whole models.

`python benchmarks/norm_forms.py [--models timm:deit_tiny_patch16_224 vit_b_16] [--ratio 0.5] [--seconds 20]`

Forms, each exact: the formula written out; padded with the zeros that went, and cut again; RMSNorm on the centred
stream with its shift added, and without (folded into the next layer). Models: dense; heads and neurons removed and the
stream kept; the stream removed too, with padded norms; the same, centred. One thread, batch 1, interleaved in one run.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

from exporters import to_onnx
from pipeline.channels import Policy, analyse, capture, centre, shrink
from pipeline.models.find import load
from pipeline.models.source import example
from validators import OrtRunner, race, random_feeds

OPSET, TOKENS = 23, 197


class Form(nn.Module):
    """A norm over `full` channels of which `kept` are left."""

    def __init__(self, kind: str, full: int, kept: int) -> None:
        super().__init__()
        self.kind, self.full, self.kept = kind, full, kept
        self.width = {"dense": full, "kept alone": kept}.get(kind, kept + 1 if kind.startswith("centred") else kept)
        self.gamma, self.beta = (nn.Parameter(torch.randn(self.width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) -> the same."""
        full, kept, gamma, beta = self.full, self.kept, self.gamma, self.beta
        if self.kind in ("dense", "kept alone"):  # the second is not exact: it shows what no exact form can beat
            return F.layer_norm(x, (self.width,), gamma, beta)
        if self.kind == "padded":
            wide, missing = F.pad(x, (0, full - kept)), (0, full - kept)
            return F.layer_norm(wide, (full,), F.pad(gamma, missing), F.pad(beta, missing))[..., :kept]
        if self.kind == "written out":
            share = kept / full
            mean = x.mean(-1, True) * share
            d = x - mean
            return d * torch.rsqrt((d * d).mean(-1, True) * share + mean * mean * (1 - share) + 1e-5) * gamma + beta
        y = F.rms_norm(x, (self.width,), gamma, 1e-5)
        return y if self.kind == "centred, shift folded" else y + beta


KINDS = ("dense", "kept alone", "written out", "padded", "centred", "centred, shift folded")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["timm:deit_tiny_patch16_224", "vit_b_16"])
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--seconds", type=float, default=20.0, help="per model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        for full in (192, 384, 768):
            forms(Path(folder), full, full // 2 - 1)
        for spec in args.models:
            models(Path(folder), spec, args.ratio, args.seconds)


def forms(folder: Path, full: int, kept: int) -> None:
    """Microseconds of one norm over TOKENS tokens."""
    runners = {}
    for kind in KINDS:
        form = Form(kind, full, kept).eval()
        x = (torch.randn(2, TOKENS, form.width),)
        program = capture(form, x).program
        runners[kind] = onnx(program, folder / f"{kind}{full}.onnx", x)
    seconds = 3.0
    times = {}
    feeds = {k: random_feeds(r.inputs, seed=0, batches=(1,))[0] for k, r in runners.items()}
    for kind, runner in runners.items():  # inputs differ in width, so each is raced against itself and the dense norm
        found = race({"a": runner}, feeds[kind], reference="a", seconds=seconds / len(runners), seed=0)
        times[kind] = 1e3 * found.runners["a"].median_ms
    print(f"{full} -> {kept}: " + ", ".join(f"{k} {t:.0f}" for k, t in times.items()) + " (us)")


def models(folder: Path, spec: str, ratio: float, seconds: float) -> None:
    """Latency of one model in four forms."""
    source = load(spec)
    inputs = example(source)
    captured = capture(source.build(), inputs)
    runners = {"dense": onnx(captured.program, folder / "dense.onnx", inputs)}
    for name, policy in (("kept", Policy(residual=False)), ("removed", Policy())):
        analysis = analyse(captured, policy)
        rng = np.random.default_rng(0)
        removed = {}
        for cluster in analysis.clusters:
            count = cluster.size - max(1, round(cluster.size * (1 - ratio)))
            removed[cluster.name] = np.isin(np.arange(cluster.size), rng.permutation(cluster.size)[:count])
        folded = captured.fold(analysis.masks(removed))
        small = shrink(folded, analysis, removed).program
        if name == "kept":
            runners["stream kept"] = onnx(small, folder / "kept.onnx", inputs)
        else:
            runners["removed, padded"] = onnx(small, folder / "padded.onnx", inputs)
            runners["removed, centred"] = onnx(centre(small).program, folder / "centred.onnx", inputs)
    feed = random_feeds(runners["dense"].inputs, seed=0, batches=(1,))[0]
    report = race(runners, feed, reference="dense", seconds=seconds, seed=0)
    print(f"{spec}, ratio {ratio}, {report.blocks} blocks")
    for name, found in report.runners.items():
        low, high = found.ratio.low, found.ratio.high
        print(f"  {name:<18}{found.median_ms:8.2f} ms  x {found.ratio.value:.3f} ({low:.3f} to {high:.3f})")


def onnx(program: ExportedProgram, path: Path, inputs: tuple[Tensor, ...]) -> OrtRunner:
    """The program in onnxruntime, one thread."""
    to_onnx(program, path, example=inputs, opset=OPSET, metadata={})
    return OrtRunner(path, threads=1)


if __name__ == "__main__":
    main()
