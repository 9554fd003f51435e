"""Single weights instead of channels: the smallest ones, or two of every four."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from foundation.errors import ConfigError
from pipeline.training.masks import Masks, original_of, parameters_by_name


def prunable(model: nn.Module) -> dict[str, Tensor]:
    """Weights that unstructured and 2:4 pruning may take: matrices and kernels, no embeddings, norms or biases.

    Shared parameters appear once, by their first name; the tensors are the originals, detached.
    """
    found: dict[int, tuple[str, Tensor]] = {}
    barred: set[int] = set()
    for name, module, attribute in parameters_by_name(model):
        value = original_of(module, attribute)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            barred.add(id(value))
        if value.ndim >= 2 and re.search(r"(^|_)weight$", attribute) and not isinstance(module, nn.RNNBase):
            found.setdefault(id(value), (name, value.detach()))
    return {name: value for key, (name, value) in found.items() if key not in barred}


def unstructured_l1(
    weights: Mapping[str, Tensor],
    ratio: float,
    *,
    scope: Literal["layer", "global"] = "layer",
    overrides: Mapping[str, float] | None = None,
    held: Masks | None = None,
) -> dict[str, Tensor]:
    """Mask the share `ratio` of the weights that is smallest in magnitude.

    `scope` ranks inside each parameter, or over all of them together. `overrides` maps a glob over names (the last that
    matches wins) to a ratio of its own; those layers are always ranked by themselves. Weights that `held` masks go
    first, so that pruning in rounds only ever takes more. Of equal magnitudes the earlier go first. Raises ConfigError
    for a ratio outside [0, 1).
    """
    ratios = {name: _ratio(name, ratio, overrides or {}) for name in weights}
    scores = {name: value.detach().abs().float().flatten() for name, value in weights.items()}
    for name, mask in (held or {}).items():
        if name in scores:
            scores[name] = torch.where(mask.flatten(), scores[name], -1.0)
    alone = [name for name, own in ratios.items() if scope == "layer" or own is not None]
    masks = {name: ~_smallest(scores[name], _share(ratio, ratios[name])) for name in alone}
    together = [name for name in weights if name not in masks]
    if together:
        gone = _smallest(torch.cat([scores[name] for name in together]), ratio)
        parts = gone.split([scores[name].numel() for name in together])  # type: ignore[no-untyped-call]
        masks |= {name: ~part for name, part in zip(together, parts, strict=True)}
    return {name: masks[name].reshape(value.shape) for name, value in weights.items()}


def two_four(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keep the 2 largest of every 4 consecutive weights along the input dimension (dim 1), as sparse tensor cores want.

    Convolution kernels are grouped over input channels at each position, as NVIDIA's ASP does (Mishra et al. 2021,
    arXiv:2104.08378). A parameter whose input dimension is no multiple of 4 is kept whole.
    """
    masks: dict[str, Tensor] = {}
    for name, value in weights.items():
        if value.ndim < 2 or value.shape[1] % 4:
            masks[name] = torch.ones(value.shape, dtype=torch.bool)
            continue
        rows = value.detach().abs().movedim(1, -1)
        fours = rows.reshape(-1, 4)
        largest = fours.argsort(dim=1, descending=True, stable=True)[:, :2]
        kept = torch.zeros(fours.shape, dtype=torch.bool).scatter_(1, largest, True)
        masks[name] = kept.reshape(rows.shape).movedim(-1, 1).contiguous()
    return masks


def _ratio(name: str, ratio: float, overrides: Mapping[str, float]) -> float | None:
    """The ratio that `overrides` gives this parameter, if any."""
    own = None
    for glob, value in overrides.items():
        if fnmatchcase(name, glob) or fnmatchcase(name.rpartition(".")[0], glob):
            own = value
    for one in (ratio, own):
        if one is not None and not 0.0 <= one < 1.0:
            raise ConfigError(f"A pruning ratio must be in [0, 1), not {one}.", "Give the share to remove, e.g. 0.5.")
    return own


def _share(ratio: float, own: float | None) -> float:
    return ratio if own is None else own


def _smallest(scores: Tensor, ratio: float) -> Tensor:
    """True for that share of the scores, the smallest; of equal ones the earlier. At least one score is left out."""
    count = min(round(ratio * scores.numel()), scores.numel() - 1)
    if count <= 0:
        return torch.zeros(scores.shape, dtype=torch.bool)
    limit = torch.kthvalue(scores, count).values
    chosen = scores < limit
    equal = (scores == limit).nonzero().flatten()
    chosen[equal[: count - int(chosen.sum())]] = True
    return chosen
