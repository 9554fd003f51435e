"""Weights that a module computes before each forward pass, made plain ones: weight norm, spectral norm, pruning masks.

What is not a function of the input is the same in every forward pass in eval mode, so that the value may as well be
the weight. Parametrizations of any kind (`torch.nn.utils.parametrize`: the new norms, orthogonal, the user's own) and
torch's own hooks (`weight_norm`, `spectral_norm`, `prune`) are folded. A model that is trained here from nothing keeps
them until it is trained; whatever comes after works on the plain weights, zeros of a pruning mask among them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree as pytree

from foundation.errors import ModelError, first_line
from pipeline.models.source import Input

# The same weights may be laid out otherwise in memory, and be summed in another order.
ROUNDING = 1e-4
NAMED = 3

Folded = dict[str, list[str]]
"""Kind (weight norm, spectral norm, ...) -> names of the weights that it computed."""


def fold(model: nn.Module) -> Folded:
    """Make every computed weight of `model` a plain one, in place; what was folded, {} if all was plain.

    `requires_grad` stays: a weight is frozen if all that it was computed from was. Where every parameter of the model
    is frozen, all are freed, since there would be nothing to train. Raises ModelError if a parametrization fails.
    """
    model.eval()  # spectral norm goes on with its power iteration in training mode
    folded: Folded = {}
    values: dict[tuple[int, str], Tensor] = {}
    computed = _parametrized(model)
    for name, module, attribute in computed:  # all values first: removing one changes what a tied one computes
        try:
            with torch.no_grad():
                values[id(module), attribute] = getattr(module, attribute).detach().clone()
        except Exception as error:
            raise ModelError(
                f"The parametrization of {name} failed: {type(error).__name__}: {first_line(error)[:200]}",
                "Correct it, or remove it with torch.nn.utils.parametrize.remove_parametrizations.",
            ) from error
    tied: dict[int, nn.Parameter] = {}
    for name, module, attribute in computed:
        folded.setdefault(_kinds(_list(module, attribute)), []).append(name)
        _remove(module, attribute, values[id(module), attribute], tied)
    for prefix, module in model.named_modules():
        hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, tuple(_HOOKS))]
        for hook in reversed(hooks):  # the last one computes from what the earlier ones are given
            attribute = getattr(hook, "_tensor_name" if isinstance(hook, BasePruningMethod) else "name")
            name = f"{prefix}.{attribute}" if prefix else attribute
            kind = next(kind for cls, kind in _HOOKS.items() if isinstance(hook, cls))
            folded.setdefault(kind, []).append(name)
            _unhook(module, hook, attribute)
        if hooks and isinstance(module, nn.RNNBase):
            module._init_flat_weights()  # its kernel is handed a list, which knows the earlier tensors
    free(model)
    return folded


def free(model: nn.Module) -> bool:
    """Let all parameters be trained if every one is frozen; whether that was so."""
    parameters = list(model.parameters())
    if not parameters or any(value.requires_grad for value in parameters):
        return False
    for value in parameters:
        value.requires_grad_(value.is_floating_point() or value.is_complex())
    return True


def said(folded: Folded) -> str:
    """One line for people: what was folded into plain weights; "" for nothing."""
    parts = []
    for kind, names in folded.items():
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        parts.append(f"{kind} of {', '.join(names[:NAMED])}{more}")
    return f"folded into plain weights: {'; '.join(parts)}" if parts else ""


def fold_checked(model: nn.Module, inputs: tuple[Tensor, ...], name: str = "The model") -> Folded:
    """`fold`, and see on `inputs` that the function is still the same.

    Raises ModelError where it is not, such as for a parametrization that draws random numbers.
    """
    model.eval()
    if not computes(model):
        return fold(model)
    with torch.no_grad():
        model(*inputs)  # hooks over hooks (a mask under weight norm) take effect in the pass after the next
        before = _leaves(model(*inputs))
        folded = fold(model)
        after = _leaves(model(*inputs))
    for old, new in zip(before, after, strict=True):
        scale = float(old.abs().nan_to_num(0.0, 0.0, 0.0).max()) if old.numel() else 0.0
        if not torch.allclose(old, new, rtol=0.0, atol=ROUNDING * max(scale, 1e-6), equal_nan=True):
            raise ModelError(
                f"{name} computes something else once its weights are plain ({said(folded)}).",
                "Is a parametrization random, or has it a state? Give a model without it.",
            )
    return folded


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, also where a hook (weight norm, pruning) left a weight that it computed: copied as a value."""
    computed = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    memo: dict[int, object] = {id(value): value.detach().clone() for value in computed}
    for value in model.buffers():
        if isinstance(value, UninitializedBuffer):  # has no copy of its own kind
            memo[id(value)] = UninitializedBuffer(requires_grad=False, device=value.device, dtype=value.dtype)  # type: ignore[call-arg]
    return copy.deepcopy(model, memo)


