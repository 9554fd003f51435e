"""Masks on parameters, in the manner of `torch.nn.utils.prune`: True = kept; what is under a mask counts as zero.

A masked parameter is a parametrization of `torch.nn.utils.parametrize`: `module.weight` is `where(mask, original, 0)`,
computed whenever anybody reads it, so that it also holds where a parent reads its child's weight without calling the
child (`nn.MultiheadAttention` does), which a forward hook would miss. The original lives on untouched until `fold`,
and no optimizer, momentum or weight decay can make a masked weight anything but zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from foundation.errors import MaskError
from foundation.files import save_tensors
from pipeline.artifacts.eager import Sparsity

Masks = Mapping[str, Tensor]
"""Parameter name -> bool tensor of its shape, True = kept."""


class Masked(nn.Module):
    """The parametrization: zero wherever the mask is False, even if the original there is NaN."""

    mask: Tensor

    def __init__(self, mask: Tensor, order: tuple[str, ...]) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.order = order
        """The module's parameter names before it was touched, so that `fold` can put them back in their order."""

    def forward(self, original: Tensor) -> Tensor:
        """Return `original` with zeros under the mask."""
        return torch.where(self.mask, original, 0.0)


# ── on a model ───────────────────────────────────────────────────────────────────────────────────────────────────────


def apply(model: nn.Module, masks: Masks) -> None:
    """Mask the named parameters in place; one that is masked already gets the new mask over the same original.

    Names are those of `model.named_parameters()` before anything was masked. A parameter that several modules share is
    masked in all of them. Raises MaskError if there is no such parameter, or a mask is no bool tensor of its shape.
    """
    known = {name: (module, attribute) for name, module, attribute in parameters_by_name(model)}
    sharing: dict[int, list[tuple[nn.Module, str]]] = {}
    for module, attribute in known.values():
        sharing.setdefault(id(original_of(module, attribute)), []).append((module, attribute))
    done: dict[int, Tensor] = {}
    for name, mask in masks.items():
        if name not in known:
            raise MaskError(f"There is no parameter {name!r} to mask.", "The masks belong to another model.")
        original = original_of(*known[name])
        _check(name, mask, original)
        if not torch.equal(done.setdefault(id(original), mask), mask):
            raise MaskError(f"{name} is tied to a parameter with another mask.", "Give tied parameters one mask.")
        for module, attribute in sharing[id(original)]:
            _mask(name, module, attribute, mask)


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Masks now on the model, tied parameters once, by their first name."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module, attribute in _masked(model):
        original = id(original_of(module, attribute))
        if original not in seen:
            seen.add(original)
            found[name] = _parametrization(module, attribute).mask
    return found


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """What an optimizer trains, by its plain name: the originals of masked parameters, shared ones once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, module, attribute in parameters_by_name(model):
        value = original_of(module, attribute)
        found.setdefault(id(value), (name, value))
    return dict(found.values())


def originals(model: nn.Module) -> dict[str, Tensor]:
    """State dict under the names of the unmasked model, with the original values under the masks."""
    renamed, dropped = _renaming(model)
    return {renamed.get(name, name): value for name, value in model.state_dict().items() if name not in dropped}


def load_originals(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fill a model from what `originals` gave, leaving its masks as they are."""
    renamed, dropped = _renaming(model)
    own = model.state_dict()
    masked = {name: state[renamed.get(name, name)] for name in own if name not in dropped}
    model.load_state_dict(masked | {name: own[name] for name in dropped})


def fold(model: nn.Module) -> None:
    """Make the masks part of the weights, in place: plain parameters again, originals and parametrizations gone.

    The output stays exactly the same, tied parameters stay tied, and parameters keep their order.
    """
    for _, module, attribute in list(_masked(model)):
        order = _parametrization(module, attribute).order
        _own_class(module)
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
        for name in order:
            if name in module._parameters:
                module._parameters[name] = module._parameters.pop(name)


def check_held(model: nn.Module, masks: Masks) -> None:
    """Raise MaskError, naming the parameter, if a weight that the masks remove is not zero in the model."""
    known = {name: (module, attribute) for name, module, attribute in parameters_by_name(model)}
    for name, mask in masks.items():
        if name not in known:
            raise MaskError(f"There is no parameter {name!r} to check.", "The masks belong to another model.")
        with torch.no_grad():
            value = getattr(*known[name])
            _check(name, mask, value)
            wrong = int((value.masked_fill(mask, 0.0) != 0).sum())
        if wrong:
            raise MaskError(
                f"{name}: {wrong} of {int((~mask).sum())} weights under the mask are not zero.",
                "The masks were taken off or the weights overwritten; apply the masks again.",
            )


