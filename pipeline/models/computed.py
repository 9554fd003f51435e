"""State dicts of parametrized modules as state dicts of plain ones: the weights computed from their parts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.models.checkpoint import Checkpoint, oddity


def plain(found: Checkpoint, model: nn.Module) -> tuple[Checkpoint, str]:
    """`found` with each weight that it keeps in parts (norm and direction, original and mask) computed; what was done.

    `model` tells transposed convolutions from others, whose spectral norm is taken over another dimension.
    """
    transposed = {
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    }
    tensors = dict(found.tensors)
    homes = dict(found.homes)
    kinds: dict[str, int] = {}
    for name in found.tensors:
        for ending, keys, plain_name, kind in _FORMS:
            if not name.endswith(ending):
                continue
            base = name.removesuffix(ending)
            if ".parametrizations." in f".{base}":
                before, _, attribute = f".{base}".rpartition(".parametrizations.")
                whole = f"{before}.{attribute}".removeprefix(".")
            else:
                whole = base
            used = [base + key for key in keys if base + key in tensors]
            if plain_name != ("parametrizations." in base) or len(used) < 2 or whole in tensors:
                continue
            parts = [tensors[one] for one in used]
            if any(oddity(one) or not (one.is_floating_point() or one.dtype == torch.bool) for one in parts):
                continue
            dim = 1 if any(whole == one or whole.endswith(f".{one}") for one in transposed) else 0
            value = _value(kind, [_full(one) for one in parts], dim)
            if value is None:
                continue
            tensors[whole], homes[whole] = value, homes[name]
            for one in used:
                del tensors[one]
            kinds[kind] = kinds.get(kind, 0) + 1
            break
    text = ", ".join(f"{kind} of {count} weights" for kind, count in kinds.items())
    return Checkpoint(tensors, {name: homes[name] for name in tensors}, found.keys), text


# The name that tells, what belongs to it (its own first), whether a parametrization of the new kind, and the kind.
_FORMS = (
    ("_g", ("_g", "_v"), False, "weight norm"),
    (".original0", (".original0", ".original1"), True, "weight norm"),
    ("_orig", ("_orig", "_mask"), False, "pruning mask"),
    ("_orig", ("_orig", "_u", "_v"), False, "spectral norm"),
    (".original", (".original", ".0._u", ".0._v"), True, "spectral norm"),
)


def _full(part: Tensor) -> Tensor:
    return part.float() if part.dtype in (torch.float16, torch.bfloat16, torch.bool) else part


def _value(kind: str, parts: list[Tensor], dim: int) -> Tensor | None:
    """The weight, computed as torch does; None where the parts do not belong together."""
    first, *rest = parts
    if kind == "weight norm":
        (direction,) = rest
        if first.dim() == 0:
            whole: Tensor = direction * (first / direction.norm())
            return whole
        if first.dim() != direction.dim():
            return None
        kept = [d for d, size in enumerate(first.shape) if size != 1]
        if len(kept) > 1 or any(first.shape[d] != direction.shape[d] for d in kept):
            return None
        weight: Tensor = torch._weight_norm(direction, first, kept[0] if kept else 0)
        return weight
    if kind == "pruning mask":
        (mask,) = rest
        return first * mask if mask.shape == first.shape else None
    if len(rest) < 2 or first.dim() < 2:
        return None
    matrix = first.movedim(dim, 0).flatten(1)
    u, v = rest
    if matrix.shape != (u.numel(), v.numel()):
        return None
    return first / torch.dot(u, matrix @ v)