def computes(model: nn.Module) -> bool:
    """Whether some weight of the model is computed before each forward pass, by a parametrization or torch's hooks."""
    return bool(_parametrized(model)) or any(
        isinstance(hook, tuple(_HOOKS)) for module in model.modules() for hook in module._forward_pre_hooks.values()
    )


def materialised(make: Callable[[], nn.Module], inputs: Callable[[nn.Module], tuple[Input, ...]]) -> nn.Module:
    """What `make` returns, lazy modules given their shapes by one forward pass on a sample of `inputs`.

    Raises ModelError if that pass fails or leaves one without a shape, or if a parameter has no values (meta).
    """
    model = make()
    if not isinstance(model, nn.Module):  # the user's callable: refused by the caller, who knows its name
        return model
    if _lazy(model):
        model.eval()
        sample = tuple(one.sample(2, torch.Generator().manual_seed(0)) for one in inputs(model))
        shapes = ", ".join("x".join(map(str, tensor.shape)) for tensor in sample)
        try:
            with torch.no_grad():
                model(*sample)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a forward pass that calls sys.exit, too
            raise ModelError(
                f"The model's lazy modules cannot be given shapes by input {shapes}: {first_line(error)[:200]}",
                "Set data.input_size to one that the model takes.",
            ) from error
        left = _lazy(model)
        if left:
            raise ModelError(
                f"Lazy parameters are still without a shape after a forward pass, first {left[0]}.",
                "Take out modules that forward does not use, or give them their sizes.",
            )
    empty = [name for name, value in [*model.named_parameters(), *model.named_buffers()] if value.is_meta]
    if empty:
        raise ModelError(
            f"{len(empty)} of the model's tensors are on the meta device and have no values, first {empty[0]}.",
            "Build it on the CPU, or give it values with to_empty(device='cpu') and its own initialisation.",
        )
    return model


def _lazy(model: nn.Module) -> list[str]:
    held = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, value in held if isinstance(value, UninitializedParameter | UninitializedBuffer)]


_HOOKS: dict[type, str] = {
    WeightNorm: "weight norm",
    SpectralNorm: "spectral norm",
    BasePruningMethod: "pruning mask",
}


def _parametrized(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    found = []
    for prefix, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        lists = module.parametrizations
        assert isinstance(lists, nn.ModuleDict)
        found += [(f"{prefix}.{attribute}" if prefix else attribute, module, attribute) for attribute in lists]
    return found


def _list(module: nn.Module, attribute: str) -> parametrize.ParametrizationList:
    lists = module.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    found = lists[attribute]
    assert isinstance(found, parametrize.ParametrizationList)
    return found


def _kinds(parametrizations: parametrize.ParametrizationList) -> str:
    """`_WeightNorm` -> weight norm."""
    words = [re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(one).__name__.lstrip("_")).lower() for one in parametrizations]
    return " over ".join(reversed(words))


def _remove(module: nn.Module, attribute: str, value: Tensor, tied: dict[int, nn.Parameter]) -> None:
    """Replace the parametrization by `value`; parameters that had one original, and get equal values, stay one."""
    parametrizations = _list(module, attribute)
    originals = [one for key, one in parametrizations.named_parameters(recurse=False) if key.startswith("original")]
    cls = type(module)  # a deep copy shares the class, which keeps the property that is taken away below
    module.__class__ = type(cls.__name__, cls.__bases__, dict(cls.__dict__))
    parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
    if attribute in module._buffers or not originals:
        module._buffers[attribute] = value
        module._parameters.pop(attribute, None)
        return
    plain = nn.Parameter(value, requires_grad=any(one.requires_grad for one in originals))
    shared = tied.setdefault(id(originals[0]), plain)
    same = shared.shape == value.shape and torch.equal(shared.detach(), value)
    module._parameters[attribute] = shared if same else plain


def _unhook(module: nn.Module, hook: object, attribute: str) -> None:
    """Take one of torch's own hooks away, its value left as the weight."""
    suffixes = {WeightNorm: ("_g", "_v"), SpectralNorm: ("_orig",), BasePruningMethod: ("_orig",)}
    mine = next(ends for cls, ends in suffixes.items() if isinstance(hook, cls))
    sources = [getattr(module, attribute + end) for end in mine]
    trained = any(one.requires_grad for one in sources)
    if isinstance(hook, WeightNorm):
        remove_weight_norm(module, attribute)
    elif isinstance(hook, SpectralNorm):
        remove_spectral_norm(module, attribute)
        # It leaves the hook that looks for the parts in a state dict, since that one is wrapped.
        for key, wrapped in list(module._load_state_dict_pre_hooks.items()):
            if getattr(getattr(wrapped, "hook", wrapped), "fn", None) is hook:
                del module._load_state_dict_pre_hooks[key]
    else:
        prune.remove(module, attribute)  # type: ignore[no-untyped-call]
    value = getattr(module, attribute)
    if isinstance(value, nn.Parameter):
        value.requires_grad_(trained)


def _leaves(output: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
