"""The other libraries, each as its own documentation shows, at widths that leave the wanted MACs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.compare.problems import ALIGN, Problem, macs

T = TypeVar("T")
Make = Callable[[nn.Module, float], nn.Module]
"""(a copy of the dense model, share of channels that goes) -> the pruned model."""
STEPS = 9
"""Of the bisection."""
SEEN = 128
"""Samples that gradients are taken of."""


@dataclass(frozen=True)
class Pruned:
    """A model, the share of MACs that is left, the share of channels that went, and of latency where that was asked."""

    model: nn.Module
    macs: float
    ratio: float
    latency: float | None = None


def at_ratio(dense: nn.Module, make: Make, ratio: float, problem: Problem) -> Pruned:
    """The model that `make` gives at one ratio."""
    made = make(copy.deepcopy(dense), ratio)
    return Pruned(made, macs(made, problem.x) / macs(dense, problem.x), ratio)


def _bisected(
    make: Callable[[float], T], left: Callable[[T], float], wanted: float, *, nearest: bool
) -> tuple[T, float]:
    """What `make` gives for some share of channels that goes, and what is `left` of the dense model then: the nearest
    to `wanted`, or the most that is no more than it. Raises ValueError where nothing is.
    """
    low, high = 0.0, 0.98
    best: tuple[T, float] | None = None
    most = wanted if nearest else wanted * 1.01
    for _ in range(STEPS):
        middle = (low + high) / 2
        made = make(middle)
        found = left(made)
        low, high = (low, middle) if found <= most else (middle, high)
        if nearest:
            better = best is None or abs(found - wanted) < abs(best[1] - wanted)
        else:
            better = found <= most and (best is None or found > best[1])
        if better:
            best = made, found
    if best is None:
        raise ValueError(f"no width leaves {wanted} of the MACs")
    return best


def at_latency(dense: nn.Module, make: Make, wanted: float, problem: Problem, took: Callable[[Any], float]) -> Pruned:
    """The model whose latency `took` comes nearest to `wanted` of dense."""
    made, latency = _bisected(
        lambda ratio: at_ratio(dense, make, ratio, problem),
        lambda made: took(copy.deepcopy(made.model)),
        wanted,
        nearest=True,
    )
    return replace(made, latency=latency)


def bisected(dense: nn.Module, make: Make, wanted: float, problem: Problem) -> Pruned:
    """The largest model with at most `wanted` of the MACs."""
    return _bisected(
        lambda ratio: at_ratio(dense, make, ratio, problem), lambda made: made.macs, wanted, nearest=False
    )[0]


def _head(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 10]


def torch_pruning(kind: str, problem: Problem) -> Make:
    """Torch-Pruning 1.6.1 by `l2`, `taylor`, `hessian`, or `isomorphic` ranking by magnitude."""
    import torch_pruning as tp

    def make(model: nn.Module, ratio: float) -> nn.Module:
        importance: Any = {
            "l2": tp.importance.GroupMagnitudeImportance,
            "taylor": tp.importance.GroupTaylorImportance,
            "hessian": tp.importance.GroupHessianImportance,
            "isomorphic": tp.importance.GroupMagnitudeImportance,
        }[kind]()
        heads: dict[nn.Module, int] = {}
        for module in model.modules():  # as its examples for ViT and BERT say
            if hasattr(module, "qkv") and hasattr(module, "num_heads"):
                module.fused_attn = False
                heads[module.qkv] = module.num_heads
            for name in ("query", "key", "value"):
                if hasattr(module, "num_attention_heads") and isinstance(getattr(module, name, None), nn.Linear):
                    heads[getattr(module, name)] = module.num_attention_heads
        pruner = tp.pruner.BasePruner(
            model, problem.x[:2], importance, pruning_ratio=ratio, ignored_layers=_head(model), round_to=ALIGN,
            global_pruning=kind == "isomorphic", isomorphic=kind == "isomorphic", max_pruning_ratio=0.95,
            num_heads=heads,
        )  # fmt: skip
        x, y = (v[:SEEN] for v in problem.part("train"))
        if kind == "taylor":
            F.cross_entropy(model(x), y).backward()
        elif kind == "hessian":
            importance.zero_grad()
            for one in F.cross_entropy(model(x[:32]), y[:32], reduction="none"):
                model.zero_grad()
                one.backward(retain_graph=True)
                importance.accumulate_grad(model)
        pruner.step()
        for module in model.modules():
            if hasattr(module, "qkv") and hasattr(module, "num_heads"):
                module.head_dim = module.qkv.out_features // (3 * module.num_heads)
                module.attn_dim = module.num_heads * module.head_dim
            if hasattr(module, "attention_head_size") and isinstance(getattr(module, "query", None), nn.Linear):
                module.attention_head_size = module.query.out_features // module.num_attention_heads
                module.all_head_size = module.query.out_features
        return model.eval()

    return make


def kirigami(problem: Problem) -> Make:
    """torch-kirigami 0.2.1: group magnitude, the same share of every layer."""
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import ChannelRatio, Greedy, GroupMagnitude, Pruner

    def make(model: nn.Module, ratio: float) -> nn.Module:
        graph = DependencyGraph.build(model, args=(problem.x[:2],))
        pruner = Pruner(model, graph=graph)
        made, _ = pruner.prune(
            pruner.discover_candidates(), budget=ChannelRatio(ratio), strategy=Greedy(GroupMagnitude(p=2))
        )
        return made.eval()

    return make


class Onnxsim:
    """onnxsim 0.8.1: structured pruning of the exported file, then its own ridge refit on 256 training samples."""

    def __init__(self, dense: nn.Module, problem: Problem) -> None:
        import tempfile

        import onnx
        import onnxsim

        self.problem, self._library, self._onnx = problem, onnxsim, onnx
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name) / "dense.onnx"
        torch.onnx.export(
            dense, (problem.x[:2],), path, dynamo=True, external_data=False, verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},), input_names=["input"],
        )  # fmt: skip
        self.whole, _ = onnxsim.simplify(onnx.load(path))
        self.dense_macs = self._macs(self._saved(self.whole))

    def _saved(self, model: Any) -> Path:
        path = Path(self._folder.name) / "pruned.onnx"
        self._onnx.save(model, path)
        return path

    def _macs(self, path: Path) -> int:
        from validators.feeds import Feed
        from validators.macs import count_macs

        return count_macs(path, Feed("one", {"input": self.problem.x[:1].numpy()}))

    def at(self, wanted: float, took: Callable[[Path], float] | None = None) -> tuple[Path, float, float | None]:
        """The file that leaves at most `wanted` of the MACs, or whose latency, as it `took`, comes nearest to that; its
        share of MACs, and of latency.
        """

        def share(made: Any) -> float:
            return self._macs(self._saved(made)) / self.dense_macs

        left = share if took is None else lambda made: took(self._saved(made))
        made, found = _bisected(
            lambda sparsity: self._library.apply_structured_pruning(self.whole, sparsity),
            left,
            wanted,
            nearest=took is not None,
        )
        latency = None if took is None else found
        seen, _ = self.problem.part("train")
        batches = [{"input": seen[i : i + 64].numpy()} for i in range(0, min(256, len(seen)), 64)]
        tuned = self._library.apply_pruning_finetune(self.whole, made, calibration_data=batches)
        macs_left = share(made)
        return self._saved(tuned), macs_left, latency


def makers(problem: Problem) -> Iterator[tuple[str, bool, Callable[[], Make]]]:
    """Every peer that gives a torch module: name, whether all layers lose the same share, and how it is called.

    Those that do are given the ratio that was found for the first: torch-kirigami takes minutes for one ResNet-18.
    """
    for kind in ("l2", "taylor", "hessian", "isomorphic"):
        yield f"Torch-Pruning, {kind}", kind != "isomorphic", lambda kind=kind: torch_pruning(kind, problem)
    yield "torch-kirigami, l2", True, lambda: kirigami(problem)
