"""One experiment that all engine tests share: mask groups at random, fold, shrink, prove, and show that the proof
can fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.channels import (
    Analysis,
    Captured,
    Policy,
    Proof,
    Shrunk,
    analyse,
    capture,
    count_macs,
    prove,
    shrink,
    small,
)
from pipeline.channels.operators.strict import strictly
from pipeline.channels.removal.verify import difference


@dataclass(frozen=True)
class Experiment:
    """What one removal gave."""

    captured: Captured
    analysis: Analysis
    removed: dict[str, Any]
    folded: Captured
    shrunk: Shrunk
    proof: Proof
    control: float


def randomise(model: nn.Module, seed: int) -> None:
    """No parameter at a value that hides a mistake (scale 1, shift 0, mean 0)."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.dtype.is_floating_point:
                spread = torch.rand(value.shape, generator=draw) + 0.5
                sign = 1.0 if "running_var" in name else torch.sign(torch.randn(value.shape, generator=draw))
                scale = 1.0 if value.dim() < 2 else (value[0].numel()) ** -0.5
                value.copy_(spread * sign * scale)


def experiment(
    model: nn.Module,
    *inputs: torch.Tensor,
    ratio: float = 0.5,
    seed: int = 0,
    policy: Policy | None = None,
    dynamic_batch: bool = True,
) -> Experiment:
    """Remove a random share of every cluster's groups; raises RefusedError where the result differs."""
    randomise(model, seed)
    captured = capture(model.eval(), inputs, dynamic_batch=dynamic_batch)
    analysis = analyse(captured, policy)
    rng = np.random.default_rng(seed)
    removed = {c.name: rng.random(c.size) < ratio for c in analysis.clusters}
    for cluster in analysis.clusters:
        removed[cluster.name][rng.integers(cluster.size)] = True  # something goes from each
        removed[cluster.name][rng.integers(cluster.size)] = False
    folded = captured.fold(analysis.masks(removed))
    shrunk = shrink(folded, analysis, removed)
    feeds = [small(captured, batch=3, seed=seed)]
    proof = prove(folded, shrunk, feeds)
    expected = analysis.estimate(removed)
    if not shrunk.refused:
        held = {shrunk.program.state_dict[n].data_ptr(): shrunk.program.state_dict[n].numel()
                for n in shrunk.program.graph_signature.parameters}  # fmt: skip
        assert sum(held.values()) == expected.params
        assert count_macs(shrunk.program) == expected.macs
    careless = shrink(captured, analysis, removed, check_zero=False)
    control, _, _ = difference(captured, careless, feeds)
    return Experiment(captured, analysis, removed, folded, shrunk, proof, control)


@pytest.fixture(name="experiment")
def _experiment() -> Callable[..., Experiment]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return experiment


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """A mistake in a card is raised here; for users it is a refusal."""
    with strictly():
        yield


@pytest.fixture
def lenient() -> Iterator[None]:
    """As for users: a card that does not fit is a refusal."""
    with strictly(False):
        yield
