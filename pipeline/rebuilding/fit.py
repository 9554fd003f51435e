"""Give a module the tensors of a smaller program, and its layers the widths that those have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def fit(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put `state` into `model` in place, whatever sizes it has; what stands in several places stays shared.

    Names that `state` has and the model has not are biases of layers that had none. Raises ValueError where there is no
    place for one.
    """
    before: dict[int, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        changed = False
        for held in (module._parameters, module._buffers):
            for attribute, old in held.items():
                name = f"{path}.{attribute}" if path else attribute
                if name not in state:
                    continue
                if old is None:
                    held[attribute] = nn.Parameter(state[name].detach().clone())
                    changed = True
                elif old.shape == state[name].shape:
                    old.data.copy_(state[name])
                else:
                    held[attribute] = before.setdefault(id(old), _like(old, state[name]))
                    changed = True
        if changed:
            _tell_widths(module)
    lost = state.keys() - tensors(model).keys()
    if lost:
        raise ValueError(f"there is no place for {min(lost)}")


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, shared ones by every name."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _like(old: Tensor, value: Tensor) -> Tensor:
    """`value` as what `old` is: a parameter, trained or frozen, or a buffer."""
    value = value.detach().clone()
    return nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value


def _tell_widths(module: Any) -> None:
    """The widths that torch's own layers write down, as their tensors have them now."""
    if isinstance(module, nn.modules.conv._ConvNd):
        own, other = module.weight.shape[:2]
        widths = (own, other * module.groups)
        module.in_channels, module.out_channels = widths if module.transposed else widths[::-1]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Bilinear):
        module.out_features, module.in1_features, module.in2_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        kept = next((one for one in (module.weight, module.running_mean) if one is not None), None)
        module.num_features = module.num_features if kept is None else len(kept)
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.GroupNorm) and module.weight is not None:
        module.num_channels = len(module.weight)
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    elif isinstance(module, nn.RNNBase):
        _tell_recurrent(module)


GATES = {"LSTM": 4, "GRU": 3}
"""Rows of a recurrent layer's matrices for each state: torch.nn.LSTM and GRU stack their gates."""


def _tell_recurrent(module: Any) -> None:
    """A recurrent layer's sizes, and the list in which it keeps its weights besides."""
    module.hidden_size = module.weight_hh_l0.shape[0] // GATES.get(module.mode, 1)
    module.input_size = module.weight_ih_l0.shape[1]
    if module.proj_size:
        module.proj_size = module.weight_hr_l0.shape[0]
    module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
