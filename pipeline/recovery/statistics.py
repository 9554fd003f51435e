"""Statistics of batch norms, taken anew from what the pruned network computes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SAMPLES = 64
"""In one batch; each batch counts the same."""


def reestimate(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Set every batch norm's running mean and variance to the averages over `inputs` (samples in dimension 0 of each),
    in place. Returns how many.

    Dropout and everything else stays in eval mode. Cumulative averages, as in the re-estimation of Wang et al. 2018.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats and norm.running_mean is not None]
    if not norms or len(inputs[0]) < 2:
        return 0
    model.eval()
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        with torch.no_grad():
            for start in range(0, len(inputs[0]) - 1, SAMPLES):
                batch = tuple(one[start : start + SAMPLES] for one in inputs)
                if len(batch[0]) > 1:
                    model(*batch)
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
        model.eval()
    return len(norms)