def maskable(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that `apply` can mask, shared ones by every name.

    What is parametrized already (weight norm) cannot be masked a second time.
    """
    return frozenset(
        name for name, module, _ in parameters_by_name(model) if not isinstance(module, parametrize.ParametrizationList)
    )


def parameters_by_name(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Name, module and attribute of every parameter: shared ones each time, masked ones by their plain name."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, parametrize.ParametrizationList) and any(isinstance(one, Masked) for one in module):
            continue
        masked = [key for key in getattr(module, "parametrizations", {}) if _is_masked(module, key)]
        for attribute in (*masked, *(key for key, value in module._parameters.items() if value is not None)):
            yield f"{prefix}.{attribute}" if prefix else attribute, module, attribute


def _masked(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    return ((name, module, key) for name, module, key in parameters_by_name(model) if _is_masked(module, key))


def _is_masked(module: nn.Module, attribute: str) -> bool:
    return parametrize.is_parametrized(module, attribute) and any(
        isinstance(one, Masked) for one in _list(module, attribute)
    )


def _list(module: nn.Module, attribute: str) -> parametrize.ParametrizationList:
    lists = module.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    found = lists[attribute]
    assert isinstance(found, parametrize.ParametrizationList)
    return found


def _parametrization(module: nn.Module, attribute: str) -> Masked:
    found = _list(module, attribute)[0]
    assert isinstance(found, Masked)
    return found


def original_of(module: nn.Module, attribute: str) -> Tensor:
    """The parameter itself, whatever masks lie over it."""
    if _is_masked(module, attribute):
        original = _list(module, attribute).original
        assert isinstance(original, Tensor)
        return original
    value = getattr(module, attribute)
    assert isinstance(value, Tensor)
    return value


def _check(name: str, mask: Tensor, parameter: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape != parameter.shape:
        raise MaskError(
            f"The mask of {name} is {tuple(mask.shape)} {mask.dtype}; the parameter is {tuple(parameter.shape)}.",
            "The masks belong to another model.",
        )


def _mask(name: str, module: nn.Module, attribute: str, mask: Tensor) -> None:
    if _is_masked(module, attribute):
        _parametrization(module, attribute).mask = mask.clone()
        return
    if isinstance(module, parametrize.ParametrizationList):
        raise MaskError(f"{name} is parametrized already (weight norm?), so it cannot be masked.", "Leave it out.")
    _own_class(module)
    order = tuple(module._parameters)
    if parametrize.is_parametrized(module):
        lists = getattr(module, "parametrizations", {})
        earlier = [_parametrization(module, key).order for key in lists if _is_masked(module, key)]
        order = max(earlier, key=len, default=order)
    parametrize.register_parametrization(module, attribute, Masked(mask.clone(), order))


def _own_class(module: nn.Module) -> None:
    """Give a parametrized module its own class: a deep copy shares that of its original, where a change would show."""
    cls = type(module)
    if parametrize.is_parametrized(module):
        module.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))


def _renaming(model: nn.Module) -> tuple[dict[str, str], set[str]]:
    """State dict names of masked originals -> plain names; and the names of the masks."""
    renamed: dict[str, str] = {}
    dropped: set[str] = set()
    for name, _, attribute in _masked(model):
        inner = f"{name.removesuffix(attribute)}parametrizations.{attribute}"
        renamed[f"{inner}.original"] = name
        dropped.add(f"{inner}.0.mask")
    return renamed, dropped


# ── on disk ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def save(masks: Masks, path: Path | str) -> None:
    """Write masks as safetensors, complete or not at all; raises StoreError."""
    save_tensors(masks, path)


# ── counting ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def sparsity(state: Mapping[str, Tensor], masks: Masks | None = None) -> tuple[Sparsity, ...]:
    """Count zeros per floating-point tensor; those under `masks` count as zero, whatever the original is."""
    found = []
    for name, value in state.items():
        if not value.is_floating_point() or value.ndim == 0:
            continue
        kept = value != 0
        if masks is not None and name in masks:
            kept &= masks[name]
        rows = kept.reshape(kept.shape[0], -1).any(dim=1)
        zeros = kept.numel() - int(kept.sum())
        found.append(Sparsity(name, tuple(value.shape), value.numel(), zeros, len(rows), len(rows) - int(rows.sum())))
    return tuple(found)
